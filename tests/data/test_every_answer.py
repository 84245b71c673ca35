"""`data.learn=all`: what is learned of a conversation decodes to the assistant's turns and their ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kinds import TEMPLATES, tokenizer_of

from rcpo.config.data import DataConfig
from rcpo.data.dataset import make_encoder
from rcpo.data.readers import RowBlock
from rcpo.errors import ConfigError

QWEN = tokenizer_of("qwen")
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second one"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "third"},
]
# a template that marks what is learned, as those of SmolLM3 and OLMo do
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(template: str, messages: list[dict[str, Any]], learn: str = "all") -> list[tuple[str, str]]:
    """What precedes each learned answer, and the answer, as text."""
    encoder = make_encoder(DataConfig(name="pairs", template=template, learn=learn), QWEN)
    block = RowBlock([1], [{"messages": messages}])
    encoded = encoder.fitted(block, "x")(block)
    assert not encoded.tally.bad, encoded.tally.bad
    found, start = [], 0
    for prompt, chosen, *_ in encoded.lengths.tolist():
        tokens = encoded.tokens[start : start + prompt + chosen]
        found.append((QWEN.decode(tokens[:prompt]), QWEN.decode(tokens[prompt:])))
        start += prompt + chosen
    return found


@pytest.mark.parametrize("template", ["chatml", str(TEMPLATES / "qwen.jinja")])
def test_every_answer_is_learned_once_after_what_precedes_it(template: str) -> None:
    found = learned(template, MESSAGES)
    assert [answer for _, answer in found] == ["first<|im_end|>", "second one<|im_end|>", "third<|im_end|>"]
    for place, (before, _) in zip((2, 4, 6), found, strict=True):
        assert before == QWEN.apply_chat_template(
            MESSAGES[:place], tokenize=False, add_generation_prompt=True,
            chat_template=make_encoder(DataConfig(name="pairs", template=template), QWEN).template.source,  # type: ignore[union-attr]
        )  # fmt: skip
    assert [answer for _, answer in learned(template, MESSAGES, "last")] == ["third<|im_end|>"]


def test_the_learned_tokens_are_those_that_a_template_marks(tmp_path: Any) -> None:
    """transformers' own mask (`return_assistant_tokens_mask`) selects the same tokens."""
    path = tmp_path / "marked.jinja"
    path.write_text(MARKED)
    whole = QWEN.apply_chat_template(
        MESSAGES, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [one for one, kept in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if kept]
    answers = "".join(answer for _, answer in learned(str(path), MESSAGES))
    assert QWEN.decode(marked) == answers == "first<|im_end|>second one<|im_end|>third<|im_end|>"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}])
def test_an_answer_that_the_file_marks_as_not_learned_is_context_alone(mark: dict[str, Any]) -> None:
    messages = [dict(message) for message in MESSAGES]
    messages[2] |= mark
    found = learned("chatml", messages)
    assert [answer for _, answer in found] == ["second one<|im_end|>", "third<|im_end|>"]
    assert "first<|im_end|>" in found[0][0]


def encoded_by(
    folder: Path, template: str, *messages: dict[str, Any], learn: str = "last"
) -> tuple[Any, Any]:
    (folder / "marked.jinja").write_text(template)
    encoder = make_encoder(DataConfig(name="pairs", template=str(folder / "marked.jinja"), learn=learn), QWEN)
    block = RowBlock([1], [{"messages": list(messages)}])
    return encoder, encoder.fitted(block, "x")(block)


@pytest.mark.parametrize(
    ("source", "note"),
    [
        (MARKED, []),
        # as LFM 2.5: the line break after the end of the turn is marked too
        (
            MARKED.replace("<|im_end|>{% endgeneration %}", "<|im_end|>\n{% endgeneration %}").replace(
                "{% endif %}\n{% endfor %}",
                "{% if m.role != 'assistant' %}\n{% endif %}{% endif %}{% endfor %}",
            ),
            ["its {% generation %} also marks '\\n', which is not learned"],
        ),
        (
            MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
            ["its {% generation %} does not mark '<|im_end|>', which is learned"],
        ),
    ],
)
def test_what_marks_hold_beside_an_answer_is_told(tmp_path: Path, source: str, note: list[str]) -> None:
    encoder, encoded = encoded_by(tmp_path, source, *MESSAGES)
    assert encoder.template.notes() == note and not encoded.tally.bad
    assert QWEN.decode(encoded.tokens[encoded.lengths[0, 0] :]) == "third<|im_end|>"


def test_an_answer_that_marks_leave_out_is_refused(tmp_path: Path) -> None:
    some = MARKED.replace("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", (
        "{% if m.content == 'third' %}{{ m.content }}<|im_end|>"
        "{% else %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}"
    ))  # fmt: skip
    assert not encoded_by(tmp_path, some, *MESSAGES[:5])[1].tally.bad
    [(_, reason)] = encoded_by(tmp_path, some, *MESSAGES)[1].tally.bad
    assert "{% generation %} does not mark the answer" in reason and "data.template=chatml" in reason
    none = MARKED.replace("{% generation %}", "{% generation %}{% endgeneration %}").replace(
        "<|im_end|>{% endgeneration %}", "<|im_end|>"
    )
    with pytest.raises(ConfigError, match="does not mark the answer"):
        encoded_by(tmp_path, none, *MESSAGES)


def test_each_answer_of_a_response_has_a_mark_of_its_own(tmp_path: Path) -> None:
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    one = (  # all that follows the first message is one mark
        f"{{% for m in messages[:1] %}}{turn}{{% endfor %}}"
        f"{{% generation %}}{{% for m in messages[1:] %}}{turn}{{% endfor %}}{{% endgeneration %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"prompt": MESSAGES[1:2], "chosen": MESSAGES[2:], "rejected": MESSAGES[2:3]}
    for source, bad in ((MARKED, []), (one, ["the template's {% generation %} does not mark the answer"])):
        (tmp_path / "marked.jinja").write_text(source)
        config = DataConfig(name="pairs", template=str(tmp_path / "marked.jinja"), learn="all")
        tally = make_encoder(config, QWEN)(RowBlock([1], [row])).tally
        assert [reason.partition(" as a whole")[0] for _, reason in tally.bad] == bad
