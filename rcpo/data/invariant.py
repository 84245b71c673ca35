"""The prompt's tokens are what generation would be given: looked at on the data, by transformers' own way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rcpo.data.encode import Encoder
from rcpo.data.readers import RowBlock
from rcpo.data.records import BadRow, Row, TextPair
from rcpo.data.rendering import fix_date
from rcpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 64  # of a source; that the text is the same is checked on every row


def check_prompts(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, piece: RowBlock, place: str, rows: int = ROWS
) -> int:
    """Compare the uncut prompts of the first rows of a piece; return how many. Bad rows are passed over.

    Raises ConfigError with the row where the tokens differ.
    """
    checked = 0
    for number, value in piece.parsed():
        if checked == rows:
            break
        try:
            templated, row, pair = encoder.render(encoder.read(value)[0], str(number))
        except (BadRow, IndexError):  # a tie that is left out has no row
            continue
        own = encoder.prompt_ids(pair, templated=templated)
        wanted = _chat_ids(encoder, tokenizer, row) if templated else _text_ids(tokenizer, pair, own)
        if own != wanted:
            raise ConfigError(
                f"{place}:{number}: the prompt's tokens are not those that generation would be given: "
                f"{tokenizer.decode(own)!r} and {tokenizer.decode(wanted)!r}; this tokenizer cannot be used"
            )
        checked += 1
    return checked


def _chat_ids(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    template = encoder.template
    assert template is not None and not isinstance(row.prompt, str)
    source = template.source_for(row)
    fix_date(source, template.day)
    text = tokenizer.apply_chat_template(
        template.with_system(row.prompt),
        tools=row.tools,
        chat_template=source,
        add_generation_prompt=True,
        tokenize=False,
        **{**template.options, **(row.options or {})},
    )
    # as apply_chat_template does with tokenize=True
    return list(tokenizer(str(text).removesuffix(template.left_out), add_special_tokens=False)["input_ids"])


def _text_ids(tokenizer: PreTrainedTokenizerBase, pair: TextPair, own: list[int]) -> list[int]:
    """The tokenizer's own, where it put an end after the text or a second BOS before it without those."""
    whole = list(tokenizer(pair.prompt, verbose=False)["input_ids"])
    if whole[:1] == whole[1:2] == [tokenizer.bos_token_id]:
        whole = whole[1:]
    special = set(tokenizer.all_special_ids)
    while len(whole) > len(own) and whole[-1] in special:
        whole.pop()
    return whole if pair.prompt else own
