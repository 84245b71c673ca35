"""How tokens are made and kept: limits over parts, what the user is told, turns, ranks; in this process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_dataset import TOKENIZER, pairs, write

from rcpo.config.data import DataConfig, train_sources
from rcpo.data import cache as keeping
from rcpo.data.cache import TokenCache, TokenRequest, _Progress
from rcpo.data.dataset import make_encoder
from rcpo.data.readers import ROWS
from rcpo.data.sources import find_source
from rcpo.data.tokens import META, Meta
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.system.files import Lock


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


Checked = list[tuple[str, int]]


def request(path: Path | str, checked: Checked | None = None, **changes: Any) -> TokenRequest:
    """The tokens of a file or folder; `checked` gets the place and length of each piece looked at."""
    config = DataConfig(name="pairs", path=str(path))
    (spec,) = train_sources(config)

    def check(encoder: Any, piece: Any, place: str) -> None:
        if checked is not None:
            checked.append((place, len(piece.numbers)))

    source = find_source(spec, None, print)
    wanted = TokenRequest(source, make_encoder(config, TOKENIZER), check, None, 1, False)
    return dataclasses.replace(wanted, **changes)


def fetch(cache: TokenCache, wanted: TokenRequest) -> list[str]:
    """The ids of the examples."""
    store, meta = cache.fetch(lambda: wanted)
    assert sum(meta.rows) == len(store)
    return list(store.ids)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Three files of three rows, of which each has one that cannot be used."""
    folder = tmp_path / "parts"
    for name in "abc":
        write(folder / f"{name}.jsonl", [*pairs(1), {"prompt": "p"}, *pairs(2, "r")])
    return folder


# --- limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "wanted", "dropped"),
    [
        (None, ["a:1", "a:3", "a:4", "b:1", "b:3", "b:4", "c:1", "c:3", "c:4"], 3),
        (1, ["a:1"], 0),  # the bad row behind it is not looked at
        (2, ["a:1", "a:3"], 1),
        (3, ["a:1", "a:3", "a:4"], 1),
        (4, ["a:1", "a:3", "a:4", "b:1"], 1),
        (9, ["a:1", "a:3", "a:4", "b:1", "b:3", "b:4", "c:1", "c:3", "c:4"], 3),
        (99, ["a:1", "a:3", "a:4", "b:1", "b:3", "b:4", "c:1", "c:3", "c:4"], 3),
    ],
)
def test_a_limit_counts_usable_rows_over_all_parts(
    limit: int | None, wanted: list[str], dropped: int, parts: Path
) -> None:
    store, meta = TokenCache(None, lambda _: None).fetch(lambda: request(parts, limit=limit, drop=True))
    assert list(store.ids) == [name.replace(":", ".jsonl:") for name in wanted]
    assert len(meta.rows) == 3  # parts that nothing is taken of count as well
    assert sum(count for _, count in meta.bad.values()) == dropped


