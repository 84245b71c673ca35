"""The files that `rcpo report` writes: self-contained, escaped, themed, quick, whatever the runs are like."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_folders import evaluation, rows, settings, write_run, write_sweep
from test_report_numbers import LOSERS, WINNERS, probes

from rcpo.commands.report import ReportRequest, report, watch
from rcpo.errors import ConfigError

EVIL = "<script>alert('x')</script>\"|$\\frac{1}{2}$`&amp;"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects elements, attributes and text; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[str(value)] += 1
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(*folders: Path) -> tuple[str, Page]:
    text = report(ReportRequest(folders)).read_text()
    return text, Page(text)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    folder = write_sweep(tmp_path_factory.mktemp("made") / "sweep", seeds=2)
    for run in folder.iterdir():
        probes(run, WINNERS, LOSERS)
    return folder, *page_of(folder)


def test_a_sweep_has_its_figures_tables_and_headline(sweep: tuple[Path, str, Page]) -> None:
    folder, _, page = sweep
    assert (folder / "report.html").exists()
    # the overview, then training, fans and masses of two contrasts, and downstream scores
    assert page.counts["svg"] == 8
    assert "8 runs: 8 finished" in page.words
    assert "The largest gain: on average RC kept the winner: −0.01 against −0.48 nats per token" in page.words
    assert "the loser went to −0.60 against −0.60 (dpo reduction=mean, 2 seeds)." in page.words
    for heading in (
        "At a glance",
        "Training",
        "Pair by pair",
        "Downstream over dynamics",
        "Runs",
        "Settings",
    ):
        assert heading in page.words


def test_the_page_needs_nothing_else(sweep: tuple[Path, str, Page]) -> None:
    _, text, page = sweep
    assert all(link.startswith("#") for link in page.links)
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\"'\s<]*", text))
    assert addresses <= {"http://www.w3.org/1999/xlink"}  # a namespace, never fetched
    assert "@import" not in text and "url(http" not in text
    assert page.counts["script"] == 0


def test_figures_follow_the_colour_scheme(sweep: tuple[Path, str, Page]) -> None:
    _, text, _ = sweep
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert drawings and not re.search(r"#[0-9a-f]{6}\b", "".join(drawings))
    used = set(re.findall(r"var\(--(\w+)\)", text))
    light, dark = (set(re.findall(r"--(\w+):", block)) for block in re.findall(r":root \{(.*?)\}", text))
    assert {"winner", "loser", "band"} <= used <= light == dark
    assert "font-family: '" not in "".join(drawings)


def test_figures_share_no_ids(sweep: tuple[Path, str, Page]) -> None:
    _, _, page = sweep
    assert max(page.ids.values()) == 1


def test_what_comes_from_data_is_text(tmp_path: Path) -> None:
    tree = settings(objective=EVIL, objective__beta=EVIL)
    folder = write_run(tmp_path / "run", tree, rows(3), evaluation(-0.5, -0.6), finished=False)
    (folder / "rcpo.log").write_text(f"RuntimeError: {EVIL}\n")
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    sample = {"step": 1, "kind": "greedy", "prompt": EVIL, "text": EVIL, "chosen": EVIL, "rejected": None}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    write_run(tmp_path / "<b>bold</b> other", settings(objective="simpo"), rows(3))
    for folders in ([folder], [tmp_path]):
        text = report(ReportRequest(folders, markdown=True)).read_text()
        assert "<script" not in text and "<b>" not in text
        assert EVIL in Page(text).words
        markdown = (folders[0] / "report.md").read_text()
        assert "<script" not in markdown and "\\|" in markdown
        tables = [line for line in markdown.splitlines() if line.startswith("|")]
        assert tables and all(line.endswith("|") for line in tables)


CASES = {
    "no step": [],
    "one step": rows(1),
    "nulls": [{**dict.fromkeys(row), "step": row["step"], "nonfinite": 9} for row in rows(3)],
    "one known step": [rows(1)[0], {**dict.fromkeys(rows(1)[0]), "step": 2}],
    "calibrated": rows(4, alpha=1.2),
    "no dynamics": [{"step": s, "loss": 0.1, "logps/chosen": -1.0, "logps/rejected": -2.0} for s in (1, 2)],
    "no loser": [{"step": s, "loss": 0.1, "logps/chosen": -1.0} for s in (1, 2)],
    "negative cosine": [{**row, "dynamics/score_cosine": -0.1} for row in rows(3)],
    "enormous": [{**row, "logratios/chosen": -1e37, "grad_norm": 1e38} for row in rows(3)],
}


@pytest.mark.filterwarnings("error")
def test_any_run_gives_a_page_alone_and_among_others(tmp_path: Path) -> None:
    for name, metrics in CASES.items():
        alpha = any("rc/alpha" in row for row in metrics)
        run = write_run(tmp_path / "all" / name, settings(rc=alpha), metrics, finished=name != "no step")
        os.utime(run / "config.yaml", (0, 0))
        _, page = page_of(tmp_path / "all" / name)
        assert page.counts["svg"] == (0 if name == "no step" else 1), name
        assert not re.search(r"\bnan\b|\binf\b", page.words), name
    (write_run(tmp_path / "all" / "torn", settings(), rows(2)) / "config.yaml").write_text("a: [")
    _, page = page_of(tmp_path / "all")
    assert "10 runs: 9 finished, 1 ended early" in page.words


def test_figures_of_like_labels_have_names_of_their_own(tmp_path: Path) -> None:
    for index, objective in enumerate(("a/b", "a?b", "a_" + 300 * "b", "a_" + 300 * "b" + "c") * 2):
        write_run(tmp_path / str(index), settings(objective, rc=index > 3), rows(2))
    report(ReportRequest([tmp_path], figures="svg"))
    files = [path.name for path in (tmp_path / "report_figures").glob("training-*")]
    assert len(files) == 4 and max(map(len, files)) < 100
    assert max(Page((tmp_path / "report.html").read_text()).ids.values()) == 1


def test_two_runs_are_shown_beside_each_other_in_the_folder_that_holds_both(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", settings(), rows(5))
    second = write_run(tmp_path / "second", settings("simpo"), rows(5))
    page = report(ReportRequest([first, second]))
    assert page == tmp_path / "report.html"
    assert (
        Page(page.read_text()).counts["svg"] == 2
    )  # training side by side, and the share of steps in the band


def test_markdown_and_figures_are_written_on_request(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings(), rows(5), evaluation(-0.5, -0.6))
    page = report(ReportRequest([run], tmp_path / "out" / "dpo.html", markdown=True, figures="pdf"))
    figures = tmp_path / "out" / "dpo_figures"
    assert page.exists() and [path.name for path in figures.iterdir()] == ["training.pdf"]
    assert (figures / "training.pdf").read_bytes()[:4] == b"%PDF"
    markdown = (tmp_path / "out" / "dpo.md").read_text()
    assert "![training](dpo_figures/training.pdf)" in markdown
    assert markdown.startswith("# On average the winner fell with the loser: likelihood displacement")
    report(ReportRequest([run], tmp_path / "out" / "dpo.html", figures="png"))
    assert (figures / "training.png").read_bytes()[1:4] == b"PNG"


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings(), rows(5))
    first = (
        report(ReportRequest([run], figures="svg")).read_bytes(),
        (run / "report_figures/training.svg").read_bytes(),
    )
    again = (
        report(ReportRequest([run], figures="svg")).read_bytes(),
        (run / "report_figures/training.svg").read_bytes(),
    )
    assert first == again


def test_a_folder_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings(), rows(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="use --output"):
        report(ReportRequest([run], tmp_path / "file" / "report.html"))


def test_a_watched_page_follows_the_run_and_then_stands_still(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings(train__max_steps=3), rows(1), finished=False)
    page = run / "report.html"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watching = threading.Thread(target=watch, args=(ReportRequest([run]), 0.2), daemon=True)
        watching.start()
        _wait_for(page, "step 1 of 3")
        assert "location.reload()" in page.read_text() and Page(page.read_text()).counts["script"] == 1
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(rows(2)[1]) + "\n")
        _wait_for(page, "step 2 of 3")
        (run / "finished.json").write_text("{}")
    watching.join(120)
    assert not watching.is_alive()
    assert "Finished after 2 steps" in page.read_text() and "reload" not in page.read_text()


def test_a_watched_sweep_ends_when_nothing_more_comes(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0", settings(), rows(2))
    watching = threading.Thread(
        target=watch, args=(ReportRequest([tmp_path / "sweep"]), 0.1), kwargs={"quiet": 6}, daemon=True
    )
    watching.start()
    _wait_for(tmp_path / "sweep" / "report.html", "Finished after 2 steps")
    write_run(
        tmp_path / "sweep" / "1", settings(seed=2), rows(2)
    )  # the next run, before it was quiet for long
    _wait_for(tmp_path / "sweep" / "report.html", "2 of 2 runs are finished")
    watching.join(120)
    assert not watching.is_alive()


def _wait_for(page: Path, text: str) -> None:
    for _ in range(2400):
        if page.exists() and text in page.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{text!r} never came")


def test_the_command_needs_no_torch_and_refuses_in_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings(), rows(2))
    probes(run, WINNERS, LOSERS)
    program = (
        "import sys; from rcpo.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert not {'torch', 'transformers', 'hydra', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "report"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"rcpo: wrote {run / 'report.html'}\n"), done.stderr
    refused = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "nowhere is not a folder" in refused.stderr


@pytest.mark.slow
def test_twenty_four_runs_of_two_thousand_steps_take_less_than_ten_seconds(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", seeds=6, steps=2000)
    before = os.times()
    command = [sys.executable, "-m", "rcpo.cli", "report", str(tmp_path / "sweep")]
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()  # the processor's seconds: a busy machine's clock says nothing
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 10
