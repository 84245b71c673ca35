"""Closed-loop calibration: α follows from what happened to responses that the policy has not been trained on.

The band across samples is a few percent wide and its edges are noisy, so no α computed beforehand hits it.
Its prediction can be observed instead. With w and l the mean log-ratios per token of fresh winners and losers
against the starting policy, f = max(0, target − w) is how far the winner fell, and r = max(0, l − target) how
far the loser rose:

    I ← (I + k_i f) ⊖ k_i r,   log α = (I + k_p f⁺) ⊖ k_p r⁺        f⁺, r⁺: of w + h ẇ and l + h l̇

A falling winner raises α; a rising loser lowers it; between, α returns to 1, the objective as it is. ⊖
subtracts in full down to α = 1, and a quarter of the rest below, since the two sides of 1 are not alike:
above it log-ratios rise to a bound, below it they fall without one. These are the proportional and integral
terms of a Lagrangian for the constraint that the winner must not fall (PID Lagrangian methods, Stooke et al.
2020). The derivative, in the form of a look ahead, is what makes it stable: AdamW's momentum makes log-ratios
follow α with a lag of about ten steps. Where log-ratios answer to α more strongly than k_p is made for, the
loop swings; then it eases its gains.
"""

from __future__ import annotations

import math
from typing import Any

from rcpo.method.averages import Average
from rcpo.method.band import Dynamics, Movement

FAST, SLOW = 0.7, 0.93
"""Memories per step of the two averages of w and l, whose lags differ by eleven steps."""

PROPORTIONAL, INTEGRAL, AHEAD = 4.0, 0.4, 3.0
"""k_p per nat and token, k_i per nat, token and step, and how far to look ahead in lags (h = 33 steps).

Chosen on the plants of tests/method/test_loop.py. With k_i 0.2 a winner whose drift grows, as epochs of 64
pairs a step make it, is 0.021 nats below its start, with 0.4 it is 0.013. With 0.5, or 0.2 and k_p 5, both
sides together are 0.035 and 0.053 nats outside where α moves the winner most, with these 0.026.
"""

LEAK = 0.995
"""Of the integral for each step inside, where α returns to 1: by half in 140 steps."""

SLEW = 0.5
"""Largest change of log α for each step since the last reading: by a bad one α moves by a factor of 1.6."""

SWING, EASE = 0.05, 0.6
"""How far f − r/4 goes to either side in a swing, in nats per token, and what that multiplies k_p and k_i by.

A winner that α moves by 0.12 nats a step, as SmolLM2's does at 3e-5, is driven to swings of 0.5 nats
without (simulated; 0.01 with).
"""

BELOW = 0.25
"""The part of a loser's rise that counts below α = 1.

On HH-RLHF with 3.7M parameters the winner ends at +0.00 with a constant α of 1.25, and at −9.2 with 0.8. With
1 instead, the loop answers a few losers that rose with an α from which both sides fall below their start.
"""


class LoopRule:
    """log α from the movement of fresh pairs; `limit` bounds |log α| and its integral (anti-windup).

    `target` is what the winner has to keep, in nats per token: 0 where it started, or more for a winner that
    is to rise. The loser may not exceed it.
    """

    def __init__(self, *, target: float = 0.0, limit: float) -> None:
        self.target = target
        self.saturated = 0
        self._limit = limit
        self._integral = 0.0
        self._log_alpha = 0.0
        self._gain, self._side = 1.0, 0.0
        self._averages = [Average(memory) for memory in (FAST, SLOW, FAST, SLOW)]  # of w, then of l

    def __call__(self, dynamics: Dynamics) -> float | None:
        """Return log α; unchanged without a reading."""
        return self._log_alpha if dynamics.movement is None else self.follow(dynamics.movement)

    def follow(self, movement: Movement) -> float:
        """log α after a reading."""
        steps = movement.steps
        if not math.isfinite(movement.winner + movement.loser):
            return self._log_alpha
        values = (movement.winner, movement.winner, movement.loser, movement.loser)
        u, slow_u, v, slow_v = (a.add(value, steps) for a, value in zip(self._averages, values, strict=True))
        fell, rose = self._outside(u, v)
        self._ease(fell - BELOW * rose)
        if fell or rose:
            gain = self._gain * INTEGRAL * steps
            integral = _lower(self._integral + gain * fell, gain * rose)
        else:
            integral = self._integral * LEAK**steps
        self._integral = _clamp(integral, self._limit)
        fell, rose = self._outside(u + AHEAD * (u - slow_u), v + AHEAD * (v - slow_v))
        gain = self._gain * PROPORTIONAL
        wanted = _lower(self._integral + gain * fell, gain * rose)
        self.saturated += abs(wanted) > self._limit
        change = _clamp(wanted, self._limit) - self._log_alpha
        self._log_alpha += _clamp(change, SLEW * steps)
        return self._log_alpha

    def metrics(self) -> dict[str, Any]:
        """The averages that the loop follows, its integral and gain, and how often the clamp cut it."""
        return {
            "rc/winner": self._averages[0].value,
            "rc/loser": self._averages[2].value,
            "rc/integral": self._integral,
            "rc/gain": self._gain,
            "rc/saturated": self.saturated,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next reading depends on, ready for JSON."""
        return {
            "averages": [average.state_dict() for average in self._averages],
            "integral": self._integral,
            "log_alpha": self._log_alpha,
            "gain": self._gain,
            "side": self._side,
            "saturated": self.saturated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.load_state_dict(saved)
        self._integral, self._log_alpha = state["integral"], state["log_alpha"]
        self._gain, self._side = state.get("gain", 1.0), state.get("side", 0.0)  # older checkpoints lack them
        self.saturated = state["saturated"]

    def _ease(self, error: float) -> None:
        """Lower the gains where the error, f − r/4, went from one side to the other: the loop drives it."""
        if abs(error) > SWING:
            side = math.copysign(1.0, error)
            if side == -self._side:
                self._gain *= EASE
            self._side = side

    def _outside(self, winner: float, loser: float) -> tuple[float, float]:
        """How far the winner is below the target, and the loser above it."""
        return max(0.0, self.target - winner), max(0.0, loser - self.target)


def _lower(log_alpha: float, by: float) -> float:
    """log α ⊖ `by`: in full down to 0, and a quarter of the rest below."""
    above = max(0.0, log_alpha)
    return log_alpha - by if by <= above else log_alpha - above - BELOW * (by - above)


def _clamp(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))
