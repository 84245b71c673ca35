"""Reports of other tools' runs: their numbers, and what their logs do not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_folders import evaluation, rows, settings, write_run

from rcpo.commands.report import ReportRequest, report
from rcpo.report import foreign_sections, panels
from rcpo.report.figures import new_figure
from rcpo.report.foreign import HALOS, LLAMA_FACTORY, TRANSFORMERS, has_reference, origin_of
from rcpo.report.foreign_sections import headline, unknowns
from rcpo.report.runs import Status, find_runs, read_runs


def state(folder: Path, logged: list[dict[str, Any]], max_steps: int) -> Path:
    """A folder as transformers' Trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    content = {"max_steps": max_steps, "global_step": logged[-1]["step"], "log_history": logged}
    (folder / "trainer_state.json").write_text(json.dumps(content))
    return folder


def dpo(steps: int, beta: float = 0.1) -> list[dict[str, Any]]:
    """Winners fall by 1 nat a step from −20, losers by 3 from −30, against a reference that stays."""
    logged: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        winner, loser = -1.0 * (step - 1), -3.0 * (step - 1)
        logged.append({
            "step": step, "epoch": step / steps, "loss": 0.6, "grad_norm": 1.0, "learning_rate": 1e-5,
            "rewards/chosen": beta * winner, "rewards/rejected": beta * loser,
            "rewards/margins": beta * (winner - loser), "rewards/accuracies": 1.0,
            "logps/chosen": -20 + winner, "logps/rejected": -30 + loser,
        })  # fmt: skip
    logged.append({"step": steps, "epoch": 1.0, "eval_loss": 0.5, "eval_rewards/chosen": -0.5,
                   "eval_rewards/rejected": -1.5, "eval_rewards/accuracies": 0.75})  # fmt: skip
    return [*logged, {"step": steps, "train_runtime": 9.0, "train_loss": 0.55}]


def test_trl_and_llama_factory_leave_the_same_file(tmp_path: Path) -> None:
    folder = state(tmp_path / "out", dpo(11), max_steps=11)
    assert origin_of(folder) == TRANSFORMERS
    (folder / "trainer_log.jsonl").write_text("")
    assert origin_of(folder) == LLAMA_FACTORY
    [run] = read_runs([folder])
    assert run.column("rewards/chosen").tolist() == pytest.approx([-0.1 * step for step in range(11)])
    assert run.last_step == run.planned_steps == 11 and run.status is Status.FINISHED
    assert [part.tolist() for part in run.held_out("rewards/rejected")] == [[11.0], [-1.5]]
    assert run.evaluation["eval/rewards/accuracies"] == 0.75
    # the first and the last tenth of 11 rows are one row each: 0 and −1.0, 0 and −3.0, the margin 2.0
    assert headline(run) == (
        "The winner's reward went from 0.00 to −1.00, the loser's from 0.00 to −3.00; the margin is 2.00. "
        "A reward below 0 means that the winner is less likely than under the reference."
    )
    texts = " ".join(unknowns(run))
    assert "the log does not hold β" in texts and "The incentive ratio" in texts
    assert "What holds on unseen pairs" not in texts and "are not logged" not in texts


def test_the_last_checkpoint_stands_for_a_run_that_was_killed(tmp_path: Path) -> None:
    for step in (2, 10):
        state(tmp_path / "out" / f"checkpoint-{step}", dpo(step)[:step], max_steps=20)
    assert find_runs(tmp_path) == [tmp_path / "out"]
    [run] = read_runs([tmp_path])
    assert (run.last_step, run.status) == (10, Status.ENDED)
    assert "What holds on unseen pairs" in " ".join(unknowns(run))


def test_a_run_whose_last_steps_were_not_logged_is_finished(tmp_path: Path) -> None:
    """logging_steps=10 of max_steps=25, and an evaluation in between, which is not drawn at the end."""
    folder = state(tmp_path / "out", [*dpo(20)[9:20:10], {"step": 15, "eval_rewards/chosen": -0.5}], 25)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": 25}))
    [run] = read_runs([folder])
    assert (run.last_step, run.status) == (20, Status.FINISHED)
    (axes,) = new_figure(3).subplots(1, 1, squeeze=False)[0]
    panels.rewards(axes, [run], 1)
    assert [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "D"] == [[15.0], []]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": 20}))
    assert read_runs([folder])[0].status is Status.ENDED


