"""`rcpo sweep sweep.search=optuna`: trials that a sampler asks for, each a run; some stopped half-way.

Optuna's ask-and-tell interface around the same processes as a grid's. The study is a journal in the sweep's
folder, so that calling again goes on with it; a trial that was under way runs again with the same values, in
the same folder, from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rcpo.config import ConfigError
from rcpo.config.commands import SweepConfig
from rcpo.config.composition import compose_with
from rcpo.jobs.multirun import BASIC_LAUNCHER, report, start
from rcpo.jobs.naming import run_name
from rcpo.launch import DONE, REFUSED
from rcpo.launch.outcomes import Outcome
from rcpo.launch.pool import Pool, slots
from rcpo.runfolder import read_evaluation, read_rows
from rcpo.signals import STOPPED

if TYPE_CHECKING:
    import optuna
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override

JOURNAL = "optuna.journal"
_REASON = "reason"  # attribute of a trial that failed by itself; one that was lost has none


def search(
    hydra: Hydra, name: str, overrides: Mapping[str, Override], settings: SweepConfig, cfg: DictConfig
) -> tuple[dict[Path, Outcome], dict[str, Any]]:
    """Runs trials until `sweep.trials` have ended: their outcomes, and the study for sweep.json.

    `cfg` is what the trials share. Raises ConfigError where nothing varies or Optuna is not installed.
    """
    varied = {key: override for key, override in overrides.items() if override.is_sweep_override()}
    _refuse(list(varied), settings, cfg)
    fixed = [str(o.input_line) for key, o in overrides.items() if key not in varied]
    sweep_dir = Path(cfg.hydra.sweep.dir)
    spaces = {key: space(override) for key, override in varied.items()}
    sweep_dir.mkdir(parents=True, exist_ok=True)
    trials = Trials(hydra, name, fixed, spaces, settings, sweep_dir)
    with Pool(slots(settings.parallel, cfg.launch.processes)) as pool:
        trials.run(pool)
    return trials.outcomes, trials.as_dict()


def _refuse(varied: list[str], settings: SweepConfig, cfg: DictConfig) -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "sweep.search=optuna needs Optuna: pip install 'rcpo[sweep]', or pip install 'optuna>=5,<6'"
        ) from error
    if not varied:
        raise ConfigError(
            "sweep.search=optuna has nothing to search: give keys a space, for example "
            "'optim.lr=tag(log,interval(1e-5,1e-3))' objective.beta=0.1,0.5,1"
        )
    if "seed" in varied:
        raise ConfigError("seed is nothing to search; give one value, and sweep the best trial over seeds")
    if cfg.hydra.launcher._target_ != BASIC_LAUNCHER:
        raise ConfigError("sweep.search=optuna starts its trials on this machine: leave hydra/launcher out")
    if settings.pruner != "none" and cfg.eval.every == 0:
        raise ConfigError(
            f"sweep.pruner={settings.pruner} goes by evaluations along the way, and eval.every=0 makes none; "
            "set eval.every to a number of steps"
        )


def space(override: Override) -> optuna.distributions.BaseDistribution:
    """A Hydra sweep as Optuna sees it: interval() with the tags log and int, range(), or choices."""
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        assert value.start is not None and value.end is not None
        if "int" in value.tags:
            return IntDistribution(int(value.start), int(value.end), log=log)
        return FloatDistribution(value.start, value.end, log=log)
    choices = list(override.sweep_string_iterator())
    if isinstance(value, RangeSweep) and isinstance(value.start, int) and isinstance(value.step, int):
        numbers = sorted(map(int, choices))
        return IntDistribution(numbers[0], numbers[-1], step=abs(value.step))
    return CategoricalDistribution(choices)


class Trials:
    """A study, its trials' folders, and the runs that they are."""

    def __init__(
        self,
        hydra: Hydra,
        name: str,
        fixed: list[str],
        spaces: dict[str, optuna.distributions.BaseDistribution],
        settings: SweepConfig,
        sweep_dir: Path,
    ) -> None:
        self._hydra, self._name, self._fixed, self._spaces = hydra, name, fixed, spaces
        self._settings, self._sweep_dir = settings, sweep_dir
        self._study = open_study(sweep_dir, settings)
        self._pruned: dict[int, int] = {}  # the step after which a trial's run was told to stop, by number
        self.outcomes: dict[Path, Outcome] = {}

    def run(self, pool: Pool) -> None:
        """Asks, runs and tells, as many trials at a time as the pool has slots."""
        running: dict[int, tuple[optuna.Trial, Future[Outcome]]] = {}
        by_folder: dict[Path, Future[Outcome]] = {}
        while True:
            while len(running) < pool.slots and not pool.stopped and self._missing(len(running)):
                trial = self._study.ask(self._spaces)
                folder = self._folder(trial.params)
                if folder not in by_folder:  # two trials with the same values are one run
                    by_folder[folder] = self._begin(pool, trial, folder)
                running[trial.number] = trial, by_folder[folder]
            if not running:
                return
            wait([future for _, future in running.values()], return_when=FIRST_COMPLETED)
            for number, (trial, future) in list(running.items()):
                if future.done():
                    del running[number]
                    by_folder.pop(self._folder(trial.params), None)
                    self._end(trial, future.result())

    def _missing(self, under_way: int) -> bool:
        ended = [t for t in self._study.get_trials(deepcopy=False) if _has_ended(t)]
        return len(ended) + under_way < self._settings.trials

    def _folder(self, params: Mapping[str, Any]) -> Path:
        return self._sweep_dir / run_name({key: str(params[key]) for key in self._spaces})

    def _begin(self, pool: Pool, trial: optuna.Trial, folder: Path) -> Future[Outcome]:
        chosen = [f"{key}={value}" for key, value in trial.params.items()]
        folder.mkdir(exist_ok=True)
        try:
            cfg = compose_with(self._hydra, self._name, [*self._fixed, *chosen])
            begun = start(folder, cfg, lambda: pool.start(folder, self._watch(trial, folder)))
        except ConfigError as error:
            begun = Outcome(REFUSED, str(error))
        if isinstance(begun, Future):
            return begun
        future: Future[Outcome] = Future()
        future.set_result(begun)
        return future

    def _watch(self, trial: optuna.Trial, folder: Path) -> Callable[[], bool] | None:
        """Reports evaluations along the way as they come; says when the trial is to be given up."""
        if self._settings.pruner == "none":
            return None
        last = 0

        def given_up() -> bool:
            nonlocal last
            for row in read_rows(folder / "metrics.jsonl"):
                value = row.get(self._settings.metric)
                if value is not None and row["step"] > last:
                    last = row["step"]
                    trial.report(value, last)
                    if trial.should_prune():
                        self._pruned[trial.number] = last
                        return True
            return False

        return given_up

    def _end(self, trial: optuna.Trial, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        folder = self._folder(trial.params)
        step = self._pruned.get(trial.number)
        if outcome.code == DONE:
            found = read_evaluation(folder / "evaluation.json")
            value = found.get(self._settings.metric)
            if value is not None:
                self._study.tell(trial, value)
            else:
                outcome = Outcome(REFUSED, f"evaluation.json has no {self._settings.metric}: {_names(found)}")
        elif outcome.code == STOPPED and step is not None:
            Outcome(STOPPED, f"pruned after step {step}").write(folder)
            self._study.tell(trial, state=TrialState.PRUNED)
            outcome = Outcome(DONE)
        self.outcomes[folder] = outcome
        if outcome.code not in (DONE, STOPPED):  # one that was stopped is asked for again, by the next call
            trial.set_user_attr(_REASON, outcome.reason)
            self._study.tell(trial, state=TrialState.FAIL)
        report(folder, outcome)

    def as_dict(self) -> dict[str, Any]:
        """The study for sweep.json."""
        trials = [t for t in self._study.get_trials(deepcopy=False) if _has_ended(t)]
        scored = [t for t in trials if t.state.name == "COMPLETE"]
        return {
            "metric": self._settings.metric,
            "direction": self._settings.direction,
            "best": self._trial(self._study.best_trial) if scored else None,
            "trials": [self._trial(trial) for trial in trials],
        }

    def _trial(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        return {
            "run": self._folder(trial.params).name,
            "params": trial.params,
            "state": trial.state.name.lower(),
            "value": trial.value if trial.state.name == "COMPLETE" else None,
            "intermediate": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
            "reason": trial.user_attrs.get(_REASON),
        }


def _names(found: Mapping[str, float]) -> str:
    names = [name for name in found if not name.endswith(("/low", "/high"))]
    return f"it has {', '.join(names)}" if names else "it is empty or not there"


def _has_ended(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED") or (
        trial.state.name == "FAIL" and _REASON in trial.user_attrs
    )


def open_study(sweep_dir: Path, settings: SweepConfig) -> optuna.Study:
    """The study in a sweep's folder, new or as it was left; trials that were lost are asked for again."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners: dict[str, optuna.pruners.BasePruner] = {
        "none": optuna.pruners.NopPruner(),
        "median": optuna.pruners.MedianPruner(n_startup_trials=settings.pruner_startup),
        "hyperband": optuna.pruners.HyperbandPruner(),
    }
    study = optuna.create_study(
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(str(sweep_dir / JOURNAL))),
        direction=StudyDirection[settings.direction.upper()],
        pruner=pruners[settings.pruner],
        load_if_exists=True,
    )
    before = study.get_trials(deepcopy=False)
    # a continued study would otherwise draw its first points once more
    seed = settings.sampler_seed + len(before)
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=settings.parallel != 1)
    for trial in before:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
    return study