def test_a_limit_may_end_in_the_middle_of_a_later_piece(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", pairs(ROWS + 5))
    ids = fetch(TokenCache(None, lambda _: None), request(path, limit=ROWS + 2))
    assert ids == [f"x.jsonl:{number}" for number in range(1, ROWS + 3)]


def test_each_parts_first_piece_is_looked_at_and_empty_parts_are_passed_over(tmp_path: Path) -> None:
    folder, checked = tmp_path / "parts", list[tuple[str, int]]()
    write(folder / "a.jsonl", [])
    write(folder / "b.jsonl", pairs(ROWS + 1))
    write(folder / "c.jsonl", pairs(2))
    ids = fetch(TokenCache(None, lambda _: None), request(folder, checked))
    assert checked == [(str(folder / "b.jsonl"), ROWS), (str(folder / "c.jsonl"), 2)]
    assert ids[0] == "b.jsonl:1" and ids[-1] == "c.jsonl:2" and len(ids) == ROWS + 3


# --- bad rows -------------------------------------------------------------------------------------------


def test_a_bad_row_is_refused_unless_such_rows_are_dropped(parts: Path, tmp_path: Path) -> None:
    message = (
        f"{parts / 'a.jsonl'}:2: no field 'chosen', 'completion', 'messages' or 'text'; the columns are "
        "'prompt': say what is in them with data.columns; correct it, or leave such pairs out: "
        "data.on_bad=drop"
    )
    cache = TokenCache(tmp_path / "cache", lambda _: None)
    with pytest.raises(ConfigError) as refusal:
        fetch(cache, request(parts))
    assert str(refusal.value) == message
    assert len(fetch(cache, request(parts, drop=True))) == 9
    with pytest.raises(ConfigError) as refusal:  # what is kept was made for a run that drops them
        fetch(cache, request(parts))
    assert str(refusal.value) == message


# --- keys and lines for the user ------------------------------------------------------------------------


def test_a_key_is_a_hash_of_all_ingredients(parts: Path) -> None:
    wanted = request(parts, limit=5)
    meta = wanted.meta()
    assert meta.labels == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert meta.ingredients["limit"] == "5" and meta.ingredients["source"] == wanted.source.key
    assert meta.ingredients["format"] == str(keeping.FORMAT)
    assert json.loads(meta.ingredients["labels"]) == meta.labels
    assert wanted.encoder.ingredients().items() <= meta.ingredients.items()
    text = json.dumps(meta.ingredients, sort_keys=True)
    assert meta.key == hashlib.sha256(text.encode()).hexdigest()
    assert request(parts, limit=6).meta().key != meta.key
    assert TokenCache(None, print).memo is None and TokenCache(Path("x"), print).memo == Path("x/hashes")


def test_the_user_is_told_what_was_made_and_what_was_read(tmp_path: Path) -> None:
    path, said = write(tmp_path / "x.jsonl", pairs(3)), list[str]()
    for _ in range(2):
        fetch(TokenCache(tmp_path / "cache", said.append), request(path))
    name = re.escape(path)
    made = re.fullmatch(rf"{name}: 3 examples tokenised in (\d+\.\d) s", said[0])
    read = re.fullmatch(rf"{name}: 3 examples read from the cache in (\d+\.\d) s", said[1])
    assert made and read and float(made[1]) < 60 and float(read[1]) < 60 and len(said) == 2


def test_progress_is_told_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(100.0), list[str]()
    monkeypatch.setattr(keeping.time, "monotonic", clock)
    progress, meta = _Progress("x", said.append), Meta("", {}, [])
    for clock.now, read in ((109.0, 90), (110.0, 2000), (110.5, 2100), (120.0, 3000), (120.75, 4150)):
        meta.counts["read"] = read
        progress(meta)
    # 2100 / 10.5 = 200 rows a second, and 4150 / 20.75 = 200
    assert said == ["x: 2,100 rows tokenised, 200 a second", "x: 4,150 rows tokenised, 200 a second"]
    clock.now = 140.0
    progress(Meta("", {}, []))
    assert said[2:] == ["x: 0 rows tokenised, 0 a second"]


# --- where tokens are kept ------------------------------------------------------------------------------


def test_tokens_get_their_name_when_they_are_whole_and_leftovers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(write(tmp_path / "x.jsonl", pairs(3)))
    folder, key = tmp_path / "cache" / "tokens", wanted.meta().key
    for name in (f".{key}.1.tmp", f".{key}x.1.tmp"):
        (folder / name / "full").mkdir(parents=True)
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(keeping, "sync_folder", lambda path: synced.append((path, (folder / key).is_dir())))
    fetch(TokenCache(tmp_path / "cache", lambda _: None), wanted)
    assert sorted(path.name for path in folder.iterdir()) == sorted([key, f"{key}.lock", f".{key}x.1.tmp"])
    assert synced == [(folder, True)]
    assert Lock(folder / f"{key}.lock").acquire()


def test_damaged_tokens_are_named_and_replaced(tmp_path: Path) -> None:
    wanted, said = request(write(tmp_path / "x.jsonl", pairs(3))), list[str]()
    cache = TokenCache(tmp_path / "cache", said.append)
    ids = fetch(cache, wanted)
    folder = tmp_path / "cache" / "tokens" / wanted.meta().key
    (folder / "tokens").unlink()
    said.clear()
    assert fetch(cache, wanted) == ids
    assert said[0] == f"{wanted.source.name}: {folder} is not used, tokens is missing; made again"
    assert (folder / "tokens").is_file() and len(said) == 2


def test_tokens_that_cannot_be_kept_are_made_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, said = request(write(tmp_path / "x.jsonl", pairs(3))), list[str]()

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "sync_folder", full)
    store, meta = TokenCache(tmp_path / "cache", said.append).fetch(lambda: wanted)
    assert len(store) == 3 and meta.rows == [3]  # not counted twice
    folder = tmp_path / "cache" / "tokens"
    assert (
        f"{wanted.source.name}: tokens cannot be kept in {folder} ([Errno 28] No space left on device)"
        in said
    )
    assert not list(folder.glob(".*.tmp"))


