"""The Tracker: a row to metrics.jsonl, a real offline wandb run and the terminal, on the main rank alone."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rcpo.config.schema import RunConfig, WandbConfig
from rcpo.errors import ConfigError
from rcpo.runs.display import LiveDisplay, PlainDisplay, nice_stride, open_display
from rcpo.runs.tracker import Tracker, evaluation_line, exit_code_of


def config(mode: str = "disabled") -> RunConfig:
    named = WandbConfig(
        mode=mode, project="rcpo-tests", group="all", tags=["a", "b"], notes="as planned", job_type="train"
    )
    return RunConfig(seed=7, wandb=named)


def row(step: int, **more: Any) -> dict[str, Any]:
    """A row as the trainer makes it."""
    names = {"loss": 1 / step, "rewards/margins": 0.25, "logratios/chosen": -0.03, "logratios/rejected": -1.2}
    return {"step": step, **names, "rc/alpha": 1.5, "tokens_per_second": 12345.6, **more}


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_keep_their_names_and_nan_is_null(tmp_path: Path) -> None:
    with Tracker(tmp_path, config(), 3, True, console=plain()) as tracker:
        tracker.log({"step": 1, "loss": 0.5, "dynamics/in_band": True, "dynamics/band_upper": None})
        tracker.log({"step": 2, "loss": math.nan})
    assert rows_of(tmp_path) == [
        {"step": 1, "loss": 0.5, "dynamics/in_band": True, "dynamics/band_upper": None},
        {"step": 2, "loss": None, "nonfinite": 1},
    ]


def test_an_evaluation_joins_the_row_of_its_step(tmp_path: Path) -> None:
    console = plain()
    with Tracker(tmp_path, config(), 3, True, console=console) as tracker:
        tracker.evaluation(0, {"eval/loss": 0.75, "eval/loss/low": 0.5, "eval/loss/high": 1.0})
        tracker.log({"step": 1, "loss": 0.5})
        tracker.evaluation(2, {"eval/loss": math.inf})
        tracker.log({"step": 2, "loss": math.nan})
        tracker.evaluation(2, {"eval/exact_match": 0.5})  # too late for the row: no second one
        tracker.evaluation(3, {"eval/loss": 0.25})
    assert rows_of(tmp_path) == [
        {"step": 0, "eval/loss": 0.75, "eval/loss/low": 0.5, "eval/loss/high": 1.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "eval/loss": None, "nonfinite": 2},
        {"step": 3, "eval/loss": 0.25},
    ]
    assert "evaluation at step 0: loss 0.75\n" in text_of(console)
    assert "evaluation at step 2: exact_match 0.5\n" in text_of(console)


def test_a_resumed_run_takes_its_steps_again_and_a_fresh_one_starts_empty(tmp_path: Path) -> None:
    with Tracker(tmp_path, config(), 4, True, console=plain()) as tracker:
        for step in (1, 2, 3):
            tracker.log({"step": step, "loss": float(step)})
    with Tracker(tmp_path, config(), 4, True, resume_step=2, console=plain()) as tracker:
        tracker.log({"step": 3, "loss": 30.0})
    assert [(r["step"], r["loss"]) for r in rows_of(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    with Tracker(tmp_path, config(), 4, True, console=plain()) as tracker:
        tracker.log({"step": 1, "loss": 9.0})
    assert rows_of(tmp_path) == [{"step": 1, "loss": 9.0}]


def test_a_step_is_never_logged_twice(tmp_path: Path) -> None:
    with Tracker(tmp_path, config(), 4, True, console=plain()) as tracker:
        tracker.log({"step": 1})
        with pytest.raises(AssertionError, match="step 1 was logged after step 1"):
            tracker.log({"step": 1})


def run_alone(code: str, folder: Path) -> None:
    """Run Python that makes trackers in `folder`, in a process that has imported nothing else."""
    program = (
        "import sys; from pathlib import Path\n"
        "from rcpo.config.schema import RunConfig, WandbConfig\n"
        "from rcpo.runs.tracker import Tracker\n" + code
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_ranks_write_nothing_and_never_import_wandb(tmp_path: Path) -> None:
    code = (
        "config = RunConfig(wandb=WandbConfig(mode='offline'))\n"
        "with Tracker(Path(sys.argv[1]), config, 2, False) as t:\n"
        "    t.log({'step': 1}); t.evaluation(1, {'eval/loss': 1.0}); t.message('x')\n"
        "config.wandb.mode = 'disabled'\n"
        "with Tracker(Path(sys.argv[1]) / 'quiet', config, 2, True) as t:\n"
        "    t.log({'step': 1})\n"
        "assert not {'wandb', 'torch'} & set(sys.modules)\n"
    )
    run_alone(code, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quiet"]


def test_wandb_starts_without_the_modules_of_its_launch_agent(tmp_path: Path) -> None:
    code = (
        "with Tracker(Path(sys.argv[1]), RunConfig(wandb=WandbConfig(mode='offline')), 2, True) as t:\n"
        "    t.log({'step': 1})\n"
        "assert 'wandb' in sys.modules and 'wandb.sdk.launch.agent' not in sys.modules\n"
    )
    run_alone(code, tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def wandb_records(run_dir: Path) -> list[Any]:
    """The records of every offline run in the folder, oldest first.

    A `.wandb` file is a LevelDB log after a header of seven bytes: blocks of 32 KiB, in them chunks of
    crc (4), length (2), type (1: whole, 2 and 3: more follows, 4: last) and payload; a block's tail of under
    7 bytes is void.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        data, offset, payload = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while offset + 7 <= len(data):
            if offset % 32768 > 32768 - 7:
                offset += 32768 - offset % 32768
            length, kind = struct.unpack_from("<HB", data, offset + 4)
            payload += data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):
                records.append(Record.FromString(payload))
                payload = b""
    return records


