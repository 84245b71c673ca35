"""lm-evaluation-harness as a library: the one importer of lm_eval, which is an extra.

Each entry of `eval.tasks` is one call of the harness with its own number of examples in the prompt, as its
command line would make it. Requests are dealt to the ranks, each of which holds the whole model. Results are
kept by content: weights, tokenizer, task with its data, settings and versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rcpo.config.schema import RunConfig
from rcpo.config.validation import nearest
from rcpo.errors import ConfigError
from rcpo.models.contents import generation_hash, source_hash, tokenizer_hash
from rcpo.models.hub import ModelSource
from rcpo.runs.folder import HARNESS_FILE, HARNESS_FOLDER
from rcpo.runs.jsonl import write_lines
from rcpo.system import distributed
from rcpo.system.files import cache_folder, replace_text, write_atomically
from rcpo.system.text import first_line

PREFIX = "eval/harness/"
FORMAT = "1"

log = logging.getLogger(__name__)
Results = dict[str, Any]


@dataclass(frozen=True)
class TaskSpec:
    """An entry of `eval.tasks`: a task's or group's name, or a YAML file, and `@N` examples in the prompt."""

    name: str
    shots: int | None = None

    @staticmethod
    def parse(text: str) -> TaskSpec:
        """`NAME` or `NAME@SHOTS`; raises ConfigError."""
        name, sign, shots = text.partition("@")
        if not name or (sign and not shots.isdecimal()):
            raise ConfigError(f"eval.tasks: {text!r} is not NAME, NAME@SHOTS or FILE.yaml@SHOTS")
        return TaskSpec(name, int(shots) if sign else None)

    def __str__(self) -> str:
        return self.name if self.shots is None else f"{self.name}@{self.shots}"


@dataclass
class Harness:
    """The tasks that are to be run, loaded and known to work; `keys` are their contents' hashes.

    `skipped` are those that need a package which is not installed.
    """

    config: RunConfig
    manager: Any
    keys: dict[TaskSpec, str] = field(default_factory=dict)
    skipped: dict[TaskSpec, str] = field(default_factory=dict)

    @staticmethod
    def prepare(config: RunConfig) -> Harness:
        """Find and load the tasks of `eval.tasks` with their data, before any weight is read. Collective.

        Raises ConfigError where the extra is not installed, a task does not exist, or its data cannot be had.
        """
        try:
            manager = _task_manager()
        except ImportError as error:
            raise ConfigError(f"eval.tasks needs the extra: pip install 'rcpo[eval]' ({error})") from error
        for name in ("lm_eval", "lm-eval"):  # it tells of every step; warnings stay
            logging.getLogger(name).setLevel(logging.WARNING)
        harness = Harness(config, manager)
        # rank 0 first: what has to be downloaded is downloaded once
        for turn in (True, False):
            if distributed.is_main() == turn:
                for text in config.eval.tasks:
                    harness._load(TaskSpec.parse(text))
            distributed.barrier()
        harness.keys = distributed.broadcast_object(harness.keys)
        return harness

    def _load(self, spec: TaskSpec) -> None:
        known = self.manager.all_tasks
        if spec.name not in known and not Path(spec.name).is_file():
            raise ConfigError(f"eval.tasks: the harness has no task {spec.name}; {nearest(spec.name, known)}")
        try:
            loaded = self.manager.load([spec.name])
        except ModuleNotFoundError as error:
            self.skipped[spec] = str(error).replace("\n", " ")
            return
        except (OSError, ValueError) as error:  # what `datasets` raises for data that it cannot find or read
            raise ConfigError(
                f"eval.tasks: the data of {spec} cannot be obtained: {first_line(error)}; "
                "download it once on a machine with a network (HF_HOME says where), or leave the task out"
            ) from error
        self.keys[spec] = _content(loaded["tasks"])

    def run(
        self,
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        load: Callable[[], PreTrainedModel],
    ) -> Results:
        """The harness's own results by entry, for the model of `source`, which `load` reads if it is needed.

        Equal on all ranks. Collective.
        """
        cache, own = None, None
        if distributed.is_main():
            cache = cache_folder(self.config.reference.cache)
            memo = None if cache is None else cache / "files"
            folder = Path(tokenizer.name_or_path)
            own = [source_hash(source, self.config.seed, memo), tokenizer_hash(folder, memo)]
            own += [generation_hash(source.base, memo), *self._settings()]
        results: Results = {}
        model = None
        for spec, content in self.keys.items():
            place = None
            if cache is not None:
                key = hashlib.sha256(json.dumps([own, str(spec.shots), content]).encode()).hexdigest()
                place = cache / "harness" / f"{key}.json"
            found = distributed.broadcast_object(_read(place))
            if found is None:
                model = model or _language_model(load(), tokenizer, self.config.eval.task_batch_size)
                found = distributed.broadcast_object(self._evaluate(model, spec))
                if place is not None:
                    with suppress(OSError):  # a full disk: it is computed again next time
                        write_atomically(place, json.dumps(found).encode())
            results[str(spec)] = found
        return results

    def _settings(self) -> list[str]:
        settings = self.config.eval
        versions = [metadata.version(name) for name in ("lm_eval", "torch", "transformers")]
        kernels = [self.config.train.dtype, distributed.device().type]
        return [FORMAT, *versions, *kernels, str(settings.limit), str(settings.chat_template)]

    def _evaluate(self, model: Any, spec: TaskSpec) -> Results | None:
        """One call of the harness; its results on rank 0."""
        from lm_eval import evaluator, simple_evaluate

        # it asks git about the folder that the user happens to be in, and git complains on the terminal
        evaluator.get_git_commit_hash = lambda: None
        settings = self.config.eval
        found = simple_evaluate(
            model=model,
            tasks=[spec.name],
            num_fewshot=spec.shots,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            task_manager=self.manager,
        )
        return None if found is None else json.loads(json.dumps(found, default=str))


def flat_record(results: Mapping[str, Results]) -> dict[str, float]:
    """`eval/harness/TASK/METRIC` and `…/stderr`, named as the harness does; a filter but `none` stays."""
    record: dict[str, float] = {}
    for found in results.values():
        for task, metrics in found["results"].items():
            for name, value in metrics.items():
                if not isinstance(value, int | float) or "," not in name:
                    continue
                metric, _, filtered = name.partition(",")
                error = metric.endswith("_stderr")
                shown = metric.removesuffix("_stderr") + ("" if filtered == "none" else f",{filtered}")
                record[f"{PREFIX}{task}/{shown}" + ("/stderr" if error else "")] = value
    return record


def write_results(folder: Path, results: Mapping[str, Results]) -> None:
    """harness.json, and for each task a file with a line for each document, where those are known."""
    (folder / HARNESS_FOLDER).mkdir(parents=True, exist_ok=True)
    kept = {}
    for spec, found in results.items():
        kept[spec] = {key: plain(value) for key, value in found.items() if key != "samples"}
        for task, samples in found.get("samples", {}).items():
            write_lines(folder / HARNESS_FOLDER / f"{task}.jsonl", map(plain, samples))
    replace_text(folder / HARNESS_FILE, json.dumps(kept, indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """JSON that any reader takes: a number that is not finite, as an impossible answer's, becomes text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


