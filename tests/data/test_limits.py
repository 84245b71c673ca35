"""Truncation: what stays, what goes, and that nothing goes uncounted."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import tokenizer_of
from test_templates import CHAT, encode, pair, parts, plain_encoder, says, user

from rcpo.data.limits import Limits, UnusablePair
from rcpo.data.readers import RowBlock
from rcpo.errors import ConfigError


def test_cuts_by_hand() -> None:
    prompt = [1, 10, 11, 12, 13, 90, 91]  # an opening token, four of text, two that open the answer
    assert Limits(max_prompt_length=5).cut_prompt(prompt, 1, 2) == [1, 12, 13, 90, 91]
    assert Limits(max_prompt_length=5, truncation="keep_start").cut_prompt(prompt, 1, 2) == [
        1,
        10,
        11,
        90,
        91,
    ]
    assert Limits(max_prompt_length=7).cut_prompt(prompt, 1, 2) == prompt
    assert Limits().cut_prompt(prompt, 1, 2) == prompt
    with pytest.raises(UnusablePair, match="no room beside what the template writes"):
        Limits(max_prompt_length=3).cut_prompt(prompt, 1, 2)
    assert Limits(max_length=9).cut_response([1, 2, 3], 7) == [1, 2]
    assert Limits(max_length=9).cut_response([], 9) == []
    with pytest.raises(UnusablePair, match="leaves no room for a response"):
        Limits(max_length=9).cut_response([1], 9)
    with pytest.raises(ConfigError, match=r"data.max_prompt_length=2"):
        Limits(max_prompt_length=2).check(2)


LONG = pair([user("one two three four five six seven eight nine ten")], "eleven twelve", "thirteen")


@pytest.mark.parametrize("family", CHAT)
@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_what_opens_the_answer_survives_any_cut(family: str, truncation: str) -> None:
    tokenizer = tokenizer_of(family)
    whole, other = parts(encode(tokenizer, LONG)), parts(encode(tokenizer, pair([user("q")], "a")))[0]
    tail = next(n for n in range(1, 99) if whole[0][-n:] != other[-n:]) - 1  # what both questions end with
    opening = int(whole[0][0] == tokenizer.bos_token_id)
    assert tail > 0 and tokenizer.decode(whole[0][-tail:]).strip()
    for lost in (1, 4, len(whole[0]) - opening - tail - 1):
        encoded = encode(tokenizer, LONG, max_prompt_length=len(whole[0]) - lost, truncation=truncation)
        prompt, *responses = parts(encoded)
        first = opening if truncation == "keep_end" else len(whole[0]) - tail - lost  # of what goes
        assert prompt == whole[0][:first] + whole[0][first + lost :]
        assert responses == whole[1:]
        assert encoded.tally.counts["truncated_prompts"] == 1 and encoded.tally.counts["tokens_cut"] == lost


words = st.lists(st.sampled_from(["one", "two", "\n", " ", "345", "é", "🙂"]), min_size=1, max_size=12).map(
    "".join
)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen", "neox"])
@settings(max_examples=25)
@given(
    texts=st.tuples(words, words, words),
    max_length=st.integers(1, 90) | st.none(),
    max_prompt_length=st.integers(1, 60) | st.none(),
    truncation=st.sampled_from(["keep_end", "keep_start"]),
    messages=st.booleans(),
)
def test_no_token_goes_uncounted_and_none_of_a_response_below_the_limit(
    family: str, texts: tuple[str, str, str], messages: bool, **limits: Any
) -> None:
    tokenizer = tokenizer_of(family)
    row: dict[str, Any] = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    if messages and tokenizer.chat_template:
        row = {"prompt": [user(texts[0])], "chosen": [says(texts[1])], "rejected": [says(texts[2])]}
    try:
        whole, cut = plain_encoder(family)(RowBlock([1], [row])), encode(tokenizer, row, **limits)
    except ConfigError as error:
        assert "max_prompt_length" in str(error) and limits["max_prompt_length"] == 1
        return
    assert len(cut.numbers) + len(cut.tally.bad) == 1
    if not len(cut.numbers):
        return
    before, after = parts(whole), parts(cut)
    lost = sum(map(len, before)) - sum(map(len, after))
    assert cut.tally.counts["tokens_cut"] == lost
    if limits["max_prompt_length"] is None or len(before[0]) <= limits["max_prompt_length"]:
        assert after[0] == before[0]
    else:
        assert len(after[0]) == limits["max_prompt_length"]
    room = 10**6 if limits["max_length"] is None else limits["max_length"] - len(after[0])
    for response, uncut in zip(after[1:], before[1:], strict=True):
        assert response == uncut[:room] and response
