"""What the judge is asked about: prompts, the policy's answers, and those that they are compared with."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rcpo.config.data import DataConfig
from rcpo.config.judge import REFERENCE
from rcpo.config.parsing import read_tree, structure
from rcpo.config.schema import RunConfig
from rcpo.data.dataset import load_datasets, make_encoder
from rcpo.data.identity import example_id
from rcpo.data.records import SFT, BadRow, Example, Row
from rcpo.engine.load import policy_source, reference_source
from rcpo.errors import ConfigError
from rcpo.evaluation.answers import longest_answer, own_stop_ids, positions_of, turn_ends
from rcpo.evaluation.endpoint import Endpoint
from rcpo.evaluation.generation import Decoding, generate
from rcpo.evaluation.judge.prompts import Instruction, read_answers, read_prompts
from rcpo.evaluation.judge.verdicts import Duel
from rcpo.models import hub
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_tokenizer, load_whole
from rcpo.runs.folder import CONFIG_FILE, FINAL
from rcpo.system import distributed
from rcpo.training.session import refuse_other_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = (
    2048  # tokens of an answer to a file's prompts, where eval.max_new_tokens is open: as AlpacaEval has it
)


@dataclass(frozen=True)
class TokenPrompts:
    """Prompts as tokens of one model; `ends` are tokens that end an answer besides the model's own."""

    tokens: dict[str, list[int]]
    ends: set[int]
    longest: int


