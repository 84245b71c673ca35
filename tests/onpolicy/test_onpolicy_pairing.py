"""Which answers become pairs, by hand; what is left out, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcpo.config.onpolicy import OnPolicyConfig, PairingConfig
from rcpo.onpolicy.answers import Answer
from rcpo.onpolicy.pairing import Scored, distinct, pair_up, why_none
from rcpo.onpolicy.pairs import finished_pairs, make_pairs, write_pairs
from rcpo.onpolicy.prompts import Prompt

FOUR = [Scored("a", 2.0), Scored("b", 5.0), Scored("c", 1.0), Scored("d", 4.5)]


def shown(answers: list[Scored], **config: object) -> list[str]:
    """Chosen and rejected of each pair."""
    pairs = pair_up(answers, PairingConfig(**config), "seed")  # type: ignore[arg-type]
    return [pair.chosen.text + pair.rejected.text for pair in pairs]


def test_each_way_by_hand() -> None:
    """Margins: bc 4, dc 3.5, ba 3, da 2.5, ac 1, bd 0.5."""
    assert shown(FOUR) == ["bc"]
    assert shown(FOUR, per_prompt=None) == ["bc", "dc", "ba", "da", "ac", "bd"]
    assert shown(FOUR, name="margin") == ["bd"]
    assert shown(FOUR, name="margin", min_margin=1.0, per_prompt=2) == ["ac", "da"]
    assert shown(FOUR, min_margin=4.0) == ["bc"] and shown(FOUR, min_margin=4.1) == []
    drawn = shown(FOUR, name="random", per_prompt=None)
    assert sorted(drawn) == ["ac", "ba", "bc", "bd", "da", "dc"] and drawn != sorted(drawn)


def test_of_equal_scores_the_first_drawn_are_taken_and_equal_scores_are_no_pair() -> None:
    answers = [
        Scored("wrong 1", 0.0),
        Scored("right 1", 1.0),
        Scored("right 2", 1.0),
        Scored("wrong 2", 0.0),
    ]
    assert shown(answers) == ["right 1wrong 1"]
    assert shown([answers[0], answers[3]]) == [] == shown([answers[0]])


def test_a_random_pair_is_the_prompt_s_own_and_all_are_drawn() -> None:
    config = PairingConfig(name="random")
    first = {seed: pair_up(FOUR, config, seed) for seed in map(str, range(200))}
    assert first == {seed: pair_up(FOUR, config, seed) for seed in first}
    assert len({(two[0].chosen.text, two[0].rejected.text) for two in first.values()}) == 6


def test_equal_texts_count_once() -> None:
    answers = [
        Scored("x ", 1.0),
        Scored("y", 0.0),
        Scored("x", 0.5),
        Scored("y\n", 0.0),
    ]
    assert distinct(answers) == answers[:2]


def test_an_answer_that_is_drawn_again_keeps_its_place() -> None:
    """Of equal scores the first drawn is taken: as often as the policy draws it, not the rarest."""
    answers = [Scored("often", 1.0), Scored("rare", 1.0), Scored("wrong", 0.0), Scored("often", 1.0)]
    assert [one.text for one in distinct(answers)] == ["often", "rare", "wrong"]
    assert shown(distinct(answers)) == ["oftenwrong"]


def test_why_a_prompt_has_no_pair() -> None:
    right, wrong = (
        [Scored("a", 1.0), Scored("b", 1.0)],
        [Scored("a", 0.0), Scored("b", 0.0)],
    )
    assert why_none(right, verifiable=True) == "all_right" and why_none(wrong, verifiable=True) == "all_wrong"
    assert why_none(right, verifiable=False) == "equal_scores"
    assert why_none(right[:1], verifiable=True) == why_none([], verifiable=True) == "one_answer"
    assert why_none([right[0], wrong[1]], verifiable=True) == "below_min_margin"


@given(
    st.lists(st.floats(-5, 5), max_size=7),
    st.sampled_from(["best_worst", "random", "margin"]),
    st.floats(0, 3),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_every_pair_has_its_margin(scores: list[float], name: str, least: float, count: int | None) -> None:
    answers = [Scored(str(number), score) for number, score in enumerate(scores)]
    pairs = pair_up(answers, PairingConfig(name=name, min_margin=least, per_prompt=count), "seed")
    assert all(pair.margin >= least and pair.chosen.score > pair.rejected.score for pair in pairs)
    texts = [frozenset((pair.chosen.text, pair.rejected.text)) for pair in pairs]
    assert len(set(texts)) == len(texts) and (count is None or len(texts) <= count)
    possible = sum(0 < abs(a - b) >= least for place, a in enumerate(scores) for b in scores[:place])
    assert len(pairs) == (possible if count is None else min(count, possible))


def prompt(name: str, content: object = None) -> Prompt:
    return Prompt(name, f"file:{name}", content or name, name, [1], "right", {})  # type: ignore[arg-type]


def test_what_becomes_of_each_answer_is_counted(tmp_path: Path) -> None:
    asked = [prompt(name) for name in ("mixed", "right", "cut", "unscored", "same")]
    texts = {
        "mixed": [("yes", True, 1.0), ("no", True, 0.0), (" no", True, 0.0)],
        "right": [("yes", True, 1.0), ("yes!", True, 1.0), ("oui", True, 1.0)],
        "cut": [("yes", True, 1.0), ("no, and", False, None), (" \n", True, None)],
        "unscored": [("yes", True, 1.0), ("no", True, None)],  # one was never answered
        "same": [("yes", True, 1.0), ("yes", True, 1.0), ("yes", True, 1.0)],
    }
    answers, scores = [], {}
    for one in asked:
        for number, (text, ended, score) in enumerate(texts[one.id]):
            answers.append(Answer(one, number, text, ended))
            if score is not None:
                scores[answers[-1].key] = score
    nodes = OnPolicyConfig()
    nodes.sample.n = 3
    made = make_pairs(asked, answers, scores, nodes, seed=1)
    assert made.rows == [
        {"prompt": "mixed", "chosen": "yes", "rejected": "no", "score_chosen": 1.0, "score_rejected": 0.0}
    ]
    assert dict(made.prompts) == {"asked": 5, "all_right": 1, "one_answer": 3}
    expected = {"wanted": 15, "unanswered": 1, "cut_off": 1, "empty": 1, "unscored": 1, "repeated": 3}
    assert dict(made.answers) == expected
    about = write_pairs(tmp_path, made, {"seed": 1})
    assert finished_pairs(tmp_path) == about and about["score_mean"] == 9 / 11
    (tmp_path / "pairs.jsonl").write_text("")
    assert finished_pairs(tmp_path) is None


def test_a_conversation_s_pair_holds_messages_and_all_that_its_template_reads(tmp_path: Path) -> None:
    content = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    more = {"chat_template_kwargs": {"enable_thinking": False}}
    asked = Prompt("p", "file:1", content, "…", [1], None, more)
    answers = [Answer(asked, 0, "2\u2028or so", True), Answer(asked, 1, "3", True)]
    made = make_pairs([asked], answers, {"p/0": 9.0, "p/1": 2.5}, OnPolicyConfig(), seed=1)
    assert made.rows == [
        {
            "prompt": content,
            "chosen": [{"role": "assistant", "content": "2\u2028or so"}],
            "rejected": [{"role": "assistant", "content": "3"}],
            **more,
            "score_chosen": 9.0,
            "score_rejected": 2.5,
        }
    ]


@pytest.mark.parametrize("pairing", ["best_worst", "margin", "random"])
def test_pairs_do_not_depend_on_where_a_prompt_stands(pairing: str) -> None:
    asked = [prompt(str(number)) for number in range(6)]
    answers = [Answer(one, number, str(number), True) for one in asked for number in range(4)]
    scores = {one.key: float((one.number * 7 + int(one.prompt.id)) % 5) for one in answers}
    nodes = OnPolicyConfig(pairing=PairingConfig(name=pairing))
    rows = make_pairs(asked, answers, scores, nodes, seed=3).rows
    other = make_pairs(asked[::-1], answers[::-1], scores, nodes, seed=3).rows
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in other[::-1]]
    if pairing == "random":  # of equal margins, the others take the first that was drawn
        nodes.sample.round = 2
        assert make_pairs(asked, answers, scores, nodes, seed=3).rows != rows
