"""Groups, contrasts and intervals over runs whose numbers are made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rcpo.errors import ConfigError
from rcpo.evaluation.probe_file import ProbeFile
from rcpo.runs.comparison import (
    STEPS_IN_BAND,
    Condition,
    Metric,
    RunSummary,
    band_record,
    conditions,
    contrasts,
    differing,
    labelled,
    overall,
    rule_of,
    run_values,
    summarise_run,
)
from rcpo.runs.statistics import Difference, Spread

NATS = Metric("x", "a log-ratio", "nats")
SHARE = Metric("y", "a share", "share")


def settings(objective: str = "dpo", rc: bool = False, seed: int = 1, **more: Any) -> dict[str, Any]:
    own = {"objective.beta": 0.1} if objective == "dpo" else {"objective.beta": 2.0, "objective.gamma": 1.0}
    return {"seed": seed, "objective.name": objective, "rc.enabled": rc, **own, "optim.lr": 1e-4, **more}


def run(name: str = "run", /, values: dict[str, float] | None = None, **more: Any) -> RunSummary:
    return RunSummary(name, settings(**more), values or {})


def test_runs_of_one_condition_differ_by_seed_alone() -> None:
    runs = [
        run(seed=1),
        run(seed=1, rc=True),
        run(seed=2),
        run(seed=1, objective="simpo"),
        run(seed=2, rc=True),
    ]
    found = conditions(runs)
    assert [condition.label for condition in found] == ["dpo rc=off", "dpo rc=on", "simpo"]
    assert [[each.seed for each in condition.runs] for condition in found] == [[1, 2], [1, 2], [1]]


def test_a_number_written_as_1_or_as_1_point_0_is_one_condition() -> None:
    written = [{"objective.beta": 1}, {"objective.beta": 1.0}]
    runs = [run(seed=seed, **own) for seed, own in enumerate(written)]
    (condition,) = conditions(runs)
    assert len(condition.runs) == 2 and differing([each.settings for each in runs]) == []
    assert len(conditions([run(**{"train.shuffle": flag}) for flag in (True, 1)])) == 2  # true is not 1


def test_what_a_run_shows_and_where_it_runs_makes_no_condition() -> None:
    free = {"wandb.mode": "disabled", "launch.processes": 4, "eval.every": 5, "resume": "auto"}
    assert len(conditions([run(seed=1), run(seed=2, **free)])) == 1
    assert differing([settings(), settings(**{"data.path": "b.jsonl"})]) == ["data.path"]


@pytest.mark.parametrize("key", ["eval.max_examples", "eval.max_new_tokens", "eval.scorer", "judge.model"])
def test_other_evaluation_settings_are_another_condition(key: str) -> None:
    assert len(conditions([run(seed=1, **{key: 1}), run(seed=2, **{key: 2})])) == 2
    free = {"eval.batch_size": 7, "judge.timeout": 3.0, "data.workers": 4}
    assert len(conditions([run(seed=1), run(seed=2, **free)])) == 1


def test_a_later_evaluation_with_other_settings_or_data_is_another_condition(tmp_path: Path) -> None:
    for seed in (1, 2, 3, 4):
        folder = tmp_path / f"seed-{seed}"
        (folder / "evaluation").mkdir(parents=True)
        (folder / "config.yaml").write_text(f"seed: {seed}\neval: {{max_examples: null}}\n")
        inputs = {"the training data": "aaaa", "the held-out data": "bbbb"}
        (folder / "finished.json").write_text(json.dumps({"inputs": inputs}))
    for seed, limit, held_out in ((1, None, "bbbb"), (2, 8, "bbbb"), (3, None, "cccc")):
        record = {"config": {"eval": {"max_examples": limit}}, "inputs": {"the held-out data": held_out}}
        (tmp_path / f"seed-{seed}" / "evaluation" / "settings.json").write_text(json.dumps({"pairs": record}))
    (tmp_path / "seed-4" / "finished.json").write_text(json.dumps({"inputs": {**inputs}}))
    found = conditions([summarise_run(folder) for folder in sorted(tmp_path.iterdir())])
    # seed 1 was evaluated again as it had been; seeds 2 and 3 were not
    assert [[each.seed for each in condition.runs] for condition in found] == [[1, 4], [2], [3]]


def test_a_run_that_was_benchmarked_or_judged_stays_with_its_seeds(tmp_path: Path) -> None:
    """Tasks and a judge add figures; what they were asked matters between runs that have some."""
    tasks = {1: None, 2: None, 3: ["arc"], 4: ["gsm8k"], 5: None}
    for seed, names in tasks.items():
        folder = tmp_path / f"seed-{seed}"
        (folder / "evaluation").mkdir(parents=True)
        own = "eval: {tasks: [], judge: false, preferences: true}\njudge: {model: null}\n"
        (folder / "config.yaml").write_text(f"seed: {seed}\n{own}")
        judged = {"config": {"judge": {"model": "a judge"}}}
        record = {"judge": judged} if seed == 2 else {"tasks": {"config": {"eval": {"tasks": names}}}}
        if names or seed == 2:
            (folder / "evaluation" / "settings.json").write_text(json.dumps(record))

    def groups(*seeds: int) -> list[list[int]]:
        found = conditions([summarise_run(tmp_path / f"seed-{seed}") for seed in seeds])
        return [[each.seed for each in condition.runs] for condition in found]

    assert groups(1, 2, 3) == [[1, 2, 3]]  # one was judged, one benchmarked: they share all that both have
    assert groups(3, 4) == [[3], [4]]  # other tasks


def test_runs_on_data_that_changed_in_place_are_another_condition(tmp_path: Path) -> None:
    for seed, content in ((1, "aaaa"), (2, "aaaa"), (3, "bbbb")):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"seed: {seed}\ndata: {{path: pairs.jsonl}}\n")
        (folder / "finished.json").write_text(json.dumps({"inputs": {"the training data": content}}))
    found = conditions([summarise_run(folder) for folder in sorted(tmp_path.iterdir())])
    assert [[each.seed for each in condition.runs] for condition in found] == [[1, 2], [3]]


def test_a_name_holds_what_differs_within_its_objective() -> None:
    found = labelled([settings(), settings(**{"optim.lr": 2e-4}), settings("simpo")])
    assert found == ["dpo optim.lr=0.0001", "dpo optim.lr=0.0002", "simpo"]


def test_a_reduction_that_is_not_the_objective_s_own_is_in_the_name() -> None:
    def labels(*reductions: str, objective: str = "dpo") -> list[str]:
        return labelled([settings(objective, **{"objective.reduction": each}) for each in reductions])

    # objective=dpo is written for sums and simpo for means; dpo_mean has the name dpo, too
    assert labels("sum") == ["dpo"] and labels("mean") == ["dpo reduction=mean"]
    assert labels("mean", "mean") == ["dpo reduction=mean"] * 2
    assert labels("sum", "mean") == ["dpo reduction=sum", "dpo reduction=mean"]
    assert labels("mean", objective="simpo") == labels("average", objective="simpo") == ["simpo"]
    assert labels("average", objective="tidpo") == ["tidpo"]
    assert labels("average") == ["dpo reduction=average"]
    assert labels("mean", objective="mine") == ["mine"]  # a user's, of which rcpo knows no usual one
    pairs = contrasts(conditions([run(rc=rc, **{"objective.reduction": "mean"}) for rc in (False, True)]))
    assert [pair.label for pair in pairs] == ["dpo reduction=mean"]


def test_a_contrast_needs_all_else_equal() -> None:
    on = {"rc": True}
    runs = [
        run(),
        run(**on),
        run(**{"optim.lr": 2e-4}),
        run(**on, **{"optim.lr": 3e-4}),
        run(objective="simpo"),
    ]
    (found,) = contrasts(conditions(runs))
    assert found.base.runs == (runs[0],) and found.calibrated.runs == (runs[1],)
    assert found.label == "dpo optim.lr=0.0001"  # the others, without a partner, have other rates


def test_over_contrasts_medians_and_signs() -> None:
    """Differences by seed: dpo 0.1 ± 0.001 (clear), simpo −0.2 and +0.1 (mean −0.05), cpo 0 with one."""
    by_seed = {
        ("dpo", False): {1: 0.5, 2: 0.5}, ("dpo", True): {1: 0.599, 2: 0.601},
        ("simpo", False): {1: 0.7, 2: 0.7}, ("simpo", True): {1: 0.5, 2: 0.8},
        ("cpo", False): {1: 0.1}, ("cpo", True): {1: 0.1},
    }  # fmt: skip
    runs = [
        run(values={"x": value}, objective=objective, rc=rc, seed=seed)
        for (objective, rc), values in by_seed.items()
        for seed, value in values.items()
    ]
    found = overall(contrasts(conditions(runs)), "x")
    assert found is not None
    assert (found.base, found.calibrated) == pytest.approx((0.5, 0.6))  # of 0.5, 0.7, 0.1 and 0.6, 0.65, 0.1
    assert found.difference == pytest.approx(0.0)  # of 0.1, −0.05, 0
    assert (found.count, found.higher, found.clearly_higher, found.lower, found.clearly_lower) == (
        3,
        1,
        1,
        1,
        0,
    )
    assert overall(contrasts(conditions(runs)), "y") is None


def test_medians_and_differences_are_over_the_same_seeds() -> None:
    """Seed 3 ran without calibration alone, seed 4 with it alone: neither moves a median."""
    values = {False: {1: 0.1, 2: 0.3, 3: 9.0}, True: {1: 0.5, 2: 0.9, 4: -9.0}}
    runs = [
        run(values={"x": value}, rc=rc, seed=seed)
        for rc, by_seed in values.items()
        for seed, value in by_seed.items()
    ]
    (contrast,) = contrasts(conditions(runs))
    assert contrast.means("x") == pytest.approx((0.2, 0.7)) and contrast.means("y") is None
    found = overall([contrast], "x")
    assert found is not None
    assert (found.base, found.calibrated, found.difference) == pytest.approx((0.2, 0.7, 0.5))


def test_variants_of_the_calibration_share_their_base() -> None:
    variants = [run(rc=True, **{"rc.ema": ema}) for ema in (0.5, 0.9)]
    found = contrasts(conditions([run(**{"rc.ema": None}), *variants]))
    assert [(c.label, c.base.runs[0].settings["rc.enabled"]) for c in found] == [
        ("dpo rc.ema=0.5", False),
        ("dpo rc.ema=0.9", False),
    ]


def test_a_seed_that_ran_twice_counts_once() -> None:
    runs = (run(values={"x": 1.0}), run(values={"x": 3.0}), run(values={"x": 5.0}, seed=2), run(seed=3))
    condition = Condition("dpo", runs)
    assert condition.by_seed("x") == {1: 2.0, 2: 5.0}
    assert condition.values("x") == [1.0, 3.0, 5.0]


def test_steps_without_a_band_are_not_counted() -> None:
    inside = (None, False, True, None)
    rows = [{"step": step, "dynamics/in_band": value} for step, value in enumerate(inside, 1)]
    before = {"steps_in_band/before_calibration": 0.5}
    assert band_record(rows) == {"steps_in_band": 0.5, "band_entered": 3, **before}
    calibrated = [{"rc/in_band": True} | row for row in rows]
    assert band_record(calibrated) == {"steps_in_band": 1.0, "band_entered": 1, **before}
    assert band_record([{"step": 1, "dynamics/in_band": False}]) == {
        "steps_in_band": 0.0,
        "steps_in_band/before_calibration": 0.0,
    }
    assert band_record([{}]) == {}


def test_repetition_is_that_of_the_last_answers_which_nothing_checks(tmp_path: Path) -> None:
    file = ProbeFile(tmp_path / "probes.parquet", None)
    for step, shares in ((0, (0.9, 0.9)), (5, (0.25, None)), (10, (0.5, 0.25))):
        file.add([{"step": step, "example_id": str(n), "greedy_repetition": s} for n, s in enumerate(shares)])
    assert run_values(tmp_path, {}, []) == {"probes/repetition": 0.375}
    assert run_values(tmp_path, {"eval/exact_match": 0.5}, []) == {"eval/exact_match": 0.5}
    (tmp_path / "probes.parquet").write_bytes(b"torn")
    assert run_values(tmp_path, {}, []) == {}


def test_values_are_shown_with_their_unit() -> None:
    assert NATS.show(-0.1084) == "−0.108" and SHARE.show(0.754) == "75 %" and SHARE.show(None) == "–"
    assert NATS.show_spread(Spread(-0.1, 0.05, 3)) == "−0.100 ± 0.050"
    assert SHARE.show_spread(Spread(0.5, 0.02, 3)) == "50 % ± 2"
    assert SHARE.show_spread(Spread(0.5, None, 1)) == "50 %"
    assert NATS.show_difference(Difference(0.1, -0.05, 0.25, 3)) == "+0.100 [−0.050, +0.250]"
    assert SHARE.show_difference(Difference(0.1, -0.05, 0.25, 3)) == "+10.0 points [−5.0, +25.0]"


def test_a_mean_over_some_of_the_runs_tells_of_how_many() -> None:
    """With calibration, seed 2 ended without a finite y, and the mean is over the two others."""
    values = {False: (0.5, 0.5, 0.5), True: (0.75, 0.25, None)}
    runs = [
        run(values={"x": 1.0} | ({} if y is None else {"y": y}), seed=seed, rc=rc)
        for rc, each in values.items()
        for seed, y in enumerate(each)
    ]
    base, calibrated = conditions(runs)
    assert (base.show(SHARE), calibrated.show(SHARE)) == ("50 % ± 0", "50 % ± 35 (2 of 3)")
    assert calibrated.show(NATS) == "+1.000 ± 0.000" and calibrated.show(Metric("z", "none")) == "–"
    (contrast,) = contrasts([base, calibrated])
    pairs, (of_all, of_two) = contrast.show([NATS, SHARE])
    assert pairs == 3 and of_all == "+0.000 [+0.000, +0.000]"
    assert of_two.startswith("+0.0 points [") and of_two.endswith("] (2 of 3)")


def test_a_run_is_read_from_its_folder_as_far_as_it_came(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        summarise_run(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 3\nobjective: {name: dpo, beta: 0.1}\n")
    assert summarise_run(tmp_path).values == {} and summarise_run(tmp_path).seed == 3
    (tmp_path / "evaluation.json").write_text(json.dumps({"eval/loss": 0.5, "eval/kl": None}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "dynamics/in_band": true}\n{"step": 2, "dyn')
    found = summarise_run(tmp_path)
    band = {STEPS_IN_BAND: 1.0, "steps_in_band/before_calibration": 1.0, "band_entered": 1}
    assert found.values == {"eval/loss": 0.5, **band}
    assert found.settings == {"seed": 3, "objective.name": "dpo", "objective.beta": 0.1}


def test_comparing_needs_no_torch() -> None:
    program = "import sys, rcpo.runs.comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_every_rule_is_a_contrast_of_its_own_against_the_same_base() -> None:
    """One base for on, edge, loop and two constants; keys that a rule does not read split nothing."""
    unread = {"rc.target": 0.0, "rc.control.every": 4, "rc.ema": None}
    runs = [run("off", **unread, values={"x": 1.0})]
    for place, (rule, alpha) in enumerate(
        [("center", None), ("edge", None), ("loop", None), ("fixed", 1.5), ("fixed", 2.0)], 1
    ):
        more = {"rc.rule": rule, "rc.alpha": alpha, **unread}
        runs.append(run(f"{rule}-{alpha}", rc=True, values={"x": 1.0 + place}, **more))
    found = contrasts(conditions(runs))
    assert [pair.label for pair in found] == [
        "dpo rc=on",
        "dpo rc=edge",
        "dpo rc=loop",
        "dpo rc=fixed rc.alpha=1.5",
        "dpo rc=fixed rc.alpha=2",
    ]
    assert all(pair.base.runs == (runs[0],) for pair in found)
    assert [pair.difference("x").mean for pair in found] == [1.0, 2.0, 3.0, 4.0, 5.0]  # type: ignore[union-attr]


def test_band_and_scope_are_named_where_they_differ() -> None:
    ways = [("batch", "batch"), ("samples", "batch"), ("batch", "pair")]
    runs = [
        run(rc=True, **{"rc.rule": "edge", "rc.band": band, "rc.scope": scope, "rc.alpha_max": 10.0})
        for band, scope in ways
    ]
    base = run(**{"rc.rule": "center", "rc.band": "batch", "rc.scope": "batch", "rc.alpha_max": 10.0})
    assert [pair.label for pair in contrasts(conditions([base, *runs]))] == [
        f"dpo rc=edge rc.band={band} rc.scope={scope}" for band, scope in ways
    ]


def test_a_run_that_was_not_evaluated_yet_has_no_contents_of_its_own() -> None:
    known = {"contents.the model": "abc"}
    (found,) = conditions([run(seed=1, **known), run(seed=2)])
    assert found.label == "dpo"
    others = conditions([run(seed=1, **known), run(seed=2, **{"contents.the model": "def"})])
    assert [each.label for each in others] == ["dpo contents.the model=abc", "dpo contents.the model=def"]


def test_a_single_rule_that_is_not_the_papers_is_named() -> None:
    (found,) = contrasts(conditions([run(), run(rc=True, **{"rc.rule": "loop"})]))
    assert found.label == "dpo rc=loop" and rule_of(found.base.settings) == "off"


def test_the_base_is_the_one_that_was_measured_alike() -> None:
    kinds = ("head", "parameters")
    runs = [run(rc=rc, **{"rc.geometry": kind}) for kind in kinds for rc in (False, True)]
    pairs = contrasts(conditions(runs))
    assert [(p.base.runs[0], p.calibrated.runs[0]) for p in pairs] == [(runs[0], runs[1]), (runs[2], runs[3])]


def test_runs_without_calibration_differ_by_no_key_of_it() -> None:
    assert len(conditions([run(seed=1, **{"rc.ema": 0.5}), run(seed=2, **{"rc.ema": 0.9})])) == 1