@dataclass
class Judging:
    """A judgement's prompts, known to be usable before a weight is read."""

    config: RunConfig
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Instruction]
    asked: TokenPrompts
    given: dict[str, str]
    endpoint: Endpoint

    @staticmethod
    def prepare(config: RunConfig, run_dir: Path, final: Path | None) -> Judging:
        """Read prompts and given answers, and knock at the endpoint. Collective.

        Raises ConfigError for a file that cannot be used, where there is nothing to compare with, and for an
        endpoint that is not there or refuses the key.
        """
        endpoint = Endpoint(config.judge)
        source = policy_source(config, run_dir, final)
        tokenizer = load_tokenizer(source.tokenizer, config.model)
        prompts, asked = _prompts(config, run_dir, config.data, tokenizer)
        given: dict[str, str] = {}
        against = config.judge.against
        if against is not None and against != REFERENCE and Path(against).expanduser().is_file():
            given = read_answers(Path(against).expanduser(), prompts)
        elif against is None:
            lacking = [prompt.place for prompt in prompts if prompt.theirs is None]
            if lacking:
                raise ConfigError(
                    f"judge.prompts: {lacking[0]} has no answer (output) to compare with; give judge.against"
                )
            given = {prompt.id: str(prompt.theirs) for prompt in prompts}
        if distributed.is_main():
            endpoint.check()
        return Judging(config, source, tokenizer, prompts, asked, given, endpoint)

    def pairs(self, run_dir: Path) -> list[Duel]:
        """Our answer and the other to each prompt, on every rank; models answer one after the other.

        Collective. Raises ConfigError where the other model does not see the same prompts.
        """
        prompts = self.prompts
        ours = {prompt.id: prompt.ours for prompt in prompts if prompt.ours is not None}
        theirs = self.given or self._others(run_dir)
        if not ours:
            ours = self._answers(self.source, self.tokenizer, self.asked)
        return [
            Duel(one.id, one.instruction, str(ours[one.id]), theirs[one.id], one.label) for one in prompts
        ]

    def _others(self, run_dir: Path) -> dict[str, str]:
        """The answers of the model that `judge.against` names."""
        config, against = self.config, self.config.judge.against
        assert against is not None
        if against == REFERENCE:
            source = reference_source(config) or policy_source(config, run_dir, None)
            return self._answers(source, self.tokenizer, self.asked)
        folder, data = Path(against).expanduser(), config.data
        if (folder / CONFIG_FILE).is_file():
            run = structure(read_tree(folder / CONFIG_FILE)).data
            folder /= FINAL
            if not folder.is_dir():
                raise ConfigError(f"judge.against={against} has no final/ yet; finish that run first")
            data = replace(
                data,
                template=run.template,
                template_options=run.template_options,
                system_prompt=run.system_prompt,
                reasoning=run.reasoning,
                date=run.date,
            )
        source = hub.source("judge.against", str(folder), hub.folder)
        tokenizer = load_tokenizer(source.tokenizer, config.model)
        prompts, asked = _prompts(config, run_dir, data, tokenizer)
        if [prompt.place for prompt in prompts] != [prompt.place for prompt in self.prompts]:
            raise ConfigError(
                f"judge.against={against}: its tokenizer leaves other held-out prompts; give both the same "
                "ones in a file: judge.prompts="
            )
        # an id is of one model's tokens: the prompts' order joins them
        answers = self._answers(source, tokenizer, asked)
        return {own.id: answers[other.id] for own, other in zip(self.prompts, prompts)}

    def _answers(
        self, source: ModelSource, tokenizer: PreTrainedTokenizerBase, asked: TokenPrompts
    ) -> dict[str, str]:
        """A model's greedy answers by prompt; each rank holds the whole model and answers its share."""
        config = self.config
        model = load_whole(source, config.model, config.train.dtype, config.seed).to(distributed.device())
        pad = tokenizer.pad_token_id
        assert isinstance(pad, int)
        rows = list(asked.tokens.values())
        places = [prompt.place for prompt in self.prompts]  # both models have the prompts in one order
        decoding = Decoding(
            max_new_tokens=config.eval.max_new_tokens or asked.longest,
            stop_ids=tuple(sorted(own_stop_ids(tokenizer, model) | asked.ends)),
            pad_id=pad,
            positions=positions_of(model, list(zip(places, rows, strict=True))),
        )
        ranks, rank = distributed.world_size(), distributed.rank()
        own = generate(model, rows[rank::ranks], decoding, batch_size=config.eval.batch_size)
        parts = distributed.gather_objects([answer.tokens for answer in own])
        tokens = [parts[number % ranks][number // ranks] for number in range(len(rows))]
        del model
        gc.collect()
        torch.cuda.empty_cache()  # of no effect without a GPU
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return {name: text.strip() for name, text in zip(asked.tokens, texts, strict=True)}


def _prompts(
    config: RunConfig, run_dir: Path, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Instruction], TokenPrompts]:
    judge = config.judge
    if judge.prompts is None:
        return _held_out(config, run_dir, data, tokenizer)
    prompts = read_prompts(Path(judge.prompts).expanduser(), judge.max_examples)
    if all(prompt.ours is not None for prompt in prompts):
        return prompts, TokenPrompts({}, set(), LONGEST)
    return prompts, _tokenised(prompts, data, tokenizer)


def _held_out(
    config: RunConfig, run_dir: Path, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Instruction], TokenPrompts]:
    """The held-out prompts, each once, with their first chosen response."""
    datasets = load_datasets(data, tokenizer, config.seed)
    refuse_other_split(config, run_dir, datasets)
    dataset = datasets.evaluation
    if dataset is None:
        raise ConfigError(
            "nothing is held out to ask the judge about; give judge.prompts, data.eval_path, or "
            "data.eval_fraction above 0"
        )
    found: dict[tuple[int, ...], Example] = {}
    for example in dataset:
        if len(found) == config.judge.max_examples:
            break
        if example.chosen:
            found.setdefault(tuple(example.prompt), example)
    kept = list(found.values())
    decode = tokenizer.batch_decode
    instructions = decode([example.prompt for example in kept], skip_special_tokens=True)
    chosen = decode([example.chosen for example in kept], skip_special_tokens=True)
    prompts = [
        Instruction(example_id(example), example.id, instruction.strip(), theirs.strip())
        for example, instruction, theirs in zip(kept, instructions, chosen, strict=True)
    ]
    tokens = {prompt.id: example.prompt for prompt, example in zip(prompts, kept, strict=True)}
    return prompts, TokenPrompts(tokens, turn_ends(tokenizer, dataset), longest_answer(dataset))


def _tokenised(
    prompts: Sequence[Instruction], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenPrompts:
    """Instructions as one turn of the template where there is one, else as they are."""
    encoder = make_encoder(replace(data, columns={}), tokenizer)
    template = encoder.template
    tokens = {}
    for prompt in prompts:
        said: Any = prompt.instruction
        if template is not None:
            said = [{"role": "user", "content": prompt.instruction}]
        try:
            templated, _, pair = encoder.render(Row(SFT, said, "-", None), prompt.place)
        except BadRow as problem:
            raise ConfigError(f"judge.prompts: {prompt.place}: {problem}") from problem
        tokens[prompt.id] = encoder.prompt_ids(pair, templated=templated)
    ends = set()
    if template is not None:
        ends.add(template.end_id(tokenizer))
    return TokenPrompts(tokens, ends, LONGEST)
