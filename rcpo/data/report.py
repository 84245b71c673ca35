"""What loading did to the data: nothing is dropped or cut without being counted here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rcpo.errors import ConfigError


@dataclass
class Tally:
    """What became of some rows: `bad` places with their reasons, in order, and `counts` of what was changed.

    The counts: rows `read`, those that give a bad pair (`bad_rows`), those that a template rendered
    (`templated`); `truncated_prompts`, `truncated_responses` and, in all, `tokens_cut`; responses of several
    messages (`longer_responses`), with turns in their text (`turns_as_text`), or that spell special tokens
    (`special_tokens`); rows whose responses begin with the prompt (`repeated_prompts`); responses that the
    finished conversation renders differently (`rendered_otherwise`).
    """

    bad: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def cut(self, what: str, tokens: int) -> None:
        """Count a prompt or response (`what`: prompts, responses) that lost tokens, if it did."""
        if tokens:
            self.counts[f"truncated_{what}"] += 1
            self.counts["tokens_cut"] += tokens


@dataclass
class DataReport:
    """Counts of one `load_datasets`.

    `drop` is `data.on_bad=drop`: unusable pairs are counted and left out, otherwise the first is an error.
    `dropped` and `examples` map a reason to how many pairs it cost and to the first place (`file:line`).
    `left_out` counts the usable pairs that the configuration leaves out, by reason, `left_out_first` has
    the first of each. `forms` are how the sources were read, `template` is the chat template's name,
    `template_notes` what is special about it, `learn` which answers of several turns are learned
    (data.learn). `shared_prompts` are held-out pairs whose prompt is trained
    on.
    """

    source: str
    drop: bool = False
    train: int = 0
    evaluation: int = 0
    control: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    left_out_first: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    template_notes: list[str] = field(default_factory=list)
    learn: str = "last"
    shared_prompts: int = 0

    def bad(self, reason: str, place: str) -> None:
        """Count a pair that is left out and keep the first place of each reason, or raise ConfigError."""
        if not self.drop:
            raise ConfigError(f"{place}: {reason}; correct it, or leave such pairs out: data.on_bad=drop")
        self.dropped[reason] += 1
        self.examples.setdefault(reason, place)

    def leave_out(self, reason: str, count: int, first: str) -> None:
        """Count usable pairs that the configuration leaves out; `first` names one of them."""
        self.left_out[reason] += count
        self.left_out_first.setdefault(reason, first)

    def add(self, tally: Tally, place: Callable[[str], str] = str) -> None:
        """Take a tally in; `place` makes a name for the user of one of its places."""
        for where, reason in tally.bad:
            self.bad(reason, place(where))
        self.counts.update(tally.counts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = ("read", "truncated_prompts", "truncated_responses", "tokens_cut")
        return {
            "source": self.source,
            "template": self.template,
            "train": self.train,
            "evaluation": self.evaluation,
            "dropped": dict(self.dropped),
            "first_dropped": dict(self.examples),
            "left_out": dict(self.left_out),
            **dict.fromkeys(names, 0),
            **self.counts,
            "shared_prompts": self.shared_prompts,
        }

    def lines(self) -> list[str]:
        """The counts as sentences for a person."""
        counts = self.counts
        told = [
            f"{self.source}: {counts['read']} pairs read, {self.train} to train on, "
            f"{self.evaluation} held out"
        ]
        if self.template is not None:
            told[0] += f", template {self.template}"
        if self.control:
            told.append(f"{self.control} of the pairs are set aside for rc=loop to read (rc.control.pairs)")
        told += self.template_notes
        told += [f"{name}: read as {form}" for name, form in self.forms.items()]
        if counts["left_out_ties"]:
            told.append(f"{counts['left_out_ties']} rows are ties and left out (data.ties=drop)")
        if counts["half_ties"]:
            told.append(
                f"{counts['half_ties'] // 2} ties are learned in both orders at half the weight "
                "(data.ties=keep)"
            )
        total = sum(self.dropped.values())
        if total:
            told.append(f"{total} pairs dropped:")
            for reason, count in self.dropped.most_common():
                told.append(f"  {count} {reason} (first: {self.examples[reason]})")
        for reason, count in self.left_out.items():
            told.append(f"left out: {count} pairs with {reason} (first: {self.left_out_first[reason]})")
        if counts["tokens_cut"]:
            told.append(
                f"truncated: {counts['truncated_prompts']} prompts (data.max_prompt_length), "
                f"{counts['truncated_responses']} responses at their end (data.max_length), "
                f"{counts['tokens_cut']} tokens in all"
            )
        if counts["longer_responses"]:
            which = "every answer" if self.learn == "all" else "the last answer alone"
            told.append(
                f"{counts['longer_responses']} responses hold several turns, of which {which} is learned "
                f"(data.learn={self.learn})"
            )
        if counts["turns_as_text"]:
            told.append(
                f"{counts['turns_as_text']} responses hold further turns as text, which are learned too; "
                "data.template=tokenizer, or a named template, makes messages of them"
            )
        if counts["repeated_prompts"]:
            told.append(
                f"{counts['repeated_prompts']} rows have responses that begin with the whole prompt, which "
                "is learned with them; to take it out: data.columns.prompt=prompt and for each response "
                "\"data.columns.chosen='{{ chosen[prompt | length:] }}'\""
            )
        if counts["rendered_otherwise"]:
            told.append(
                f"{counts['rendered_otherwise']} responses differ from what the template renders for the "
                "finished conversation: they are the answer's own text and the end of its turn, after the "
                "prompt that generation is given"
            )
        if counts["special_tokens"]:
            told.append(f"warning: {counts['special_tokens']} responses spell special tokens in their text")
        if self.shared_prompts:
            told.append(
                f"warning: {self.shared_prompts} held-out pairs have a prompt that is also trained on"
            )
        return told
