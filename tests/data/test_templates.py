"""Conversations through each family's kind of tokenizer and template, token by token."""

import copy
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import FAMILIES, TEMPLATES, tokenizer_of
from transformers import PreTrainedTokenizerFast

from rcpo.config.data import DataConfig
from rcpo.data.dataset import make_encoder
from rcpo.data.encode import Encoded, Encoder
from rcpo.data.invariant import check_prompts
from rcpo.data.readers import RowBlock
from rcpo.data.records import PAIRS, BadRow, Row
from rcpo.data.templates import find_template, named_templates
from rcpo.errors import ConfigError

CHAT = [family for family in FAMILIES if family != "neox"]
NAMED = ("chatml", "gemma", "hermes", "llama3", "mistral", "plain", "zephyr")
CALL = {"role": "assistant", "tool_calls": [{"name": "f"}]}
END = {"llama3": "<|eot_id|>", "mistral": "</s>", "zephyr": "</s>", "qwen": "<|im_end|>",
       "gemma": "<end_of_turn>", "unigram": "</s>"}  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(prompt: list[dict[str, str]], chosen: str, rejected: str = "No.") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [says(chosen)], "rejected": [says(rejected)]}


def encoder_of(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Encoder:
    return make_encoder(DataConfig(name="pairs", **settings), tokenizer)


def encode(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], **settings: Any) -> Encoded:
    return encoder_of(tokenizer, **settings)(RowBlock(range(1, len(rows) + 1), list(rows)))


def parts(encoded: Encoded, row: int = 0) -> list[list[int]]:
    """Prompt, chosen and rejected of an encoded row."""
    ends = encoded.lengths.ravel().cumsum().tolist()
    borders = [0, *ends][4 * row : 4 * row + 4]
    return [encoded.tokens[first:end].tolist() for first, end in pairwise(borders)]


# typed by hand: what generation is given for "hi", and what follows it for the answer "yes"
BY_HAND = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "yes<|eot_id|>",
    ),
    "mistral": ("<s>[INST] hi [/INST]", " yes</s>"),
    "zephyr": ("<|user|>\nhi</s>\n<|assistant|>\n", "yes</s>"),
    "qwen": (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "yes<|im_end|>",
    ),
    "gemma": ("<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "yes<end_of_turn>"),
    # this kind puts a space before every piece of text, so one after a special token too
    "unigram": ("<|user|>\nhi</s> \n<|assistant|>\n", "yes</s>"),
}  # fmt: skip


@pytest.mark.parametrize("family", CHAT)
def test_prompt_and_response_by_hand(family: str) -> None:
    tokenizer = tokenizer_of(family)
    prompt, chosen, _ = parts(encode(tokenizer, pair([user("hi")], "yes")))
    # a mark keeps the decoders of such tokenizers from taking the response's first space away
    mark = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert (tokenizer.decode(prompt), tokenizer.decode(mark + chosen)) == (
        BY_HAND[family][0], "x" + BY_HAND[family][1],
    )  # fmt: skip


CONVERSATIONS = {
    "one turn": ([user("What is 12 + 345?")], "The sum is 357.", "12345"),
    "turns": ([user("hello"), says("hi, what is it?"), user("why?")], "because", "it is what it is"),
    "white space": ([user(" two  spaces\n\nand lines ")], "\n\n a b\t", " leading"),
    "unicode": ([user("naïve 🙂 中文")], "🙂🙂 ok", "\u200bÜ"),
    "boundary": ([user("x")], "\nassistant", "assistant: 7\n"),
}


@pytest.mark.parametrize("family", CHAT)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_token_by_token(family: str, name: str) -> None:
    tokenizer = tokenizer_of(family)
    prompt, *answers = CONVERSATIONS[name]
    encoded = encode(tokenizer, pair(prompt, *answers))
    own, *responses = parts(encoded)
    given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert own == given
    end = tokenizer.convert_tokens_to_ids(END[family])
    for response, answer in zip(responses, answers, strict=True):
        whole = tokenizer.apply_chat_template([*prompt, says(answer)], tokenize=False)
        text = whole[: whole.rindex(END[family]) + len(END[family])]  # nothing after it is ever generated
        assert tokenizer.decode(own + response) == tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        assert response[-1] == end and response.count(end) == 1
        together = tokenizer(text, add_special_tokens=False)["input_ids"]
        if together[: len(own)] == own:  # else a token spans the border in the text
            assert response == together[len(own) :]
        assert (own + response).count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", ["llama3", "mistral", "zephyr", "gemma"])