def test_rewards_without_a_reference_are_told_apart() -> None:
    simpo = [{"rewards/chosen": -2.0 * n, "rewards/rejected": -3.0 * n,
              "logps/chosen": -1.0 * n, "logps/rejected": -1.5 * n} for n in (1, 2, 3)]  # fmt: skip
    assert has_reference(simpo) is False
    assert has_reference(dpo(3)[:3]) is True
    assert has_reference([{"rewards/chosen": 1.0, "rewards/rejected": 2.0}] * 5) is None


def test_dynamics_that_rcpos_trainer_logs_are_shown(tmp_path: Path) -> None:
    logged = [row | {"rc/alpha": 1.1, **{k: v for k, v in own.items() if k.startswith("dynamics/")}}
              for row, own in zip(dpo(3), rows(3))]  # fmt: skip
    [run] = read_runs([state(tmp_path / "out", logged, max_steps=3)])
    assert "The incentive ratio" not in " ".join(unknowns(run))


HALOS_LOG = """Making experiment directory
train stats after 32 examples: {'rewards_train/chosen': '-0.02', 'rewards_train/rejected': '-0.01', \
'rewards_train/accuracies': '0.46', 'logps_train/chosen': '-319.18', 'logps_train/rejected': '-284.89', \
'loss/train': '0.70236', 'counters/examples': '32'}
skipping logging after 64 examples to avoid logging too frequently
train stats after 96 examples: {'rewards_train/chosen': '-0.30', 'rewards_train/rejected': '-0.70', \
'logps_train/chosen': '-322.18', 'logps_train/rejected': '-291.89', 'loss/train': '0.5', 'grad_norm': 'nan'}
train stats after 128 examples: {'rewards_train/ch
"""


def halos(folder: Path) -> Path:
    (folder / "step-96").mkdir(parents=True)
    tree = "local_run_dir: /somewhere/run\nmodel:\n  batch_size: 32\nloss:\n  beta: 0.1\n"
    (folder / "config.yaml").write_text(tree)
    (folder / "dpo.log").write_text(HALOS_LOG)
    metrics = {"rewards_eval/chosen": -0.25, "rewards_eval/rejected": -0.5, "loss/eval": 0.6, "counter": 96}
    (folder / "step-96" / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_halos_prints_its_training_and_saves_its_evaluations(tmp_path: Path) -> None:
    folder = halos(tmp_path / "run")
    assert origin_of(folder) == HALOS
    [run] = read_runs([folder])
    assert run.steps.tolist() == [1, 3]  # 32 and 96 examples in batches of 32
    assert run.column("rewards/margins").tolist() == pytest.approx([-0.01, 0.40])
    assert run.evaluation == {
        "eval/rewards/chosen": -0.25, "eval/rewards/rejected": -0.5, "eval/loss": 0.6
    }  # fmt: skip
    assert any("loss.beta=0.1" in text for text in unknowns(run))


def test_a_run_of_rcpo_is_not_another_tools(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", settings(), rows(3), evaluation(-0.1, -0.5))
    assert origin_of(own) is None and read_runs([own])[0].origin == ""


def test_one_page_shows_runs_of_several_tools(tmp_path: Path) -> None:
    state(tmp_path / "trl", dpo(4), max_steps=4)
    halos(tmp_path / "halos")
    write_run(tmp_path / "own", settings(), rows(3), evaluation(-0.1, -0.5))
    page = report(ReportRequest([tmp_path])).read_text()
    for text in ("trl: TRL or another Trainer", "halos: HALOs", "Margin of the rewards", "Held out"):
        assert text in page
    alone = report(ReportRequest([tmp_path / "trl"])).read_text()
    assert "What this log cannot tell" in alone and "training.png" not in alone


def test_a_log_without_rewards_says_so(tmp_path: Path) -> None:
    [run] = read_runs([state(tmp_path / "sft", [{"step": 1, "loss": 2.0}], max_steps=1)])
    assert "no rewards of the two sides are logged" in headline(run)
    assert "neither rewards nor log-probs" in foreign_sections.of_foreign(run).sections[0].blocks[0].text
