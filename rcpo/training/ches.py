"""`data.ches_max`: training pairs that are too much alike to the model that training starts from.

A pair is scored in a block of fixed neighbours, so that its score is the same on any number of ranks, and the
scores are kept in the cache of the reference's log-probs. Held-out pairs stay as they are, so that runs with
and without the limit are evaluated on the same ones.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from rcpo.config.schema import RunConfig
from rcpo.data.batches import FILLER
from rcpo.data.collate import collate_indices
from rcpo.data.dataset import Datasets
from rcpo.data.diagnosis import BATCH, ches
from rcpo.data.records import PAIRS
from rcpo.data.store import PairDataset
from rcpo.engine.load import read_model
from rcpo.engine.zero import Engine
from rcpo.errors import ConfigError
from rcpo.models.contents import source_hash
from rcpo.models.hub import ModelSource
from rcpo.models.policy import Policy
from rcpo.reference.cache import Cache, LogpRequest, Say
from rcpo.reference.entry import Sink
from rcpo.system import distributed
from rcpo.system.files import cache_folder


def within_ches(
    datasets: Datasets, config: RunConfig, start: ModelSource, tokenizer: PreTrainedTokenizerBase, say: Say
) -> Datasets:
    """The datasets without the training pairs above `data.ches_max`, which are counted. Collective.

    Raises ConfigError for data that are not pairs, and where no pair is left.
    """
    limit, train = config.data.ches_max, datasets.train
    if limit is None:
        return datasets
    if train.kind != PAIRS:
        raise ConfigError(
            f"data.ches_max={limit:g} compares the responses of pairs, and the data has single completions"
        )
    scores = ches_scores(train, config, start, tokenizer, say)
    above = ~(scores <= limit)  # NaN too
    if above.all():
        raise ConfigError(
            f"no pair is left: the CHES of all {len(train):,} training pairs is above "
            f"data.ches_max={limit:g} (the lowest is {scores.min():.4g}); rcpo data show prints its quantiles"
        )
    if above.any():
        first = train.id(int(above.argmax()))
        datasets.report.leave_out(f"a CHES above data.ches_max={limit:g}", int(above.sum()), first)
    found = replace(datasets, train=train.take(np.flatnonzero(~above)))
    datasets.report.train = len(found.train)
    return found


def ches_scores(
    dataset: PairDataset, config: RunConfig, start: ModelSource, tokenizer: PreTrainedTokenizerBase, say: Say
) -> np.ndarray:
    """CHES of each pair by the model in `start`, (n,) float32, equal on all ranks; cached. Collective."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    cache = Cache(cache_folder(config.reference.cache), say)
    ingredients = None
    if distributed.is_main():
        ingredients = {
            "what": "CHES",
            "block": str(BATCH),
            "dataset": dataset.fingerprint,
            "weights": source_hash(start, config.seed, cache.memo),
            "pad": str(pad),
            "dtype": config.train.dtype,
            "quantization": str(config.adapter.quantization),
            "attention": str(config.model.attention),
            "device": distributed.device().type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def fill(sink: Sink | None) -> None:
        _ches(dataset, config, start, pad, sink)

    ingredients = distributed.broadcast_object(ingredients)
    request = LogpRequest("CHES of the training pairs", ingredients, len(dataset), "pairs")
    values, _ = cache.fetch(request, fill)
    # whether the model was loaded here must not show in what is drawn later
    distributed.seed_everything(config.seed, deterministic=config.launch.deterministic)
    return np.array(values)


def _ches(dataset: PairDataset, config: RunConfig, start: ModelSource, pad: int, sink: Sink | None) -> None:
    """Hand rank 0's sink the scores, each rank a block in turn. Collective."""
    model = read_model(start, config)
    model.requires_grad_(False)
    engine = Engine(Policy(model), config)
    engine.eval()
    if not engine.policy.fused:
        raise ConfigError(
            f"data.ches_max={config.data.ches_max:g}: {type(model).__name__} gives no hidden states that its "
            "output head is known to read; leave it out"
        )
    ranks, own = distributed.world_size(), distributed.rank()
    for first in range(0, len(dataset), ranks * BATCH):
        start_of_block = first + own * BATCH
        block = list(range(start_of_block, min(start_of_block + BATCH, len(dataset))))
        batch = collate_indices(dataset, block or [FILLER], pad).to(engine.device)
        with torch.no_grad():
            hidden = engine.forward(batch)[1]
        scores = ches(hidden, batch.sequences, batch.lengths).cpu().numpy()[: len(block)]
        for place, values in distributed.gather_objects((start_of_block, scores)):
            if sink is not None and len(values):
                sink.write(place, values)
    engine.close()
    del engine, model
    gc.collect()  # DeepSpeed's engine refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
