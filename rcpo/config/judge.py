"""The configuration of an endpoint, and of the judge: a model behind one that compares answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from rcpo.config.fields import key
from rcpo.config.paths import is_file, local, mode_of
from rcpo.errors import ConfigError


@dataclass(kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint, and how to ask it."""

    base_url: str | None = key(None, "address of an OpenAI-compatible endpoint, up to and with /v1")
    model: str | None = key(None, "the model, as the endpoint calls it")
    api_key_env: str = key("OPENAI_API_KEY", "environment variable that holds the key")
    concurrency: int = key(8, "requests at a time", at_least=1, at_most=256)
    timeout: float = key(120.0, "seconds without a byte", above=0)
    retries: int = key(6, "tries after the first, for failures that pass", at_least=0, at_most=100)
    backoff: float = key(1.0, "seconds before the first retry, doubled each time", at_least=0, at_most=600)
    price_in: float | None = key(None, "price of a million prompt tokens, for the estimate", at_least=0)
    price_out: float | None = key(None, "price of a million answer tokens, for the estimate", at_least=0)

    def price(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost; None where no price is given."""
        if self.price_in is None and self.price_out is None:
            return None
        return ((self.price_in or 0) * prompt_tokens + (self.price_out or 0) * completion_tokens) / 1e6


@dataclass(kw_only=True)
class JudgeConfig(EndpointConfig):
    """The model that judges, and what it compares."""

    prompts: str | None = key(
        None, "a file of prompts in AlpacaEval's format; null: the held-out ones", path=True
    )
    against: str | None = key(
        None, "reference, a run's or model's folder, or a file; null: the answers in the prompts", path=True
    )
    template: str | None = key(
        None, "a text file with {instruction}, {first}, and {second}; null: rcpo's own", path=True
    )
    max_examples: int | None = key(None, "prompts; null: all", at_least=1)
    max_tokens: int | None = key(256, "tokens of a verdict; null: not sent", at_least=1)
    temperature: float | None = key(
        0.0, "sampling temperature of the judge; null: not sent", at_least=0, at_most=2
    )


REFERENCE = "reference"  # judge.against: the policy that training compares with


COMPARED = ("{instruction}", "{first}", "{second}")


RATED = ("{instruction}", "{answer}")


def check_judge(judge: JudgeConfig, *, wanted: bool) -> None:
    """Raise ConfigError for what no judgement could use; `wanted`: one is asked for."""
    check_endpoint("judge", judge)
    for name, value in (("prompts", judge.prompts), ("template", judge.template)):
        if value is not None and not is_file(f"judge.{name}", value):
            raise ConfigError(f"judge.{name}={value} is not a file")
    if judge.against not in (None, REFERENCE) and mode_of("judge.against", str(judge.against)) is None:
        raise ConfigError(
            f"judge.against={judge.against} does not exist; give reference, a run's or model's folder, a "
            "file of answers, or null for the answers that the prompts come with"
        )
    if not wanted:
        return
    for name, what in (("base_url", "an OpenAI-compatible endpoint"), ("model", "the judging model's name")):
        if getattr(judge, name) is None:
            raise ConfigError(f"eval.judge=true needs {what}: judge.{name}=")
    if judge.template is not None:
        read_template(judge.template)


def check_endpoint(node: str, config: EndpointConfig) -> None:
    """Raise ConfigError for an address or a key's name that is none; `node` holds the keys."""
    _check_key_name(node, config.api_key_env)
    if config.base_url is not None:
        _check_url(node, config.base_url)


def read_template(path: str, fields: tuple[str, ...] = COMPARED) -> str:
    """The text of `judge.template`; raises ConfigError where it lacks a field."""
    try:
        text = local("judge.template", path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"judge.template={path} cannot be read: {error}") from error
    lacking = [field for field in fields if field not in text]
    if lacking:
        raise ConfigError(f"judge.template={path} lacks {', '.join(lacking)}")
    return text


def _check_key_name(node: str, name: str) -> None:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ConfigError(
            f"{node}.api_key_env is not the name of an environment variable (capitals, digits, underscores); "
            f"export the key and give the variable's name: {node}.api_key_env=OPENAI_API_KEY"
        )


def _check_url(node: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        whole = False
    if not whole or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{node}.base_url is not an http or https address, such as https://host/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{node}.base_url holds a user, a query or a fragment; give the address alone, such as "
            f"https://host/v1: a key goes into the environment ({node}.api_key_env)"
        )
