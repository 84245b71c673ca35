"""What a run ends with: weights, or the adapter, and tokenizer in the hub's format, for transformers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from rcpo.checkpoint.read import checkpoint_tensors, checkpoint_weights, verify
from rcpo.engine.load import honour_umask, write_merged
from rcpo.models.hub import ModelSource
from rcpo.runs.folder import BEST, MERGED
from rcpo.system import distributed
from rcpo.system.files import put_in_place
from rcpo.training.session import Session

log = logging.getLogger(__name__)


def save_model(session: Session, name: str) -> None:
    """The policy of this moment, in a folder of the run that is whole or not there. Collective."""
    weights = session.engine.state_dict()
    if distributed.is_main():
        folder = session.run_dir / name
        scratch = folder.with_name(f".{name}.new")
        shutil.rmtree(scratch, ignore_errors=True)
        session.engine.policy.model.save_pretrained(scratch, state_dict=weights)
        session.tokenizer.save_pretrained(scratch)
        if session.config.adapter.save_merged or _needs_merged(session):
            write_merged(ModelSource(session.start.base, adapter=scratch), scratch / MERGED, session.config)
            _list_end(session, scratch / MERGED)
        _list_end(session, scratch)
        honour_umask(scratch)
        put_in_place(scratch, folder)
    distributed.barrier()


def _needs_merged(session: Session) -> bool:
    """Whether transformers would read another model from the adapter than peft does; says so."""
    if not session.engine.policy.adapted:
        return False
    from rcpo.models.adapters import loses_by_transformers

    lost = loses_by_transformers(session.engine.policy.model)
    if lost:
        log.warning(
            "this adapter is a DoRA one, whose magnitudes transformers drops: load final/ with peft, or "
            "final/%s, the whole model, with transformers",
            MERGED,
        )
    return lost


def _list_end(session: Session, folder: Path) -> None:
    """Write a generation_config.json that lists what ends a learned response, for generate() to stop there.

    A base model that learns with a chat template ends its turns otherwise than it did.
    """
    template = session.datasets.template
    learned = session.tokenizer.eos_token_id if template is None else template.end_id(session.tokenizer)
    settings = json.loads(session.engine.policy.model.generation_config.to_json_string())
    known = settings.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if learned not in ends:
        ends = [*ends, learned]
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / "generation_config.json").write_text(f"{text}\n", encoding="utf-8")


def save_best(session: Session, checkpoint: Path, is_last: bool) -> str | None:
    """`best/` from a checkpoint, whose weights the policy has afterwards. Collective.

    Returns why not, where the checkpoint is damaged. `is_last`: it has the policy's weights anyway.
    """
    if not is_last:
        problem = verify(checkpoint)
        if problem is not None:
            return f"best/ is not written: {checkpoint} is damaged: {problem}"
        if session.training:
            session.engine.restore(checkpoint_tensors(checkpoint))
        else:
            session.engine.load_weights(checkpoint_weights(checkpoint))
    save_model(session, BEST)
    return None
