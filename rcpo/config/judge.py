"""The configuration of an endpoint, and of the judge: a model behind one that compares answers."""

from __future__ import annotations

from dataclasses import dataclass


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
