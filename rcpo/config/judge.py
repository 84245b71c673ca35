"""The configuration of the judge: a model behind an endpoint that compares answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class JudgeConfig:
    """Who judges (`base_url`, `model`), what (`prompts`, `against`), and how requests are made.

    `prompts` None are the held-out ones. `against` is `reference`, a run's or a model's folder, a file of
    answers, or None: the answers that the prompts come with. `template` is a file with {instruction},
    {first} and {second}. `api_key_env` names the environment variable that holds the key. `max_tokens` and
    `temperature` None are not sent. `timeout` and `backoff` are seconds; prices are of a million tokens.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    prompts: str | None = None
    against: str | None = None
    template: str | None = None
    max_examples: int | None = None
    max_tokens: int | None = 256
    temperature: float | None = 0.0
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    price_in: float | None = None
    price_out: float | None = None