@cache
def _task_manager() -> Any:
    """The harness's index of its tasks, thousands of files that take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _content(tasks: Mapping[str, Any]) -> str:
    """A hash of tasks' settings and data."""
    digest = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        digest.update(json.dumps([name, task.dump_config()], default=str, sort_keys=True).encode())
        for split, rows in sorted(dict(task.dataset or {}).items()):
            digest.update(f"{split} {len(rows)} {rows._fingerprint}".encode())
    return digest.hexdigest()


def _read(place: Path | None) -> Results | None:
    if place is None or not place.is_file():
        return None
    with suppress(OSError, ValueError):  # damaged: it is computed again
        found: Results = json.loads(place.read_text(encoding="utf-8"))
        return found
    return None


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as the harness wants it, its requests dealt to this process group's ranks.

    The harness's own way deals documents, and draws other examples for the prompts on each rank; here every
    rank makes all requests, answers its share and gets the others' answers.
    """
    from lm_eval.models.huggingface import HFLM

    class SharedModel(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return share(requests, super().loglikelihood)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return share(requests, super().loglikelihood_rolling)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return share(requests, super().generate_until)

    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is already in memory
    wrapped = SharedModel(
        pretrained=model.to(distributed.device()), tokenizer=tokenizer, batch_size=batch_size
    )
    logging.getLogger("lm_eval").setLevel(level)
    return wrapped


def share(requests: Sequence[Any], answer: Callable[..., list[Any]]) -> list[Any]:
    """The answers to all requests, each rank's share computed there. Collective.

    Requests of one document stay together: they have their prompt in common, and its logits.
    """
    documents: dict[tuple[str, int], int] = {}
    numbers = [
        documents.setdefault((request.task_name, request.doc_id), len(documents)) for request in requests
    ]
    ranks, rank = distributed.world_size(), distributed.rank()
    places = [
        [place for place, number in enumerate(numbers) if number % ranks == one] for one in range(ranks)
    ]
    own = [requests[place] for place in places[rank]]
    answers = answer(own, disable_tqdm=rank != 0) if own else []
    found: dict[int, Any] = {}
    for part, values in zip(places, distributed.gather_objects(answers), strict=True):
        found |= dict(zip(part, values, strict=True))
    return [found[place] for place in range(len(requests))]
