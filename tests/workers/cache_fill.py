"""Fetches 1,000 values through a cache in FOLDER/cache; computing takes SECONDS, or stops half-way for good.

Says that it is ready by a file FOLDER/ready-PID, and starts when there is FOLDER/go.
Usage: cache_fill.py FOLDER SECONDS|forever
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

from rcpo.reference.cache import Cache, LogpRequest
from rcpo.reference.entry import Sink


def main() -> None:
    folder, seconds = Path(sys.argv[1]), sys.argv[2]
    values = np.arange(1000, dtype=np.float32)

    def fill(sink: Sink | None) -> None:
        assert sink is not None
        sink.write(0, values[:500])
        if seconds == "forever":
            (folder / "half").touch()
            time.sleep(3600)
        time.sleep(float(seconds))
        sink.write(500, values[500:])
        with (folder / "computed").open("a") as file:
            file.write("once\n")

    (folder / f"ready-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    wanted = LogpRequest("train", {"weights": "worker"}, 1000)
    found, _ = Cache(folder / "cache", lambda text: print(text, flush=True)).fetch(wanted, fill)
    print(f"all {int((found == values).sum())} right")


if __name__ == "__main__":
    main()