def test_a_failure_leaves_neither_half_of_the_tokens_nor_a_lock(parts: Path, tmp_path: Path) -> None:
    wanted = request(parts)
    with pytest.raises(ConfigError):
        fetch(TokenCache(tmp_path / "cache", lambda _: None), wanted)
    lock = tmp_path / "cache" / "tokens" / f"{wanted.meta().key}.lock"
    assert list(lock.parent.iterdir()) == [lock] and Lock(lock).acquire()


def test_another_process_that_makes_them_is_waited_for_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, said = request(write(tmp_path / "x.jsonl", pairs(3))), list[str]()
    fetch(TokenCache(tmp_path / "elsewhere", lambda _: None), wanted)
    key = wanted.meta().key
    folder = tmp_path / "cache" / "tokens"
    other = Lock(folder / f"{key}.lock")
    assert other.acquire()
    looks: list[Lock] = []
    acquire = Lock.acquire
    monkeypatch.setattr(Lock, "acquire", lambda self: (looks.append(self), acquire(self))[1])

    def makes() -> None:
        time.sleep(0.3)
        (tmp_path / "elsewhere" / "tokens" / key).rename(folder / key)
        other.release()

    thread = threading.Thread(target=makes)
    thread.start()
    assert len(fetch(TokenCache(tmp_path / "cache", said.append), wanted)) == 3
    assert len(looks) < 20  # it sleeps between two
    thread.join()
    assert said[0] == f"{wanted.source.name}: another process is tokenising it; waiting for it"
    assert "read from the cache" in said[1] and len(said) == 2
    assert Lock(folder / f"{key}.lock").acquire()


# --- ranks ----------------------------------------------------------------------------------------------


def test_rank_0_shows_now_and_then_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sent = Clock(1000.0), list[Any]()
    monkeypatch.setattr(keeping.time, "monotonic", clock)
    monkeypatch.setattr(distributed, "broadcast_object", sent.append)
    cache = TokenCache(None, print)
    for clock.now in (1059.0, 1060.0, 1060.5, 1061.0, 1120.0, 1121.0):
        cache._beat()
    assert sent == [(False, None, None)] * 2
    clock.now = 5000.0
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    cache._beat()
    assert len(sent) == 2


@pytest.mark.parametrize("seen", [True, False])
def test_another_rank_waits_and_maps_what_it_sees_or_makes_its_own(
    seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(write(tmp_path / "x.jsonl", pairs(3)))
    fetch(TokenCache(tmp_path / "cache", lambda _: None), wanted)
    told = [(False, None, None), (False, None, None), (True, None, wanted.meta().key)]
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda own: told.pop(0))
    made: list[TokenRequest] = []
    own = TokenCache(tmp_path / ("cache" if seen else "own"), lambda text: pytest.fail(text))
    store, _ = own.fetch(lambda: (made.append(wanted), wanted)[1])
    assert not told and len(store) == 3 and len(made) == (not seen)
    assert (tmp_path / "own" / "tokens" / wanted.meta().key / META).is_file() is not seen


def test_what_any_rank_cannot_read_is_refused_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request(write(tmp_path / "x.jsonl", pairs(3)))
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, "a of rank 1", "b"])
    with pytest.raises(ConfigError, match=r"^a of rank 1$"):
        fetch(TokenCache(None, lambda _: None), wanted)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda own: (True, "of rank 0", None))
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, own])
    with pytest.raises(ConfigError, match=r"^of rank 0$"):
        TokenCache(None, print).fetch(lambda: pytest.fail("it looked itself"))


def test_without_a_folder_or_a_key_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    assert TokenCache(None, print)._look("key") is None
    assert TokenCache(tmp_path, print)._look(None) is None
    assert TokenCache(tmp_path, print)._look("key") is None
