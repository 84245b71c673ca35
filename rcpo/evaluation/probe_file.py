"""probes.parquet: a row for each step and probe example, rewritten whole at each probe, so never torn."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# column: Arrow type; README and the report rely on the names
COLUMNS = {
    "step": "int64",
    "example_id": "string",
    "split": "string",
    "chosen_length": "int32",
    "rejected_length": "int32",
    "chosen_logps": "float64",
    "rejected_logps": "float64",
    "chosen_logratios": "float64",
    "rejected_logratios": "float64",
    "incentive_chosen": "float64",
    "incentive_rejected": "float64",
    "chosen_mass": "float64",
    "rejected_mass": "float64",
    "greedy_mass": "float64",
    "ref_greedy_mass": "float64",
    "greedy_length": "int32",
    "greedy_repetition": "float64",
    "sample_length": "int32",
    "sample_repetition": "float64",
}


class ProbeFile:
    """The rows of a run so far, in memory and on disk; those after `resume_step` are cut (None: all are)."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        import pyarrow.parquet as parquet  # a tenth of a second, and for rank 0 alone

        self._path = path
        self._parquet = parquet
        self._tables: list[Any] = []
        if resume_step is not None and path.exists():
            self._tables.append(parquet.read_table(path, filters=[("step", "<=", resume_step)]))

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows and write the file; a column that a row lacks, or NaN in it, is null."""
        import pyarrow

        columns = [_column([_finite(row.get(name)) for row in rows], kind) for name, kind in COLUMNS.items()]
        self._tables.append(pyarrow.Table.from_arrays(columns, names=list(COLUMNS)))
        scratch = self._path.with_name(f".{self._path.name}.new")
        with scratch.open("wb") as file:
            self._parquet.write_table(pyarrow.concat_tables(self._tables).combine_chunks(), file)
            file.flush()
            os.fsync(file.fileno())  # a resumed run reads it, after a power failure too
        os.replace(scratch, self._path)


def _column(values: Sequence[Any], kind: str) -> Any:
    """An Arrow array of values, None as null.

    From buffers: given a list, pyarrow imports pandas, only to ask whether the list is one of its series.
    """
    import pyarrow

    present = np.packbits([value is not None for value in values], bitorder="little").tobytes()
    if kind == "string":
        texts = [(value or "").encode() for value in values]
        ends = np.cumsum([0, *map(len, texts)]).astype("<i4").tobytes()
        contents, arrow_type = [present, ends, b"".join(texts)], pyarrow.string()
    else:
        numbers = np.array([0 if value is None else value for value in values], kind).tobytes()
        contents, arrow_type = [present, numbers], pyarrow.from_numpy_dtype(kind)
    buffers = [pyarrow.py_buffer(content) for content in contents]
    return pyarrow.Array.from_buffers(arrow_type, len(values), buffers)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