def test_the_named_templates_write_what_their_families_do(name: str) -> None:
    tokenizer = tokenizer_of(name)
    rows = [pair(prompt, *answers) for prompt, *answers in CONVERSATIONS.values()]
    named, own = (encode(tokenizer, *rows, template=template) for template in (name, None))
    assert named.tokens.tolist() == own.tokens.tolist() and named.lengths.tolist() == own.lengths.tolist()


def test_chatml_and_plain_by_hand() -> None:
    neox = tokenizer_of("neox")
    prompt, chosen, _ = parts(
        encode(neox, pair([user("hi"), says("a"), user("b")], "yes"), template="chatml")
    )
    assert neox.decode(prompt) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    # <|im_end|> is text to this tokenizer, so the end-of-sequence token follows it
    assert neox.decode(chosen) == "yes<|im_end|><|endoftext|>"
    system = {"role": "system", "content": "Be kind."}
    prompt, chosen, _ = parts(encode(neox, pair([system, user("hi")], "yes"), template="plain"))
    assert (neox.decode(prompt), neox.decode(chosen)) == (
        "Be kind.\n\nHuman: hi\n\nAssistant:", " yes<|endoftext|>",
    )  # fmt: skip
    assert set(named_templates()) == set(NAMED)


def test_hermes_by_hand() -> None:
    qwen = tokenizer_of("qwen")
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    system, result = {"role": "system", "content": "Be kind."}, {"role": "tool", "content": "blue"}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"prompt": [system, user("look"), calling, result], "chosen": [says("blue")], "rejected": [calling]}
    prompt, chosen, rejected = map(
        qwen.decode, parts(encode(qwen, row | {"tools": [tool]}, template="hermes"))
    )
    called = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>'
    assert prompt == (
        "<|im_start|>system\nBe kind.\n\nThese functions can be called:\n<tools>\n"
        '{"type": "function", "function": {"name": "look", "parameters": {}}}\n</tools>\n'
        "A call is written as:\n"
        '<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\nlook<|im_end|>\n<|im_start|>assistant\n{called}\n"
        "<|im_start|>tool\n<tool_response>\nblue\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert (chosen, rejected) == ("blue<|im_end|>", called)
    without, chatml = (encode(qwen, pair([user("a")], "b"), template=name) for name in ("hermes", "chatml"))
    assert without.tokens.tolist() == chatml.tokens.tolist()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_named_template_goes_with_every_tokenizer(name: str, family: str) -> None:
    tokenizer = tokenizer_of(family)
    rows = [pair(prompt, *answers) for prompt, *answers in CONVERSATIONS.values()]
    encoder = encoder_of(tokenizer, template=name, system_prompt="Be kind.")
    piece = RowBlock(range(1, len(rows) + 1), rows)
    encoded = encoder(piece)
    assert len(encoded.numbers) == len(rows) and not encoded.tally.bad
    assert check_prompts(encoder, tokenizer, piece, "here") == len(rows)
    for row in range(len(rows)):
        prompt, *responses = parts(encoded, row)
        assert "Be kind." in tokenizer.decode(prompt)
        for response in responses:
            assert tokenizer.decode(response[-1:]) in (tokenizer.eos_token, END.get(family))
            if tokenizer.bos_token_id != tokenizer.eos_token_id:
                assert tokenizer.bos_token_id is None or tokenizer.bos_token_id not in response


def test_text_goes_through_a_template_where_one_is_asked_for() -> None:
    tokenizer = tokenizer_of("zephyr")
    text = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    messages = pair([user("hi")], "yes", "no")
    plain = encode(tokenizer, text)
    assert tokenizer.decode(parts(plain)[0]) == "<s> hi"  # the tokenizer's own BOS, and no template
    for template in ("tokenizer", "zephyr", str(TEMPLATES / "zephyr.jinja")):
        assert (
            encode(tokenizer, text, template=template).tokens.tolist()
            == encode(tokenizer, messages).tokens.tolist()
        )
    hh = "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant:"
    whole = {"chosen": hh + " yes", "rejected": hh + " no"}
    turns = pair([user("hi"), says("a"), user("b")], "yes", "no")
    assert (
        encode(tokenizer, whole, template="tokenizer").tokens.tolist()
        == encode(tokenizer, turns).tokens.tolist()
    )


def test_a_system_prompt_is_for_conversations_without_one() -> None:
    tokenizer = tokenizer_of("qwen")
    system = {"role": "system", "content": "mine"}
    encoded = encode(tokenizer, pair([user("q")], "a"), pair([system, user("q")], "a"), system_prompt="ours")
    assert [tokenizer.decode(parts(encoded, row)[0])[:23] for row in range(2)] == [
        "<|im_start|>system\nours", "<|im_start|>system\nmine",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"data.system_prompt needs messages"):
        encode(tokenizer, {"prompt": "q", "chosen": "a", "rejected": "b"}, system_prompt="ours")


def test_tools_are_left_as_they_are() -> None:
    tokenizer = tokenizer_of("qwen")
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    row = {"prompt": [user("q")], "chosen": [call], "rejected": [says("no")], "tools": [tool]}
    encoder = encoder_of(tokenizer)
    encoded = encoder(RowBlock([1], [row]))
    prompt, chosen, _ = map(tokenizer.decode, parts(encoded))
    assert (
        '\n{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}' in prompt
    )
    assert chosen == '<call>{"name": "add"}</call><|im_end|>'
    assert check_prompts(encoder, tokenizer, RowBlock([1], [row]), "here") == 1


def test_thoughts_belong_to_the_response_unless_the_prompt_closes_them() -> None:
    tokenizer, template = tokenizer_of("qwen"), str(TEMPLATES / "thinking.jinja")
    row = pair([user("q")], "a")
    prompt, chosen, _ = map(tokenizer.decode, parts(encode(tokenizer, row, template=template)))
    assert prompt.endswith("<|im_start|>assistant\n") and chosen == "<think>\n\n</think>\n\na<|im_end|>"
    off = {"enable_thinking": False}
    for asked, options in ((row, off), (row | {"chat_template_kwargs": off}, {})):
        encoded = encode(tokenizer, asked, template=template, template_options=options)
        prompt, chosen, _ = map(tokenizer.decode, parts(encoded))
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and chosen == "a<|im_end|>"
    thought = row | {"chosen": [says("a") | {"reasoning_content": "hm"}]}
    encoded = encode(tokenizer, thought, template=template, template_options={"enable_thinking": False})
    [(_, why)] = encoded.tally.bad
    assert why.startswith("the generation prompt closes its block of thoughts, and the answer has reasoning")


@pytest.mark.parametrize(
    ("family", "row", "reason"),
    [
        ("gemma", pair([{"role": "system", "content": "s"}, user("q")], "a"), "System role not supported"),
        ("mistral", pair([user("q"), user("r")], "a"), "roles have to alternate"),
        ("gemma", pair([user("q")], "a") | {"chosen": [CALL]}, "the template leaves out the tool calls"),
        ("zephyr", pair([user("q")], "a") | {"tools": [{"name": "f"}]}, "the template leaves out the tools"),
    ],
)  # fmt: skip
def test_what_a_template_refuses_is_a_bad_row(family: str, row: dict[str, Any], reason: str) -> None:
    [(number, why)] = encode(tokenizer_of(family), row).tally.bad
    assert number == "1" and reason in why
    [other] = re.findall(r"data\.template=(\w+)", why)  # what the message names works
    assert not encode(tokenizer_of(family), row, template=other).tally.bad


def write(folder: Path, text: str) -> str:
    (folder / "x.jinja").write_text(text)
    return str(folder / "x.jinja")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] }}{% if add_generation_prompt %}A:{% endif %}", "renders no answer"),
        ("{{ messages[0]['content'] }}", "renders no answer"),
        (
            "{{ messages[0]['content'] }}{% if add_generation_prompt %}A:{% else %}B: "
            "{{ messages[1]['content'] }}{% endif %}",
            "renders an answer elsewhere",
        ),
        ("{% for message in messages %}", "the chat template refuses the conversation"),
        ("{{ raise_exception('never') }}", "refuses the conversation: never"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_work_is_refused_before_any_row(
    tmp_path: Path, template: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_template(tokenizer_of("neox"), write(tmp_path, template), {}, None)
    with pytest.raises(ConfigError, match=r"none.jinja cannot be read"):
        find_template(tokenizer_of("neox"), str(tmp_path / "none.jinja"), {}, None)


def test_several_templates_without_a_default_are_refused_with_their_names() -> None:
    tokenizer = copy.copy(tokenizer_of("qwen"))
    tokenizer.chat_template = {"rag": "x", "code": "y"}
    with pytest.raises(ConfigError, match=r"templates \(rag, code\), and none is named default; give data"):
        find_template(tokenizer, None, {}, None)
    assert find_template(tokenizer, "chatml", {}, None) is not None


def test_a_template_that_changes_earlier_turns_leaves_the_answer(tmp_path: Path) -> None:
    # with an answer behind it, the question is rendered otherwise: generation never sees this text
    text = (
        "{% for m in messages %}{{ m['role'] }}{% if loop.last or messages | length != 4 %}"
        ": {{ m['content'] }}{% endif %}|{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = pair([user("q"), says("x"), user("r")], "a")
    encoded = encode(tokenizer_of("neox"), row, pair([user("q")], "a"), template=write(tmp_path, text))
    assert encoded.tally.bad == [] and encoded.tally.counts["rendered_otherwise"] == 2
    prompt, chosen, _ = map(tokenizer_of("neox").decode, parts(encoded))
    assert (prompt, chosen) == ("user: q|assistant: x|user: r|assistant: ", "a|<|endoftext|>")


def test_further_turns_in_a_response_are_counted() -> None:
    row = {"prompt": [user("q")], "chosen": [says("a"), user("r"), says("b")], "rejected": [says("c")]}
    encoded = encode(tokenizer_of("zephyr"), row)
    assert encoded.tally.counts["longer_responses"] == 1
    assert encoded.tally.counts["special_tokens"] == 0  # the template's own, which close the turns between
    assert tokenizer_of("zephyr").decode(parts(encoded)[1]) == "a</s>\n<|user|>\nr</s>\n<|assistant|>\nb</s>"


@cache
def plain_encoder(family: str) -> Encoder:
    return encoder_of(tokenizer_of(family))


text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
said = text.filter(lambda words: bool(words.strip()) and not set(words) & set("<>▁"))


@pytest.mark.parametrize("family", CHAT)
@settings(max_examples=40)
@given(question=said, answers=st.tuples(said, said))
@example_of(question="a\n", answers=(" b", "\nb"))
@example_of(question="1", answers=("23", "0.5"))
def test_any_conversation_comes_back(family: str, question: str, answers: tuple[str, str]) -> None:
    tokenizer = tokenizer_of(family)
    encoder = plain_encoder(family)
    try:
        _, _, texts = encoder.render(encoder.read(pair([user(question)], *answers))[0], "1")
    except BadRow:  # the same answer twice, or only white space to a template that trims
        return
    encoded = encoder(RowBlock([1], [pair([user(question)], *answers)]))
    if encoded.tally.bad:
        assert "same tokens" in encoded.tally.bad[0][1]  # trimmed to the same
        return
    prompt, *responses = parts(encoded)
    assert prompt == tokenizer.apply_chat_template(
        [user(question)], add_generation_prompt=True, return_dict=False
    )
    for response, words in zip(responses, (texts.chosen, texts.rejected), strict=True):
        assert tokenizer.decode(prompt + response) == tokenizer.decode(
            tokenizer(texts.prompt, add_special_tokens=False)["input_ids"]
        ) + str(words)


def test_the_kind_of_row_stays() -> None:
    encoder = encoder_of(tokenizer_of("qwen"))
    templated, row, _ = encoder.render(encoder.read(pair([user("q")], "a"))[0], "1")
    assert templated and row == Row(PAIRS, [user("q")], [says("a")], [says("No.")])
    assert not encoder.render(Row(PAIRS, "q", "a", "b"), "1")[0]
