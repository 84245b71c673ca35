"""`rcpo sweep sweep.search=optuna`: trials that a sampler asks for, each a run; some stopped half-way.

Optuna's ask-and-tell interface around the same processes as a grid's. The study is a journal in the sweep's
folder, so that calling again goes on with it; a trial that was under way runs again with the same values, in
the same folder, from its last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rcpo.config.changes import flatten, shapes_result
from rcpo.config.composition import compose_with, user_part
from rcpo.config.parsing import parse, to_container
from rcpo.errors import ConfigError
from rcpo.launch.folder import make_folder
from rcpo.launch.outcomes import DONE, REFUSED, Outcome
from rcpo.launch.pool import Pool, slots
from rcpo.runs.folder import EVALUATION_FILE, METRICS_FILE, read_evaluation, read_rows, sweeping
from rcpo.runs.inputs import read_inputs
from rcpo.sweeps.multirun import BASIC_LAUNCHER, report, start
from rcpo.sweeps.naming import run_name
from rcpo.sweeps.settings import SweepConfig
from rcpo.system.signals import STOPPED
from rcpo.system.text import first_line

if TYPE_CHECKING:
    import optuna
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import IntervalSweep, Override

JOURNAL = "optuna.journal"
_ABOUT = "rcpo"  # attribute of a study: what its trials' values depend on
_REASON = "reason"  # attribute of a trial that failed by itself; one that was lost has none


def search(
    hydra: Hydra, name: str, overrides: Mapping[str, Override], settings: SweepConfig, cfg: DictConfig
) -> tuple[dict[Path, Outcome], dict[str, Any]]:
    """Run trials until `sweep.trials` have ended: their outcomes, and the study for sweep.json.

    `cfg` is what the trials share. Raises ConfigError where nothing varies or Optuna is not installed.
    """
    varied = {key: override for key, override in overrides.items() if override.is_sweep_override()}
    _refuse(list(varied), settings, cfg)
    fixed = [str(o.input_line) for key, o in overrides.items() if key not in varied]
    sweep_dir = Path(cfg.hydra.sweep.dir)
    spaces = {key: space(override) for key, override in varied.items()}
    about = {"metric": settings.metric, "direction": settings.direction, "space": _as_text(spaces)}
    about |= {"settings": _fixed_settings(hydra, name, fixed)}
    make_folder(sweep_dir, "hydra.sweep.dir")
    trials = Trials(hydra, name, fixed, spaces, settings, sweep_dir, about)
    with sweeping(sweep_dir), Pool(slots(settings.parallel, cfg.launch.processes)) as pool:
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
        raise ConfigError("a search cannot vary seed; give one value, and sweep the best trial over seeds")
    if cfg.hydra.launcher._target_ != BASIC_LAUNCHER:
        raise ConfigError("sweep.search=optuna starts its trials on this machine: leave hydra/launcher out")
    if settings.pruner != "none" and cfg.eval.every == 0:
        raise ConfigError(
            f"sweep.pruner={settings.pruner} goes by evaluations along the way, and eval.every=0 makes none; "
            "set eval.every to a number of steps"
        )


def _as_text(spaces: Mapping[str, optuna.distributions.BaseDistribution]) -> dict[str, str]:
    from optuna.distributions import distribution_to_json

    return {key: distribution_to_json(each) for key, each in sorted(spaces.items())}


def _fixed_settings(hydra: Hydra, name: str, fixed: Sequence[str]) -> dict[str, str]:
    """What all trials share and their values depend on, with the contents of data and models.

    Where the fixed overrides alone make no configuration, they themselves are compared.
    """
    try:
        config = parse(user_part(compose_with(hydra, name, fixed)))
        inputs = read_inputs(config)
    except ConfigError:
        return {override.partition("=")[0]: override.partition("=")[2] for override in fixed}
    settings = flatten(to_container(config))
    kept = {key: str(value) for key, value in settings.items() if shapes_result(key)}
    return kept | inputs


def space(override: Override) -> optuna.distributions.BaseDistribution:
    """A Hydra sweep as Optuna sees it: interval() with the tags log and int, range(), or choices.

    Raises ConfigError, with the override, for what is not a space.
    """
    from hydra.errors import HydraException

    try:
        return _space(override)
    except (ValueError, TypeError, OverflowError, HydraException) as error:
        raise ConfigError(f"{override.input_line} is not a space to search: {first_line(error)}") from error


def _space(override: Override) -> optuna.distributions.BaseDistribution:
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        low, high = _ends(value, log)
        if "int" in value.tags:
            return IntDistribution(int(low), int(high), log=log)
        return FloatDistribution(low, high, log=log)
    if isinstance(value, ChoiceSweep | RangeSweep):  # the sampler draws; the order has to stay the same
        override = replace(override, _value=replace(value, shuffle=False))
    choices = list(dict.fromkeys(override.sweep_string_iterator()))
    if not choices:
        raise ValueError("it holds no value")
    if isinstance(value, RangeSweep) and isinstance(value.start, int) and isinstance(value.step, int):
        numbers = sorted(map(int, choices))
        return IntDistribution(numbers[0], numbers[-1], step=abs(value.step))
    return CategoricalDistribution(choices)


def _ends(value: IntervalSweep, log: bool) -> tuple[float, float]:
    """Both ends of an interval; raises ValueError where nothing lies between them."""
    low, high = value.start, value.end
    assert low is not None and high is not None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("both ends have to be finite numbers")
    if low > high:
        raise ValueError(f"it begins above its end; write interval({high:g},{low:g})")
    if log and low <= 0:
        raise ValueError("on a log scale it has to begin above 0")
    if "int" in value.tags and not (float(low).is_integer() and float(high).is_integer()):
        raise ValueError("the ends of an interval of whole numbers have to be whole")
    return low, high


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
        about: Mapping[str, Any],
    ) -> None:
        self._hydra, self._name, self._fixed, self._spaces = hydra, name, fixed, spaces
        self._settings, self._sweep_dir = settings, sweep_dir
        self._study = open_study(sweep_dir, settings, about)
        self._pruned: dict[int, int] = {}  # the step after which a trial's run was told to stop, by number
        self.outcomes: dict[Path, Outcome] = {}

    def run(self, pool: Pool) -> None:
        """Ask, run and tell, as many trials at a time as the pool has slots."""
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
            config = parse(user_part(cfg))
            begun = start(folder, config, lambda: pool.start(folder, self._watch(trial, folder)))
        except ConfigError as error:
            begun = Outcome(REFUSED, str(error))
        if isinstance(begun, Future):
            return begun
        future: Future[Outcome] = Future()
        future.set_result(begun)
        return future

    def _watch(self, trial: optuna.Trial, folder: Path) -> Callable[[], bool] | None:
        """Report evaluations along the way as they come; say when the trial is to be given up."""
        if self._settings.pruner == "none":
            return None
        last = 0

        def given_up() -> bool:
            nonlocal last
            for row in read_rows(folder / METRICS_FILE):
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
            found = read_evaluation(folder / EVALUATION_FILE)
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


def open_study(sweep_dir: Path, settings: SweepConfig, about: Mapping[str, Any]) -> optuna.Study:
    """The study in a sweep's folder, new or as it was left; trials that were lost are asked for again.

    `about` is what the trials' values depend on. Raises ConfigError where it was otherwise before.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners: dict[str, optuna.pruners.BasePruner] = {
        "none": optuna.pruners.NopPruner(),
        "median": optuna.pruners.MedianPruner(n_startup_trials=settings.pruner_startup),
        "hyperband": optuna.pruners.HyperbandPruner(),
    }
    study = _load_study(sweep_dir / JOURNAL, settings.direction, about)
    study.pruner = pruners[settings.pruner]
    before = study.get_trials(deepcopy=False)
    # a continued study would otherwise draw its first points once more
    seed = settings.sampler_seed + len(before)
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=settings.parallel != 1)
    for trial in before:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
    return study


def _load_study(journal: Path, direction: str, about: Mapping[str, Any]) -> optuna.Study:
    """The journal's study, or a new one that records what it is `about`; raises ConfigError for another."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        known = optuna.get_all_study_names(storage)
        if not known:
            study = optuna.create_study(
                study_name="sweep", storage=storage, direction=StudyDirection[direction.upper()]
            )
            study.set_user_attr(_ABOUT, about)
            return study
        study = optuna.load_study(study_name=known[0], storage=storage)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{journal} cannot be read as the journal of a search: {first_line(error)}; choose another "
            "hydra.sweep.dir"
        ) from error
    _refuse_other_search(study.user_attrs.get(_ABOUT), about, journal)
    return study


def _refuse_other_search(before: Mapping[str, Any] | None, now: Mapping[str, Any], journal: Path) -> None:
    old, new = flatten(before or {}), flatten(now)
    found = [
        f"{key.removeprefix('settings.')}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if before is None:
        found = ["what its values are of was not recorded"]
    if found:
        lines = "\n".join(f"  {line}" for line in found)
        raise ConfigError(
            f"{journal} holds another search, whose values cannot be compared with this one's:\n{lines}\n"
            "give the same metric, direction, space and settings, or choose another hydra.sweep.dir"
        )
