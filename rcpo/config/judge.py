"""The configuration of an endpoint, and of the judge: a model behind one that compares answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from rcpo.config.paths import is_file, local, mode_of
from rcpo.errors import ConfigError


@dataclass(kw_only=True)
class EndpointConfig:
    """Which model answers (`base_url`, `model`), and how requests are made.

    `api_key_env` names the environment variable that holds the key. `timeout` and `backoff` are seconds;
    prices are of a million tokens.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    price_in: float | None = None
    price_out: float | None = None

    def price(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost; None where no price is given."""
        if self.price_in is None and self.price_out is None:
            return None
        return ((self.price_in or 0) * prompt_tokens + (self.price_out or 0) * completion_tokens) / 1e6


@dataclass(kw_only=True)
class JudgeConfig(EndpointConfig):
    """Who judges, what (`prompts`, `against`), and how requests are made.

    `prompts` None are the held-out ones. `against` is `reference`, a run's or a model's folder, a file of
    answers, or None: the answers that the prompts come with. `template` is a file with {instruction},
    {first} and {second}. `max_tokens` and `temperature` None are not sent.
    """

    prompts: str | None = None
    against: str | None = None
    template: str | None = None
    max_examples: int | None = None
    max_tokens: int | None = 256
    temperature: float | None = 0.0


REFERENCE = "reference"  # judge.against: the policy that training compares with


COMPARED = ("{instruction}", "{first}", "{second}")


RATED = ("{instruction}", "{answer}")


def check_judge(judge: JudgeConfig, *, wanted: bool) -> None:
    """Raises ConfigError for what no judgement could use; `wanted`: one is asked for."""
    check_endpoint("judge", judge)
    for key, value in (("prompts", judge.prompts), ("template", judge.template)):
        if value is not None and not is_file(f"judge.{key}", value):
            raise ConfigError(f"judge.{key}={value} is not a file")
    if judge.against not in (None, REFERENCE) and mode_of("judge.against", str(judge.against)) is None:
        raise ConfigError(
            f"judge.against={judge.against} does not exist; give reference, a run's or model's folder, a "
            "file of answers, or null for the answers that the prompts come with"
        )
    if not wanted:
        return
    for key, what in (("base_url", "an OpenAI-compatible endpoint"), ("model", "the judging model's name")):
        if getattr(judge, key) is None:
            raise ConfigError(f"eval.judge=true needs {what}: judge.{key}=")
    if judge.template is not None:
        read_template(judge.template)


def check_endpoint(node: str, config: EndpointConfig) -> None:
    """Raises ConfigError for an address or a key's name that is none; `node` holds the keys."""
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
