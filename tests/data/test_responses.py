"""What is learned after a template's generation prompt, where finished conversations render differently.

Expected texts are typed by hand.
"""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from kinds import TEMPLATES, tokenizer_of
from test_templates import encode, encoder_of, pair, parts, says, user, write
from transformers import PreTrainedTokenizerFast

from rcpo.data.encode import Encoded
from rcpo.data.invariant import check_prompts
from rcpo.data.readers import RowBlock
from rcpo.data.templates import find_template
from rcpo.errors import ConfigError

QWEN = tokenizer_of("qwen")
OPEN = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
THOUGHT = pair([user("q")], "a") | {"chosen": [says("a") | {"reasoning_content": "hm"}]}
INLINE = pair([user("q")], "<think>\nhm\n</think>\n\na", "<think>\nno\n</think>\n\nb")
PLAIN = pair([user("q")], "a", "b")


def path(name: str) -> str:
    return str(TEMPLATES / f"{name}.jinja")


def texts(row: dict[str, Any], name: str, tokenizer: PreTrainedTokenizerFast = QWEN, **settings: Any) -> Any:
    """Prompt and chosen response as text; the prompt is what transformers gives to generation."""
    encoder = encoder_of(tokenizer, template=path(name), **settings)
    encoded = encoder(RowBlock([1], [row]))
    assert not encoded.tally.bad, encoded.tally.bad
    assert check_prompts(encoder, tokenizer, RowBlock([1], [row]), "here") == 1
    prompt, chosen, *_ = map(tokenizer.decode, parts(encoded))
    return prompt, chosen


def refusal(row: dict[str, Any], name: str, **settings: Any) -> str:
    [(_, why)] = encode(QWEN, row, template=path(name), **settings).tally.bad
    return why


def test_an_opened_block_of_thoughts_is_closed_at_once_or_left_out() -> None:
    assert texts(PLAIN, "opened", reasoning="empty") == (OPEN + "<think>\n", "\n</think>\n\na<|im_end|>")
    assert texts(PLAIN, "opened", reasoning="strip") == (OPEN, "a<|im_end|>")
    # what finished turns show of an empty block
    assert texts(PLAIN, "shown", reasoning="empty") == (OPEN + "<think>\n", "\n</think>\na<|im_end|>")
    assert texts(PLAIN, "shown", reasoning="strip") == (OPEN, "<think></think>a<|im_end|>")


@pytest.mark.parametrize("row", [THOUGHT | {"rejected": INLINE["rejected"]}, INLINE])
def test_an_answers_own_reasoning_follows_the_opened_block(row: dict[str, Any]) -> None:
    assert texts(row, "opened") == (OPEN + "<think>\n", "hm\n</think>\n\na<|im_end|>")
    assert texts(row, "shown") == (OPEN + "<think>\n", "hm\n</think>\na<|im_end|>")
    for reasoning, name in (("empty", "opened"), ("strip", "opened"), ("empty", "shown"), ("strip", "shown")):
        assert texts(row, name, reasoning=reasoning) == texts(PLAIN, name, reasoning=reasoning)


def test_what_a_model_says_after_an_opened_block_is_reasoning_too() -> None:
    row = pair([user("q")], "hm\n</think>\n\na", "no\n</think>\n\nb")
    assert texts(row, "opened") == (OPEN + "<think>\n", "hm\n</think>\n\na<|im_end|>")
    assert texts(row, "opened", reasoning="strip") == (OPEN, "a<|im_end|>")


def test_an_answer_without_reasoning_names_the_choices_where_a_block_is_opened() -> None:
    for name in ("opened", "shown"):
        why = refusal(PLAIN, name)
        assert "the answer has none" in why
        assert "data.reasoning=empty" in why and "data.reasoning=strip" in why


def test_a_tool_call_after_an_opened_block() -> None:
    row = PLAIN | {"chosen": [{"role": "assistant", "tool_calls": [CALL]}]}
    called = '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>'
    assert texts(row, "shown", reasoning="empty") == (OPEN + "<think>\n", "\n</think>\n" + called)
    assert texts(row, "shown", reasoning="strip") == (OPEN, "<think></think>" + called)
    assert "leaves out the tool calls; data.template=hermes" in refusal(row, "opened", reasoning="empty")


