"""Running means, options, reductions and mixtures of objectives: defaults, borders, refusals; by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rcpo.method.objectives import RunningMean, RunningMeans, get_objective
from rcpo.method.types import PairLogps


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(**more: Any) -> PairLogps:
    """Two pairs with u_w = (1, −1) and u_l = (−1, 2)."""
    given = {"chosen_lengths": vector(4, 2), "rejected_lengths": vector(2, 5)} | more
    return PairLogps(vector(-4, -6), vector(-5, -3), vector(-5, -5), vector(-4, -5), **given)


def refusal(name: str, **settings: Any) -> str:
    with pytest.raises(ValueError, match="objective") as found:
        get_objective(name, **settings)
    return str(found.value)


# --- running means --------------------------------------------------------------------------------------


def test_a_running_mean_by_hand() -> None:
    mean = RunningMean()
    assert (mean.value, mean.state_dict()) == (0.0, {"total": 0.0, "count": 0.0})
    mean.observe(vector(1, 4), vector(3, 1))  # 7 by 4
    mean.observe(vector(9))
    assert mean.value == 0.0  # constant within a step
    mean.step()
    assert mean.value == 16 / 5 and mean.state_dict() == {"total": 16.0, "count": 5.0}
    mean.observe(vector(100))
    mean.step(keep=False)  # a step that was skipped
    mean.step()
    assert mean.value == 16 / 5
    mean.step(lambda own: own + vector(4, 5))  # the other ranks alone saw some
    assert mean.value == 2.0
    mean.observe(torch.tensor([1.0], requires_grad=True))
    mean.step()
    assert mean.value == 21 / 11


def test_the_means_of_parts_are_kept_by_their_places() -> None:
    first, third = RunningMean(), RunningMean()
    means = RunningMeans([first, None, third])
    first.observe(vector(1))
    third.observe(vector(6, 8))
    means.step(lambda own: 2 * own)
    assert means.state_dict() == {"0": {"total": 2.0, "count": 2.0}, "2": {"total": 28.0, "count": 4.0}}
    third.observe(vector(6))
    means.step(keep=False)
    means.step()
    assert third.value == 7.0
    others = RunningMean(), RunningMean()
    RunningMeans([others[0], None, others[1]]).load_state_dict(means.state_dict())
    assert [mean.value for mean in others] == [1.0, 7.0]


def test_an_objective_without_a_mean_observes_nothing() -> None:
    objective = get_objective("dpo")
    objective.observe(pairs())
    assert objective.state is None
    mixed = get_objective("mix", parts=[{"name": "dpo"}, {"name": "simpo"}])
    mixed.observe(pairs())
    assert mixed.state is None


# --- one objective --------------------------------------------------------------------------------------


def test_defaults() -> None:
    objective = get_objective("dpo_shift", shift_end=1.0)
    assert (objective.nll_coef, objective.progress, objective.weighting, objective.length_alpha) == (
        0.0, 0.0, None, 1.0,
    )  # fmt: skip
    assert (
        repr(objective) == "dpo_shift(beta=0.1, shift_start=0.75, shift_end=1.0, reduction=sum, nll_coef=0.0)"
    )
    assert objective.reductions == {"sum"} and objective.sides == ("chosen", "rejected")
    assert not (objective.needs_likelihoods or objective.uses_chosen_means or objective.sorts_batch)
    assert objective.margin_ranges == []
    assert get_objective("mappo", score_scale=0.5).margin_ranges == [(0.5, (0.0, 1.0))]
    assert get_objective("aot").sorts_batch and get_objective("dpo", nll_coef=1e-9).uses_chosen_means
    assert get_objective("dpo", nll_coef=-0.5).uses_chosen_means
    assert get_objective("sft").sides == ("chosen",) and not get_objective("sft").needs_rejected


@pytest.mark.parametrize(
    ("name", "reduction"), [("dpo", "mean"), ("simpo", "mean"), ("tidpo", "importance"), ("ipo", "mean")]
)
def test_an_average_is_the_objectives_own_or_the_mean(name: str, reduction: str) -> None:
    assert get_objective(name, reduction="average").reduction == reduction


def test_optional_hyperparameters_are_left_out_where_there_are_none() -> None:
    assert get_objective("bce", optional=["beta"], beta=3.0).hyperparameters == {}
    assert get_objective("dpo", optional=["beta"], beta=3.0).hyperparameters["beta"] == 3.0
    assert refusal("bce", optional=["gamma"], beta=3.0) == (
        "objective bce has no hyper-parameter 'beta'; it has: none"
    )


def test_slopes_and_means() -> None:
    logps = pairs()
    assert get_objective("simpo").mean_slope(logps) == 1.0
    slope = get_objective("dpo").mean_slope(logps)
    assert isinstance(slope, Tensor) and slope.tolist() == [0.25, 0.5]
    assert get_objective("dpo").chosen_means(logps).tolist() == [-1, -3]
    given = logps.replace(chosen_means=vector(-7, -8))
    assert get_objective("dpo").chosen_means(given).tolist() == [-7, -8]


def test_likelihoods_weight_the_loss_and_not_the_supervised_term() -> None:
    likely = {"chosen_likelihoods": vector(0.5, 1), "rejected_likelihoods": vector(0.5, 0.25)}
    logps, plain = pairs(**likely), get_objective("ipo")(pairs())
    weighted = get_objective("ipo", weighting="wpo")
    assert weighted.needs_likelihoods and logps.likelihood.tolist() == [0.25, 0.25]
    torch.testing.assert_close(weighted(logps), plain * 0.25, rtol=1e-14, atol=0)
    both = get_objective("ipo", weighting="wpo", nll_coef=2.0)
    torch.testing.assert_close(both(logps), plain * 0.25 + 2 * vector(4, 6), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", {"weighting": "w"}, "objective.weighting='w'; choose one of wpo"),
        ("aot", {"weighting": "wpo"},
         "objective.weighting=wpo weights pairs, and objective=aot sorts the pairs of a batch"),
        ("sft", {"weighting": "wpo"},
         "objective.weighting=wpo weights pairs, and objective=sft has no rejected side"),
        ("simpo", {"length_alpha": 0.5},
         "objective.length_alpha=0.5 is defined for the summed log-probs of pairs: set it to 1, or "
         "objective.reduction=sum for objective=simpo"),
        ("sft", {"length_alpha": 0.5, "reduction": "sum"},
         "objective.length_alpha=0.5 is defined for the summed log-probs of pairs: set it to 1, or "
         "objective.reduction=sum for objective=sft"),
        ("dpo", {"length_alpha": 0.5, "nll_coef": 1.0},
         "objective.length_alpha=0.5 and objective.nll_coef do not go together: the sum is then not a "
         "multiple of the mean; set one of them to its default"),
        ("tidpo", {"nll_coef": 0.1},
         "objective.nll_coef is not defined for objective.reduction=importance; set it to 0"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    assert refusal(name, **settings) == message


def test_options_that_fit_are_kept() -> None:
    assert get_objective("simpo", reduction="sum", length_alpha=0.5).length_alpha == 0.5
    assert get_objective("sft", length_alpha=1).length_alpha == 1
    assert get_objective("dpo", nll_coef=1.0, length_alpha=1.0).nll_coef == 1.0
    assert get_objective("tidpo", nll_coef=0.0).reduction == "importance"


# --- mixtures -------------------------------------------------------------------------------------------


def test_a_part_weighs_one_unless_it_is_weighted() -> None:
    mixed = get_objective("mix", parts=[{"name": "dpo"}, {"name": "hinge", "weight": 0.25}])
    expected = get_objective("dpo")(pairs()) + 0.25 * get_objective("hinge")(pairs())
    torch.testing.assert_close(mixed(pairs()), expected, rtol=1e-14, atol=0)
    more = get_objective("mix", parts=[{"name": "dpo"}], nll_coef=0.5)
    torch.testing.assert_close(more(pairs()), get_objective("dpo", nll_coef=0.5)(pairs()), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("parts", "reduction", "reductions"),
    [
        (["dpo"], "sum", {"sum"}),
        (["simpo", "slic"], "mean", {"mean"}),
        (["simpo", "dpo"], "sum", {"sum", "mean"}),
        (["tidpo"], "importance", {"importance"}),
    ],
)
def test_sums_among_the_parts_make_a_mixture_of_sums(
    parts: list[str], reduction: str, reductions: set[str]
) -> None:
    mixed = get_objective("mix", parts=[{"name": name} for name in parts])
    assert (mixed.reduction, mixed.reductions) == (reduction, reductions)


def test_what_a_mixture_needs_is_what_any_part_needs() -> None:
    def mixed(*parts: dict[str, Any], **settings: Any) -> Any:
        return get_objective("mix", parts=list(parts), **settings)

    dpo, sft, simpo = {"name": "dpo"}, {"name": "sft"}, {"name": "simpo"}
    assert not mixed(sft).needs_rejected and mixed(sft, simpo).needs_rejected
    assert mixed(sft, dpo).needs_reference and not mixed(sft, simpo).needs_reference
    assert mixed(dpo, {"name": "aot"}).sorts_batch and not mixed(dpo).sorts_batch
    assert not mixed(dpo, {"name": "kto"}).spec.takes_unpaired and mixed({"name": "kto"}).spec.takes_unpaired
    assert (
        mixed(dpo, {"name": "kto"}).spec.needs_mismatched and mixed(dpo, {"name": "kto"}).spec.couples_batch
    )
    assert mixed(dpo, {"name": "tpo"}).spec.needs_gold and not mixed(dpo).spec.needs_gold
    assert mixed(dpo, {"name": "mappo"}).spec.needs_margins and not mixed(dpo).spec.needs_margins
    assert not mixed(sft, simpo).spec.token_weighted
    assert mixed(dpo | {"nll_coef": 0.1}).uses_chosen_means and not mixed(dpo).uses_chosen_means
    assert mixed(dpo, nll_coef=0.1).uses_chosen_means
    assert mixed(dpo | {"weighting": "wpo"}).needs_likelihoods and not mixed(dpo).needs_likelihoods
    assert mixed(dpo, weighting="wpo").needs_likelihoods


def test_log_probs_change_their_reduction_by_the_lengths() -> None:
    logps = pairs()
    by_sums = get_objective("mix", parts=[{"name": "ipo"}, {"name": "dpo", "weight": 0.0}])
    # u by token: 1/4, −1/2 and −1/2, 2/5; (m − 5)²
    torch.testing.assert_close(by_sums(logps), vector((0.75 - 5) ** 2, (-0.9 - 5) ** 2), rtol=1e-12, atol=0)
    by_means = get_objective("mix", reduction="mean", parts=[{"name": "hinge"}])
    # u of sums from means: 4, −2 and −2, 10; 1 − 0.1 m
    torch.testing.assert_close(by_means(logps), vector(1 - 0.6, 1 + 1.2), rtol=1e-12, atol=0)
    none = logps.replace(chosen_lengths=vector(0, 2))  # an answer that is not there is not divided by 0
    assert by_sums(none).isfinite().all() and by_sums(none)[1] == by_sums(logps)[1]
    with pytest.raises(ValueError, match=r"^a mixture of sums and means needs PairLogps.chosen_lengths"):
        by_sums(logps.replace(chosen_lengths=None))


def test_rewards_of_a_first_part_without_a_rejected_side_are_the_mixtures() -> None:
    class Half(type(get_objective("dpo"))):  # type: ignore[misc]
        """Has rewards of the chosen side alone."""

        def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor | None]:
            return logps.chosen, None

    mixed = get_objective("mix", parts=[{"name": "dpo"}])
    assert mixed.rewards(pairs())[0].tolist() == pytest.approx([0.1, -0.1])
    mixed.parts[0][1].__class__ = Half
    chosen, rejected = mixed.rewards(pairs())
    assert rejected is not None and rejected.tolist() == [-1, 2] and chosen.tolist() == [1, -1]
    assert mixed.rewards(pairs().replace(rejected=None))[1] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": []}, "objective.parts is empty: give at least one, [{name: dpo, weight: 1}, …]"),
        ({"parts": [{"name": "dpo"}, {"name": "dpo", "length_alpha": 0.5}]},
         "objective.parts[1].length_alpha: set objective.length_alpha, for all parts"),
        ({"parts": [{"beta": 1}]}, None),
        ({"parts": [{"name": "dpo"}], "reduction": "importance"},
         "objective.parts: reduction=importance goes with no other in a mixture"),
        ({"parts": [{"name": "kto"}], "reduction": "mean"},
         "objective.parts: kto takes reduction=sum, which objective.reduction=mean cannot become for "
         "mismatched completions; set it"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_mixed_are_refused(settings: dict[str, Any], message: str | None) -> None:
    found = refusal("mix", **settings)
    assert found == message if message else found.startswith("objective.parts[0]: ")
