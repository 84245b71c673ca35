"""Tokens of a source: made once, kept by everything that decides them, mapped by every rank and later run.

Rank 0 makes them; then the others look in the same folder, and a rank of another machine that does not see
them makes its machine's own, once. Where nothing can be kept every rank holds its own copy in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rcpo.data.encode import Encoded, Encoder
from rcpo.data.readers import RowBlock
from rcpo.data.sources import DataSource
from rcpo.data.store import TokenStore
from rcpo.data.tokens import Damaged, Meta, TokenWriter, open_tokens
from rcpo.data.workers import encode_all
from rcpo.errors import ConfigError
from rcpo.system import distributed
from rcpo.system.files import Lock, sync_folder

Say = Callable[[str], None]
Check = Callable[[Encoder, RowBlock, str], Any]
"""Raises ConfigError where a piece of the named part cannot be encoded as it should."""
FORMAT = 2  # raise where rcpo makes other tokens of the same rows, template and tokenizer
HEARTBEAT = 60.0  # seconds between signs of life while rank 0 works: well within the collectives' timeout
PROGRESS_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class TokenRequest:
    """A source's tokens: at most `limit` usable rows of it, by an encoder; `drop` is what bad rows meet.

    `check` looks at a part's first piece before it is encoded.
    """

    source: DataSource
    encoder: Encoder
    check: Check
    limit: int | None
    workers: int | None
    drop: bool

    def meta(self) -> Meta:
        labels = [part.label for part in self.source.parts]
        ingredients = {
            "format": str(FORMAT),
            "source": self.source.key,
            "labels": json.dumps(labels),
            "limit": str(self.limit),
            **self.encoder.ingredients(),
        }
        key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
        return Meta(key, ingredients, labels)


class TokenCache:
    """The kept tokens of a folder (None: nothing is kept). `say` takes lines for the user, on rank 0."""

    def __init__(self, folder: Path | None, say: Say) -> None:
        self._folder = folder
        self._say = say
        self._beaten = time.monotonic()

    @property
    def memo(self) -> Path | None:
        """Where hashes of files are remembered."""
        return None if self._folder is None else self._folder / "hashes"

    def fetch(self, make: Callable[[], TokenRequest]) -> tuple[TokenStore, Meta]:
        """The tokens wanted and what became of the rows, the same on every rank. Collective.

        `make` looks for the source; it is called where tokens may have to be made. Raises ConfigError on
        every rank where rows are bad and not to be dropped, and for a source that cannot be read.
        """
        found: tuple[TokenStore, Meta] | None = None
        problem = key = None
        if distributed.is_main():
            found, problem = self._try(make)
            key = None if found is None else found[1].key
            distributed.broadcast_object((True, problem, key))
        else:
            done = False
            while not done:
                done, problem, key = distributed.broadcast_object(None)
            if problem is None:
                found = self._look(key)
                if found is None:
                    found, problem = self._try(make)
        problems = [text for text in distributed.gather_objects(problem) if text is not None]
        if problems or found is None:
            raise ConfigError(problems[0])
        return found

    def _try(self, make: Callable[[], TokenRequest]) -> tuple[tuple[TokenStore, Meta] | None, str | None]:
        """The tokens, or why there are none: the other ranks have to hear of it."""
        try:
            return self._fetch(make()), None
        except ConfigError as error:
            return None, str(error)

    def _look(self, key: str | None) -> tuple[TokenStore, Meta] | None:
        """What rank 0 has kept, where this rank sees it."""
        if self._folder is None or key is None:
            return None
        try:
            return open_tokens(self._folder / "tokens" / key, key, verify=False)
        except (Damaged, OSError):  # another machine's folder
            return None

    def _fetch(self, wanted: TokenRequest) -> tuple[TokenStore, Meta]:
        meta = wanted.meta()
        if self._folder is None:
            return self._build(wanted, meta, None)
        folder = self._folder / "tokens" / meta.key
        found = self._open(folder, wanted, told=False)
        if found is not None:
            return found
        lock = Lock(folder.with_suffix(".lock"))
        try:
            self._wait(lock, wanted)
            found = self._open(folder, wanted, told=True)
            return self._make(folder, wanted, meta) if found is None else found
        finally:
            lock.release()

    def _open(self, folder: Path, wanted: TokenRequest, *, told: bool) -> tuple[TokenStore, Meta] | None:
        """What is kept, if it is whole; damage is `told` by the holder of the lock, who makes it again."""
        began = time.perf_counter()
        try:
            store, meta = open_tokens(folder, folder.name, verify=distributed.is_main())
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            if told:
                self._say_main(f"{wanted.source.name}: {folder} is not used, {error}; made again")
            return None
        _refuse_bad(meta, wanted)
        seconds = time.perf_counter() - began
        self._say_main(f"{wanted.source.name}: {len(store)} examples read from the cache in {seconds:.1f} s")
        return store, meta

    def _make(self, folder: Path, wanted: TokenRequest, meta: Meta) -> tuple[TokenStore, Meta]:
        """Into a folder of another name, which gets its own when it is whole; in memory if that fails."""
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of processes that were killed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._build(wanted, meta, temporary)
            if folder.exists():  # damaged: who has it mapped keeps it
                shutil.rmtree(folder)
            temporary.rename(folder)
            sync_folder(folder.parent)
            store, meta = open_tokens(folder, meta.key, verify=False)
        except (OSError, Damaged) as error:
            self._say_main(f"{wanted.source.name}: tokens cannot be kept in {folder.parent} ({error})")
            return self._build(wanted, wanted.meta(), None)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return store, meta

    def _build(self, wanted: TokenRequest, meta: Meta, folder: Path | None) -> tuple[TokenStore, Meta]:
        began = time.monotonic()
        writer = TokenWriter(folder, meta)
        progress = _Progress(wanted.source.name, self._say_main)
        left, encoder = wanted.limit, wanted.encoder
        try:
            for part in wanted.source.parts:
                writer.begin_part()
                if left == 0:
                    continue
                pieces = part.pieces()
                if (first := next(pieces, None)) is None:
                    continue
                if not meta.form:
                    encoder = encoder.fitted(first, part.place)
                    meta.form = encoder.form_name
                wanted.check(encoder, first, part.place)
                pieces = chain([first], pieces)
                # closed where a few rows are enough: workers would go on
                with contextlib.closing(encode_all(encoder, pieces, wanted.workers)) as encoded_pieces:
                    while left != 0 and (found := next(encoded_pieces, None)) is not None:
                        encoded = found[1] if left is None else _first(encoder, *found, left)
                        left = None if left is None else left - len(encoded.numbers)
                        writer.add(encoded, part.place)
                        _refuse_bad(meta, wanted)
                        progress(meta)
                        self._beat()
            store = writer.finish()
        finally:
            writer.close()
        seconds = time.monotonic() - began
        self._say_main(f"{wanted.source.name}: {len(store)} examples tokenised in {seconds:.1f} s")
        return store, meta

    def _wait(self, lock: Lock, wanted: TokenRequest) -> None:
        told = False
        while not lock.acquire():
            if not told:
                self._say_main(f"{wanted.source.name}: another process is tokenising it; waiting for it")
            told = True
            self._beat()
            time.sleep(0.05)

    def _beat(self) -> None:
        """Rank 0 tells the ranks that wait in `fetch` that it is alive."""
        if distributed.is_main() and time.monotonic() - self._beaten > HEARTBEAT:
            self._beaten = time.monotonic()
            distributed.broadcast_object((False, None, None))

    def _say_main(self, text: str) -> None:
        if distributed.is_main():
            self._say(text)


def _first(encoder: Encoder, piece: RowBlock, encoded: Encoded, count: int) -> Encoded:
    """The first `count` usable rows of an encoded piece, as if the rows behind them were not there."""
    if len(encoded.numbers) <= count:
        return encoded
    end = list(piece.numbers).index(int(encoded.numbers[count - 1])) + 1  # with all pairs of that row
    return encoder(piece.part(0, end)).first(count)


def _refuse_bad(meta: Meta, wanted: TokenRequest) -> None:
    """Raise ConfigError for the first bad row, unless such rows are dropped."""
    if meta.bad and not wanted.drop:
        reason, (place, _) = next(iter(meta.bad.items()))
        raise ConfigError(f"{place}: {reason}; correct it, or leave such pairs out: data.on_bad=drop")


class _Progress:
    """Says now and then how far tokenising has come."""

    def __init__(self, name: str, say: Say) -> None:
        self._name = name
        self._say = say
        self._began = self._spoken = time.monotonic()

    def __call__(self, meta: Meta) -> None:
        now = time.monotonic()
        if now - self._spoken > PROGRESS_EVERY:
            self._spoken = now
            read = meta.counts.get("read", 0)
            self._say(f"{self._name}: {read:,} rows tokenised, {read / (now - self._began):,.0f} a second")