def test_a_real_offline_wandb_run_with_one_id_over_a_resume(tmp_path: Path) -> None:
    with Tracker(tmp_path, config("offline"), 3, True, console=plain()) as tracker:
        tracker.log({"step": 1, "loss": 0.5, "dynamics/in_band": True, "dynamics/band_upper": None})
        tracker.evaluation(2, {"eval/loss": 0.25})
        tracker.log({"step": 2, "loss": math.nan})
        tracker.samples(2, [{"prompt": "1+1=", "text": "2"}, {"prompt": "1+2=", "text": "4"}])
    time.sleep(1.1)  # wandb names a run's folder by the second
    with (
        pytest.raises(SystemExit),
        Tracker(tmp_path, config("offline"), 3, True, resume_step=1, console=plain()) as again,
    ):
        again.log({"step": 2, "loss": 0.25})  # wandb has that step already
        again.log({"step": 3, "loss": 0.125})
        raise SystemExit(75)
    records = wandb_records(tmp_path)
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    logged = [{key: value for key, value in items.items() if not key.startswith("_")} for items in history]
    table = next(items for items in logged if "samples" in items)
    logged.remove(table)
    assert logged == [
        {"step": 1, "loss": 0.5, "dynamics/in_band": 1},
        {"step": 2, "eval/loss": 0.25, "nonfinite": 1},
        {"step": 3, "loss": 0.125},
    ]
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    written = json.loads(file.read_text())
    assert table["step"] == 2 and written["columns"] == ["prompt", "text"]
    assert written["data"] == [["1+1=", "2"], ["1+2=", "4"]]
    assert (tmp_path / "wandb_step.txt").read_text() == "3\n"
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {identity} and {run.project for run in runs} == {"rcpo-tests"}
    shown = {(run.display_name, run.run_group, run.notes, run.job_type, *run.tags) for run in runs}
    assert shown == {(tmp_path.name, "all", "as planned", "train", "a", "b")}
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["seed"] == 7 and settings["train"]["batch_size"] == 32
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert exits == [0, 75]


def test_wandb_online_without_a_key_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login file there
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # and nobody to ask
    with pytest.raises(ConfigError, match=r"wandb\.mode=online.*wandb login.*wandb\.mode=offline"):
        Tracker(tmp_path, config("online"), 3, True, console=plain())


def test_exit_codes() -> None:
    assert [exit_code_of(error) for error in (None, SystemExit(75), SystemExit(None), SystemExit("no"))] == [
        0,
        75,
        0,
        1,
    ]
    assert exit_code_of(KeyboardInterrupt()) == 1


def test_plain_lines_are_aligned_and_thinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, config(), 200, True) as tracker:
        tracker.message("Reading [bold]pairs[/bold]")
        for step in range(1, 201):
            tracker.log(row(step))
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("step")]
    assert len(lines) == 21  # the first step, then every tenth
    assert len({len(line.split("  tok/s")[0].split(" left")[0]) for line in lines[1:]}) == 1
    assert re.match(
        r"step  10/200  loss    0\.1000  margin   \+0\.2500  log-ratio: winner    -0\.030  loser    -1\.200"
        r"  alpha     1\.500   12\.3k tok/s  +\d+:\d\d left",
        lines[1],
    )
    assert "Reading [bold]pairs[/bold]\n" in text and "\x1b" not in text


