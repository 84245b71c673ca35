"""Loads data on several ranks and says what each of them saw.

Usage: data_ranks.py PATH CACHE OUT; CACHE "off" keeps nothing, "apart" gives each rank a folder of its own,
as machines that share no disk have. Writes OUT/RANK.json. A refusal is written, not raised.
"""

import json
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from rcpo.config.data import DataConfig
from rcpo.data import cache
from rcpo.data.dataset import load_datasets
from rcpo.errors import ConfigError
from rcpo.system import distributed


def main() -> None:
    path, folder, out = sys.argv[1:]
    distributed.initialize()
    cache.HEARTBEAT = 0.0  # a sign of life at every piece
    rank = distributed.rank()
    kept = str(Path(out) / f"cache-{rank}") if folder == "apart" else folder
    tokenizer = AutoTokenizer.from_pretrained(Path(cache.__file__).parents[1] / "assets" / "tiny")
    config = DataConfig(name="pairs", path=path, cache=kept, eval_fraction=0.0)
    said: list[str] = []
    try:
        train = load_datasets(config, tokenizer, 1, said.append).train
        store = train._stores[0]
        result = {
            "fingerprint": train.fingerprint,
            "mapped": isinstance(store.tokens, np.memmap),
            "said": said,
        }
    except ConfigError as error:
        result = {"refusal": str(error)}
    (Path(out) / f"{rank}.json").write_text(json.dumps(result))
    distributed.shutdown()


if __name__ == "__main__":
    main()
