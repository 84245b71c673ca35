"""The presets for sets of 2024 and later: a row in each set's published columns, and what it is."""

from __future__ import annotations

from typing import Any

import pytest
from kinds import tokenizer_of
from test_variants import told

from rcpo.config.composition import compose
from rcpo.config.data import DataConfig
from rcpo.config.parsing import parse
from rcpo.data.dataset import make_encoder
from rcpo.data.readers import RowBlock
from rcpo.data.records import Row


def talk(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


TEXT = ("q", "a", "b")
CHAT = ("user: q", "assistant: a", "assistant: b")
LATER = ("user: p | assistant: x | user: q", "assistant: a", "assistant: b")
# preset: (row as the set has it, what it is, its margin)
PRESETS: dict[str, tuple[dict[str, Any], tuple[str, str, str], float | None]] = {
    "ultrafeedback_argilla": (
        {"source": "s", "prompt": "q", "chosen": talk("q", "a"), "chosen-rating": 5.0, "chosen-model": "m",
         "rejected": talk("q", "b"), "rejected-rating": 3.5, "rejected-model": "n"},
        CHAT, 1.5,
    ),
    "ultrafeedback_scores": (
        {"source": "s", "instruction": "q", "models": ["m", "n", "o"], "correct_answers": [],
         "incorrect_answers": [],
         "completions": [
             {"annotations": {"helpfulness": {"Rating": "2"}}, "custom_system_prompt": "", "model": "m",
              "critique": "c", "overall_score": 6.0, "fine-grained_score": 2.0, "response": "x"},
             {"annotations": {"helpfulness": {"Rating": "5"}}, "custom_system_prompt": "", "model": "n",
              "critique": "c", "overall_score": 8.5, "fine-grained_score": 4.0, "response": "a"},
             {"annotations": {"helpfulness": {"Rating": "1"}}, "custom_system_prompt": "", "model": "o",
              "critique": "c", "overall_score": 2.0, "fine-grained_score": 1.0, "response": "b"}]},
        TEXT, 6.5,
    ),
    "helpsteer2": (
        {"split": "train", "prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 2,
         "preference_statement": "s", "preference_elaboration": "e"},
        TEXT, None,
    ),
    "helpsteer3": (
        {"domain": "general", "language": "english", "context": talk("p", "x", "q"), "response1": "a",
         "response2": "b", "overall_preference": -1, "individual_preference": [{"score": -1}]},
        LATER, None,
    ),
    "skywork": (
        {"chosen": talk("p", "x", "q", "a"), "rejected": talk("p", "x", "q", "b"), "source": "s"},
        LATER, None,
    ),
    "tulu3_8b": (
        {"id": "1", "prompt": "q", "chosen": talk("q", "a"), "rejected": talk("q", "b"), "source": "s"},
        CHAT, None,
    ),
    "orca_dpo_pairs": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        ("system: s | user: q", *CHAT[1:]), None,
    ),
    "orca_dpo_pairs_argilla": (
        {"system": "", "input": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"],
         "order": ["chosen", "rejected"], "rating": [9.0, 8.0], "status": "unchanged", "chosen_score": 9.0,
         "in_gsm8k_train": False},
        TEXT, None,
    ),
    "capybara": (
        {"source": "s", "conversation": [{"input": "p", "output": "x"}, {"input": "q", "output": "a"}],
         "original_response": "a", "chosen": talk("p", "x", "q", "a"), "rejected": talk("p", "x", "q", "b")},
        LATER, None,
    ),
    "shp2": (
        {"post_id": "1", "domain": "d", "history": "q", "c_root_id_A": "x", "c_root_id_B": "y",
         "score_A": 5, "score_B": 9, "human_ref_A": "b", "human_ref_B": "a", "labels": 0},
        TEXT, None,
    ),
    "nectar": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["s"],
         "good_natured": True,
         "answers": [{"answer": "a", "model": "m", "rank": 1.0}, {"answer": "x", "model": "n", "rank": 2.0},
                     {"answer": "b", "model": "o", "rank": 7.0}]},
        ("\n\nHuman: q\n\nAssistant: ", "a", "b"), 6.0,
    ),
    "saferlhf": (
        {"prompt": "q", "response_0": "b", "response_1": "a", "is_response_0_safe": True,
         "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0,
         "response_0_sha256": "x", "response_1_sha256": "y"},
        TEXT, None,
    ),
    "ultrainteract": (
        {"task": "t", "dataset": "d", "chosen": "a", "rejected": "b", "id": "1", "parent_id": "0",
         "trajectory": [{"from": "user", "value": "p"}, {"from": "assistant", "value": "x"},
                        {"from": "user", "value": "q"}]},
        LATER, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_a_row_of_its_set(name: str) -> None:
    row, wanted, margin = PRESETS[name]
    config: DataConfig = parse(compose([f"data={name}"])).data
    encoder = make_encoder(config, tokenizer_of("qwen")).fitted(RowBlock([1], [row]), name)
    [found] = encoder.read(row)
    assert isinstance(found, Row), found
    assert (told(found.prompt), told(found.chosen), told(found.rejected)) == wanted
    assert found.margin == margin
    assert not encoder(RowBlock([1], [row])).tally.bad


def test_turns_in_text_may_end_in_a_space() -> None:
    """Nectar's prompts do; a template still sees the question alone."""
    config: DataConfig = parse(compose(["data=nectar", "data.template=chatml"])).data
    encoder = make_encoder(config, tokenizer_of("qwen"))
    row = PRESETS["nectar"][0]
    fitted = encoder.fitted(RowBlock([1], [row]), "x")
    templated, _, pair = fitted.render(fitted.read(row)[0], "1")
    assert templated
    assert pair.prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert pair.chosen == "a<|im_end|>"