def test_a_system_message_that_moves_stays_where_generation_sees_it() -> None:
    row = pair([{"role": "system", "content": "s"}, user("p"), says("x"), user("q")], "a")
    encoded = encode(QWEN, row, template=path("moved"))
    prompt, chosen, _ = map(QWEN.decode, parts(encoded))
    # the finished conversation reads, without s: <|im_start|>q<|im_end|>a<|endoftext|>
    assert prompt == "<|im_start|>p<|im_end|>x<|endoftext|><|im_start|>s\n\nq<|im_end|>"
    assert chosen == "a<|endoftext|>"
    assert encoded.tally.counts["rendered_otherwise"] == 2
    assert encode(QWEN, PLAIN, template=path("moved")).tally.counts["rendered_otherwise"] == 0


def test_other_white_space_before_answers() -> None:
    prompt, chosen = texts(pair([user("q")], " a\n", "b"), "trimmed")
    assert (prompt, chosen) == ("USER: q\nASSISTANT:\n", "a<|im_end|>")
    [note] = encoder_of(QWEN, template=path("trimmed")).template.notes()  # type: ignore[union-attr]
    assert "prompts end with '\\n'" in note


def test_thoughts_that_the_prompt_closes() -> None:
    assert texts(PLAIN, "closed") == (OPEN + "<think>\n</think>", "a<|im_end|>")
    for row in (THOUGHT, INLINE):
        assert "data.reasoning=strip" in refusal(row, "closed")
        assert texts(row, "closed", reasoning="strip") == (OPEN + "<think>\n</think>", "a<|im_end|>")


def test_reasoning_that_a_template_does_not_write_is_refused_or_learned_as_the_answer_has_it() -> None:
    assert refusal(THOUGHT, "qwen") == (
        "the template does not render the answer's reasoning; "
        "data.reasoning=strip removes it from the answers"
    )
    assert texts(THOUGHT, "qwen", reasoning="strip")[1] == "a<|im_end|>"
    assert texts(INLINE, "qwen")[1] == "<think>\nhm\n</think>\n\na<|im_end|>"


def test_reasoning_that_a_template_takes_out_of_the_text_is_learned(tmp_path: Path) -> None:
    opened = (TEMPLATES / "opened.jinja").read_text().replace("<think>\\n", "")
    encoded = encode(QWEN, INLINE, template=write(tmp_path, opened))
    assert [QWEN.decode(part) for part in parts(encoded)] == [
        OPEN, "<think>\nhm\n</think>\n\na<|im_end|>", "<think>\nno\n</think>\n\nb<|im_end|>",
    ]  # fmt: skip
    assert encoded.tally.counts["rendered_otherwise"] == 2


@pytest.mark.parametrize("name", ["chatml", "zephyr", "plain", "llama3"])
def test_tools_and_calls_that_a_named_template_does_not_write_are_refused(name: str) -> None:
    call = PLAIN | {"chosen": [says("Let me look.") | {"tool_calls": [CALL]}]}
    earlier = pair([user("q"), says("x") | {"tool_calls": [CALL]}, user("r")], "a")
    encoded = encode(QWEN, PLAIN | {"tools": [TOOL]}, call, earlier, template=name)
    assert [why.partition("; data.template=hermes")[0] for _, why in encoded.tally.bad] == [
        "the template leaves out the tools",
        "the template leaves out the tool calls",
        "the template leaves out the tool calls",
    ]


def test_a_call_whose_arguments_a_template_does_not_write_is_refused(tmp_path: Path) -> None:
    bare = (TEMPLATES / "qwen.jinja").read_text().replace("(call.function | tojson)", "call.function.name")
    row = PLAIN | {"chosen": [says("") | {"tool_calls": [CALL]}], "tools": [TOOL]}
    assert encode(QWEN, row).tally.bad == []
    [(_, why)] = encode(QWEN, row, template=write(tmp_path, bare)).tally.bad
    assert why.startswith("the template leaves out the tool calls; data.template=hermes renders")


def test_a_message_whose_role_a_template_does_not_know_is_refused(tmp_path: Path) -> None:
    text = (
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = pair([user("q"), {"role": "tool", "content": "4"}], "a")
    [(_, why)] = encode(QWEN, row, template=write(tmp_path, text)).tally.bad
    assert why.startswith(
        "the template leaves out a message of the role 'tool'; data.template=hermes renders"
    )


def test_a_message_that_a_template_writes_in_its_own_way_is_no_lost_one(tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | tojson if m.role == 'user' else m.content }}|"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoded = encode(QWEN, pair([user('two\n"lines"')], "a"), template=write(tmp_path, text))
    assert encoded.tally.bad == []
    assert QWEN.decode(parts(encoded)[0]) == 'user: "two\\n\\"lines\\""|assistant: '


