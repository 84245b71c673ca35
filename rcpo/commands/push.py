"""`rcpo push`: a run's final weights, with their model card, to a repository of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcpo.commands.compose import command
from rcpo.config.model import holds_adapter
from rcpo.config.nodes import node_of, read_node
from rcpo.errors import ConfigError
from rcpo.launch.outcomes import DONE
from rcpo.models.hub import check_weights
from rcpo.models.upload import PushConfig, check_repo, files_of, upload
from rcpo.report.card import renew_card
from rcpo.report.provenance import CARD
from rcpo.runs.folder import CONFIG_FILE, FINAL, read_object

NODE = "push"


def push(arguments: Sequence[str], *, dry_run: bool = False) -> int:
    """`rcpo push ARGUMENTS`: returns the exit code; raises ConfigError for what is refused."""
    alone = "push sends one run at a time, without -m"
    with command(arguments, nodes=(NODE,), own=("run", "repo"), alone=alone) as call:
        if call.shown:
            return DONE
        for word in call.overrides:
            if node_of(word) != NODE:
                raise ConfigError(f"{word}: rcpo push reads run=, repo=, and the keys of push.* alone")
        settings = read_node(call.compose(), NODE, PushConfig())
    for key, what in (("run", "DIR"), ("repo", "OWNER/NAME")):
        if not call.own.get(key):
            raise ConfigError(f"rcpo push needs {key}={what}: rcpo push run=DIR repo=OWNER/NAME")
    settings.dry_run |= dry_run
    _push(call.folder("run"), call.own["repo"], settings)
    return DONE


def _push(run_dir: Path, repo: str, settings: PushConfig) -> None:
    check_repo(repo)
    folder = run_dir / FINAL
    if not (run_dir / CONFIG_FILE).exists():
        raise ConfigError(f"run={run_dir} is not the folder of a run: it has no {CONFIG_FILE}")
    if not ((folder / "config.json").is_file() or holds_adapter(folder)):
        raise ConfigError(f"run={run_dir} has no {FINAL}/ yet; finish it with resume={run_dir}")
    check_weights("run", folder, pickle=False)
    if not (folder / CARD).exists():
        renew_card(run_dir, print)
    kind = "private" if settings.private else "public"
    for path in files_of(folder):
        print(f"  {path.stat().st_size:>15,}  {path.relative_to(folder)}")
    _warn_of_local_base(folder)
    total = sum(path.stat().st_size for path in files_of(folder))
    what = f"{len(files_of(folder))} files, {total:,} bytes, to {repo} ({kind}, {settings.revision})"
    if settings.dry_run:
        print(f"rcpo: would send {what}; nothing was sent")
        return
    print(f"rcpo: sends {what}")
    message = settings.message or f"Upload {run_dir.resolve().name}, trained by rcpo"
    print(f"rcpo: done: {upload(folder, repo, settings, message)}")


def _warn_of_local_base(folder: Path) -> None:
    """Warn of an adapter on a base model that is a folder of this machine: others cannot load it."""
    settings = folder / "adapter_config.json"
    base = read_object(settings).get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).is_absolute():
        print(
            f"rcpo: warning: the adapter's base model is {base}, which is on this machine alone; for others, "
            f"write the base model's name on the hub as base_model_name_or_path into {settings}"
        )