def test_the_live_display_shows_the_figures_and_leaves_messages(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with Tracker(tmp_path, config(), 40, True, resume_step=10, console=console) as tracker:
        tracker.log(row(20))
        tracker.message("Saved step 20")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text_of(console))
    for expected in (
        "20/40",
        "loss 0.0500",
        "margin +0.2500",
        "log-ratio: winner -0.030  loser -1.200",
        "α 1.500",
        "12.3k tok/s",
        "Saved step 20",
    ):
        assert expected in text
    assert text_of(console).rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_the_live_display_draws_winner_and_loser_on_one_scale() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    display = LiveDisplay(console, 3, 0)
    for step, (winner, loser, margin) in enumerate(((0.0, 0.0, 0.1), (None, -0.5, 0.2), (-0.1, -0.7, 0.3))):
        sides = {"logratios/chosen": winner, "logratios/rejected": loser}
        display.row(step, {**sides, "rewards/margins": margin})
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text_of(console))
    # on 0.7 nats and 7 steps up, −0.1 is level 6, −0.5 level 2
    assert "winner █ ▇  -0.700 to +0.000" in text
    assert "loser  █▃▁  -0.700 to +0.000" in text
    assert "margin ▁▅█  +0.100 to +0.300" in text
    assert max(map(len, text.splitlines())) <= 80


def test_charts_are_left_out_where_there_is_nothing_to_draw_or_draw_with() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    display = LiveDisplay(console, 3, 0)
    display.row(1, {"loss": 0.5, "rewards/margins": 0.0})
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text_of(console))
    assert "margin ▅" in text and "loser" not in text
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    plain_letters = LiveDisplay(Console(file=raw, force_terminal=True, _environ={"TERM": "xterm"}), 3, 0)
    plain_letters.row(1, row(1))
    plain_letters.close()
    raw.seek(0)
    assert "winner -0.030" in raw.read()


def test_log_probs_are_not_shown_as_log_ratios() -> None:
    console = plain()
    display = PlainDisplay(console, 2)
    display.row(1, {"logps/chosen": -12.5, "logps/rejected": -14.25})
    display.row(2, {"logps/chosen": -12.5, "logps/rejected": -14.25, "logratios/rejected": -0.5})
    first, second = text_of(console).splitlines()
    assert "log-prob: winner   -12.500  loser   -14.250" in first and "log-ratio" not in first
    # one side's log-ratio never stands beside the other's log-prob
    assert "log-ratio: loser    -0.500" in second and "winner" not in second


def test_an_evaluation_of_nothing_names_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, config(), 2, True) as tracker:
        tracker.evaluation(1, {})
        tracker.log(row(1))
    text = capsys.readouterr().out
    assert "nothing is held out" in text and "data.eval_fraction" in text and "evaluation at step" not in text


def test_an_evaluation_line_leaves_intervals_to_the_row() -> None:
    values = {"eval/loss": 0.75, "eval/loss/low": 0.5, "eval/logps/chosen": -3.0, "eval/exact_match": None}
    assert evaluation_line(4, values) == "evaluation at step 4: loss 0.75"


def test_slow_steps_are_shown_once_a_minute() -> None:
    seconds = [500.0]  # the time before the first row is not part of the rate
    console = plain()
    display = PlainDisplay(console, 10_000, clock=lambda: seconds[0])
    for step in range(1, 11):
        seconds[0] += 25.0
        display.row(step, {"step": step})
    shown = [int(found) for found in re.findall(r"^step +(\d+)/", text_of(console), re.MULTILINE)]
    assert shown == [1, 4, 7, 10]  # 25 s, then the first row at least 60 s later
    assert "69:22:30 left" in text_of(console)  # after step 10: 9,990 steps of 25 s = 249,750 s


@pytest.mark.parametrize(
    ("total", "stride"), [(1, 1), (20, 1), (21, 2), (200, 10), (330, 20), (1000, 50), (2001, 200)]
)
def test_strides_are_round(total: int, stride: int) -> None:
    assert nice_stride(total, 20) == stride


def test_the_display_fits_the_console() -> None:
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(open_display(dumb, 5, 0), PlainDisplay)
    live = open_display(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}), 5, 0)
    assert isinstance(live, LiveDisplay)
    live.close()


def test_a_console_that_cannot_encode_gets_question_marks() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), force_terminal=False)
    PlainDisplay(console, 5).message("mean log-ratio −0.03")
    assert raw.getvalue() == b"mean log-ratio ?0.03\n"