DATED = (
    "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_writes_the_runs_date(tmp_path: Path) -> None:
    def run(day: str) -> tuple[Encoded, dict[str, str]]:
        encoder = encoder_of(QWEN, template=write(tmp_path, DATED), date=day)
        assert check_prompts(encoder, QWEN, RowBlock([1], [PLAIN]), "here") == 1
        return encoder(RowBlock([1], [PLAIN])), encoder.ingredients()

    first, ingredients = run("2026-01-31")
    assert QWEN.decode(parts(first)[0]) == "31 Jan 2026|user: q|assistant: "
    again, same = run("2026-01-31")
    assert first.tokens.tolist() == again.tokens.tolist() and ingredients == same
    assert {name for name, value in run("2026-02-01")[1].items() if value != same[name]} == {"template"}


def test_the_date_does_not_matter_to_a_template_that_does_not_write_it() -> None:
    one, other = (encoder_of(QWEN, date=day).ingredients() for day in ("2026-01-31", "2026-02-01"))
    assert one == other


def test_a_template_without_a_date_of_its_run_writes_today(tmp_path: Path) -> None:
    template = find_template(QWEN, write(tmp_path, DATED), {}, None)
    assert template is not None and template.day == date.today()


@pytest.mark.parametrize(
    "name",
    ["tokenize", "return_dict", "return_tensors", "continue_final_message", "add_generation_prompt", "tools",
     "chat_template", "messages"],
)  # fmt: skip
def test_what_would_change_the_rendering_itself_is_refused(name: str) -> None:
    row = PLAIN | {"chat_template_kwargs": {name: True}}
    [(_, why)] = encode(QWEN, row).tally.bad
    assert name in why and "chat_template_kwargs" in why
    with pytest.raises(ConfigError, match=rf"data.template_options.{name}: no template reads"):
        encoder_of(QWEN, template_options={name: True})


def test_a_variable_that_is_missing_names_the_remedy(tmp_path: Path) -> None:
    needs = write(tmp_path, "{{ bos_token + 'x' }}" + DATED.partition("|")[2])
    with pytest.raises(ConfigError, match=r"give it as data.template_options=\{bos_token: \"\"\}"):
        encoder_of(QWEN, template=needs)
    encoder = encoder_of(QWEN, template=needs, template_options={"bos_token": ""})
    prompt, *_ = parts(encoder(RowBlock([1], [PLAIN])))
    assert QWEN.decode(prompt) == "xuser: q|assistant: "
    # transformers renders what is only printed and missing as nothing
    printed = write(tmp_path, "{{ bos_token }}{{ functions }}" + DATED.partition("|")[2])
    prompt, *_ = parts(encode(QWEN, PLAIN, template=printed))
    assert QWEN.decode(prompt) == "user: q|assistant: "
    rendered = QWEN.apply_chat_template(
        [user("q")], chat_template=Path(printed).read_text(), tokenize=False, add_generation_prompt=True
    )
    assert rendered == "user: q|assistant: "


def test_a_template_for_rows_with_tools_alone(tmp_path: Path) -> None:
    needs = write(
        tmp_path, "{% for t in tools %}{{ t.function.name }}|{% endfor %}" + DATED.partition("|")[2]
    )
    encoded = encode(QWEN, PLAIN, PLAIN | {"tools": [TOOL]}, template=needs)
    assert encoded.numbers.tolist() == [2] and "refuses the conversation" in encoded.tally.bad[0][1]
    assert QWEN.decode(parts(encoded)[0]) == "add|user: q|assistant: "


def test_the_end_of_a_turn_goes_as_far_as_the_end_of_sequence_token(tmp_path: Path) -> None:
    # Command R7B ends a turn with two tokens, the second of which ends generation
    text = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_start|><|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chosen = parts(encode(QWEN, PLAIN, template=write(tmp_path, text)))[1]
    assert QWEN.decode(chosen) == "a<|im_start|><|im_end|>"
    spaced = text.replace("<|im_start|><|im_end|>", "<|im_start|>\n<|im_end|>")
    chosen = parts(encode(QWEN, PLAIN, template=write(tmp_path, spaced)))[1]
    assert QWEN.decode(chosen) == "a<|im_start|>"
