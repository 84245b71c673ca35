"""Sentences and tables for runs whose numbers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_folders import evaluation, rows, settings, write_run, write_sweep

from rcpo.report import appendix, sections, tables, words
from rcpo.report.probes import Crossings
from rcpo.report.runs import Run, read_run, read_runs
from rcpo.runs.comparison import conditions, contrasts


def a_run(folder: Path, **given: Any) -> Run:
    name = folder.name
    return read_run(write_run(folder, given.pop("tree", settings()), **given), name)


def pair(folder: Path, base: float, calibrated: float, seeds: int = 1) -> words.Contrast:
    for rc, winner in ((False, base), (True, calibrated)):
        for seed in range(1, seeds + 1):
            shift = 0.001 * seed * (1 if rc else 2)
            write_run(
                folder / f"{rc}-{seed}", settings(rc=rc, seed=seed), [], evaluation(winner - shift, -0.6)
            )
    (found,) = contrasts(conditions([run.summary for run in read_runs([folder])]))
    return found


@pytest.mark.parametrize(
    ("base", "calibrated", "beginning"),
    [
        (-0.51, -0.03, "RC kept the winner: −0.03 against −0.51"),
        (-0.08, -0.03, "the winner stayed within 0.1 with and without RC: −0.03 against −0.08"),
        (-0.51, -0.20, "RC slowed the winner's fall, it did not stop it: −0.20 against −0.51"),
        (-0.20, -0.51, "RC did not keep the winner: −0.51 against −0.20"),
        (-0.12, -0.09, "RC changed the winner by less than 0.1: −0.09 against −0.12"),
        (-0.51, -0.48, "RC changed the winner by less than 0.1: −0.48 against −0.51"),
        (0.30, 0.05, "the winner fell neither with nor without RC: 0.05 against 0.30"),
        (-0.30, 0.40, "RC raised the winner: 0.40 against −0.30"),
    ],
)
def test_a_contrast_says_whether_the_winner_was_kept(
    tmp_path: Path, base: float, calibrated: float, beginning: str
) -> None:
    found = pair(tmp_path, base, calibrated)
    beginning = f"On average {beginning} nats per token"
    loser = "; the loser went to −0.60 against −0.60"
    assert words.headline_of_contrasts([found]) == f"{beginning}{loser} (dpo reduction=mean, 1 seed)."
    expected = f"dpo reduction=mean: {beginning}{loser}; exact match 90 % against 90 % (1 seed)."
    assert words.sentence_of_contrast(found) == expected


def test_a_kept_mean_over_falling_winners_is_told(tmp_path: Path) -> None:
    for rc, winner, share in ((False, -0.5, 0.9), (True, -0.03, 0.7)):
        values = evaluation(winner, -0.6) | {"eval/winner_fell": share}
        write_run(tmp_path / str(rc), settings(rc=rc), [], values)
    found = contrasts(conditions([run.summary for run in read_runs([tmp_path])]))
    assert words.headline_of_contrasts(found).startswith(
        "On average RC kept the winner: −0.03 against −0.50 nats per token; the winner fell in 70 % of the "
    )


def test_several_seeds_are_said_to_be_clear_or_not(tmp_path: Path) -> None:
    # differences 0.481, 0.482, 0.483: far from 0
    assert "(dpo reduction=mean, 3 seeds)" in words.headline_of_contrasts(
        [pair(tmp_path / "a", -0.51, -0.03, seeds=3)]
    )
    # differences 0.0012 and 0.0022: mean 0.0017, half-width 12.7 · 0.0005
    doubtful = words.headline_of_contrasts([pair(tmp_path / "b", -0.0302, -0.03, seeds=2)])
    assert "(dpo reduction=mean, 2 seeds; the difference's interval holds 0)" in doubtful


def test_the_headline_counts_how_many_comparisons_agree(tmp_path: Path) -> None:
    found = contrasts(conditions([run.summary for run in read_runs([write_sweep(tmp_path / "sweep")])]))
    expected = (
        "In 2 of 2 comparisons the mean winner fell without RC and not with it. The largest gain: on average "
        "RC kept the winner: −0.01 against −0.48 nats per token; the loser went to −0.60 against −0.60 "
        "(dpo reduction=mean, 3 seeds)."
    )
    assert words.headline_of_contrasts(found) == expected


def test_a_run_says_where_it_stands(tmp_path: Path) -> None:
    done = a_run(tmp_path / "done", metrics=rows(2), evaluation=evaluation(-0.5, -0.6))
    assert words.headline_of_run(done).startswith("On average the winner fell with the loser")
    assert "(mean log-ratio −0.50 [−0.52, −0.48] nats per token; the loser's −0.60" in words.headline_of_run(
        done
    )
    silent = a_run(tmp_path / "silent", metrics=rows(2))
    # θ after one step is 0.1 · (0.2, −0.4), so the winner's mean over both rows is 0.01, the loser's −0.02
    expected = (
        "Finished after 2 steps, not evaluated; the winner at 0.01 and the loser at −0.02 "
        "(log-ratios, nats per token)."
    )
    assert words.headline_of_run(silent) == expected


def test_a_failed_run_says_where_and_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings(train__max_steps=30), rows(2), finished=False)
    (folder / "rcpo.log").write_text("Traceback\nRuntimeError: out of memory.\n")
    assert words.headline_of_run(read_run(folder, "run")) == "Ended early, at step 2 of 30: out of memory."


def test_lost_values_skips_and_clamps_are_noted(tmp_path: Path) -> None:
    metrics = rows(3, alpha=1.0)
    metrics[1] |= {"loss": None, "nonfinite": 2}
    metrics[2] |= {"rc/skipped": 1, "rc/clamped": 4}
    notes = words.warnings_of_run(a_run(tmp_path / "run", metrics=metrics, tree=settings(rc=True)))
    assert [note.split(" ")[0] for note in notes] == ["2", "1", "4"]
    assert words.warnings_of_run(a_run(tmp_path / "clean", metrics=rows(3))) == []


def test_conditions_and_contrasts_become_tables(tmp_path: Path) -> None:
    found = conditions([run.summary for run in read_runs([write_sweep(tmp_path / "sweep")])])
    table = tables.of_conditions(found)
    assert [row[:3] for row in table.rows] == [
        ("dpo reduction=mean rc=off", "3", "−0.480 ± 0.010"),
        ("dpo reduction=mean rc=on", "3", "−0.010 ± 0.010"),
        ("simpo rc=off", "3", "−0.180 ± 0.010"),
        ("simpo rc=on", "3", "−0.010 ± 0.010"),
    ]
    assert table.header[-1] == "steps in the band" and table.rows[0][-1] == "100 % ± 0"
    differences = tables.of_contrasts(contrasts(found))
    assert differences.rows[0][:3] == ("dpo reduction=mean", "3", "+0.470\n[+0.470, +0.470]")


def test_every_downstream_score_is_joined(tmp_path: Path) -> None:
    values = {
        "eval/exact_match": 0.5,
        "eval/judge/win_rate": 0.6,
        "eval/judge/win_rate/low": 0.5,
        "eval/judge/win_rate/high": 0.7,
        "eval/judge/examples": 40,
        "eval/judge/failed": 2,
        "eval/judge/kappa": 0.25,
        "eval/harness/gsm8k/exact_match,strict-match": 0.25,
        "eval/harness/gsm8k/exact_match,strict-match/stderr": 0.01,
        "eval/harness/wikitext/word_perplexity": 12.5,
        "eval/by_length/1-1/winner_fell": 0.5,
        "eval/by_length/16-31/winner_fell": 0.25,
        "eval/dynamics/score_cosine": 0.3,
        "eval/kl": 0.125,
    }
    titles = [(metric.title, metric.unit) for metric in tables.downstream([values])]
    assert titles == [
        ("exact match", "share"),
        ("judged win rate", "share"),
        ("gsm8k exact_match,strict-match", "share"),
        ("wikitext word_perplexity", ""),
    ]
    run = a_run(tmp_path / "run", metrics=rows(1), evaluation=values)
    main, judged, length, scores, dynamics = tables.held_out(run)
    assert list(main.rows) == [("exact match", "50 %"), ("KL to the reference per answer", "0.12")]
    assert list(length.rows) == [("1-1", "50 %"), ("16-31", "25 %")]
    assert list(judged.rows) == [
        ("win rate", "60 % [50 %, 70 %]"),
        ("Cohen's kappa of the orders", "0.25"),
    ]
    assert judged.caption.startswith("40 pairs of answers, both orders; 2 more without a verdict;")
    assert list(scores.rows)[:1] == [
        ("gsm8k exact_match,strict-match", "25 % ± 1.0"),
    ]
    assert list(dynamics.rows) == [("score_cosine", "0.300")]


def test_settings_show_what_differs(tmp_path: Path) -> None:
    runs = read_runs([write_sweep(tmp_path / "sweep", seeds=1)])
    differing, shared = appendix.settings_of_runs(runs)
    assert differing.header == ("run", "objective.name", "rc.enabled")
    assert differing.rows[1] == ("dpo_rc-True_seed-1", "dpo", "true")
    assert ("optim.lr", "0.1") in shared.rows and "rc.enabled" not in dict(shared.rows)  # type: ignore[arg-type]
    changed, _ = appendix.settings_of_run(runs[1])
    assert ("rc.enabled", "true", "false") in changed.rows
    assert "objective.beta" not in [row[0] for row in changed.rows]  # 0.1 is the default


def test_environments_that_differ_are_shown_apart(tmp_path: Path) -> None:
    runs = read_runs([write_sweep(tmp_path / "sweep", seeds=1)])
    (same,) = appendix.environment(runs)
    assert ("packages.torch", "2.13.0") in same.rows
    path = runs[0].folder / "environment.json"
    path.write_text(path.read_text().replace("2.13.0", "2.14.0"))
    varied, _ = appendix.environment(read_runs([tmp_path / "sweep"]))
    assert varied.header == ("run", "packages.torch")
    assert [row[1] for row in varied.rows] == ["2.14.0", "2.13.0", "2.13.0", "2.13.0"]


def test_a_comparison_of_different_code_is_noted(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", seeds=1)
    assert sections.document_of(read_runs([tmp_path / "sweep"]), "sweep").notes == []
    for number, folder in enumerate(sorted((tmp_path / "sweep").iterdir())):
        record = {"hostname": f"n{number}", "git": {"commit": str(number // 2), "dirty": False}}
        (folder / "environment.json").write_text(json.dumps(record))
    assert sections.document_of(read_runs([tmp_path / "sweep"]), "sweep").notes == [
        "The runs were made by different code (git.commit): see Environment."
    ]


def test_samples_show_first_last_and_between(tmp_path: Path) -> None:
    def sample(step: int, **more: Any) -> dict[str, Any]:
        return {"step": step, "prompt": "1+1=", "chosen": "2", "rejected": "3", "text": f"at {step}", **more}

    run = a_run(tmp_path / "run", metrics=rows(1))
    samples = [sample(step, correct=step > 20) for step in range(0, 70, 10)]
    samples += [sample(60, kind="sample", text="drawn"), {"kind": "greedy"}]
    (table,) = appendix.samples_of_run(replace(run, samples=samples))
    assert table.header == ("prompt", "chosen", "rejected", "step 0", "step 20", "step 40", "step 60")
    assert list(table.rows) == [("1+1=", "2", "3", "at 0 ✗", "at 20 ✗", "at 40 ✓", "at 60 ✓")]
    assert appendix.samples_of_run(run) == []


def test_the_best_of_several_runs_is_named_with_its_spread_and_the_worst(tmp_path: Path) -> None:
    for name, accuracy in (("ipo", 0.58), ("simpo", 0.75)):
        values = evaluation(-0.1, -0.6) | {
            "eval/rewards/accuracies": accuracy,
            "eval/rewards/accuracies/low": accuracy - 0.25,
            "eval/rewards/accuracies/high": accuracy + 0.25,
        }
        del values["eval/exact_match"]
        write_run(tmp_path / name, settings(name), [], values)

    def headline() -> str:
        runs = read_runs([tmp_path])
        return words.headline_of_runs(runs, sections.extremes(conditions([run.summary for run in runs])))

    assert headline() == (
        "2 of 2 runs are finished; preference accuracy goes from 58 % [33 %, 83 %] (ipo) to "
        "75 % [50 %, 100 %] (simpo)."
    )
    write_run(tmp_path / "seed2", settings("simpo", seed=2), [], values | {"eval/rewards/accuracies": 0.71})
    assert headline().endswith("(ipo) to 73 % ± 3 (simpo).")


def test_samples_leave_out_the_lines_that_all_prompts_begin_with(tmp_path: Path) -> None:
    def sample(question: str, answer: str) -> dict[str, Any]:
        prompt = f"system\nBe kind\nuser\n{question}\nassistant\n"
        return {"step": 0, "kind": "greedy", "prompt": prompt, "chosen": "c", "rejected": "r", "text": answer}

    run = replace(
        a_run(tmp_path / "run", metrics=rows(1)),
        samples=[sample("Who is it?", "me"), sample("Who else?", "you")],
    )
    [table] = appendix.samples_of_run(run)
    assert table.caption == "All prompts begin with: system Be kind user"
    assert table.rows == [
        ("Who is it?\nassistant\n", "c", "r", "me"), ("Who else?\nassistant\n", "c", "r", "you"),
    ]  # fmt: skip
    [alone] = appendix.samples_of_run(replace(run, samples=run.samples[:1]))
    assert alone.caption == "" and alone.rows[0][0].startswith("system\nBe kind")


def test_held_out_means_have_names_that_a_reader_knows(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", metrics=rows(1), evaluation=evaluation(-0.5, -0.6) | {"eval/own": 1.0})
    names = [row[0] for row in tables.held_out(run)[0].rows]
    assert names[-3:] == ["own", "winner's log-ratio, nats per token", "loser's log-ratio, nats per token"]


def test_crossings_are_counted_in_words() -> None:
    found = Crossings(pairs=8, winner_ever=0, winner_returned=0, winner_ended=0, loser_ended=1)
    assert words.about_crossings("dpo", found) == (
        "dpo: of 8 probe pairs, no winners were at some probe more than 0.01 nats below the start. 1 loser "
        "ended above the start."
    )
    found = replace(found, winner_ever=1, winner_returned=1, loser_ended=0)
    assert "1 winner was at some probe" in words.about_crossings("dpo", found)
    ending = "1 came back and 0 ended there. No losers ended above the start."
    assert words.about_crossings("dpo", found).endswith(ending)
