"""The sentence that a search's figures give, by the rule: winners, no difference, ties, few seeds, failures, folds."""

from __future__ import annotations

import numpy as np
import pytest
from made_studies import folds, record, seeds, trial

from nuciseg.reporting.study_conclusions import conclude


def test_an_arm_whose_worst_seed_beats_the_others_best_is_best() -> None:
    found = conclude(seeds(sgd=[80, 82, 81], adam=[90, 85, 92]))
    assert found.sentence == (
        "Best is adam with 89.0 of 100 clusters on average (85 to 92); its worst seed separates more than the best of "
        "sgd (81.0, 80 to 82)."
    )
    assert found.beaten == ("sgd",)


def test_one_seed_of_the_other_that_reaches_the_worst_is_enough_for_no_difference() -> None:
    found = conclude(seeds(adam=[90, 85, 92], sgd=[80, 85, 81]))
    assert found.beaten == ()
    assert found.sentence == (
        "No difference that three seeds show: between adam and sgd lie only 7.0 of 100 clusters on average (89.0 and "
        "82.0), seeds alone differ by up to 7."
    )


def test_a_gap_greater_than_the_seeds_spread_is_not_called_only() -> None:
    sentence = conclude(seeds(adam=[85, 92, 92], sgd=[85, 78, 78])).sentence
    assert "between adam and sgd lie 9.3 of 100 clusters" in sentence


def test_arms_are_named_that_the_best_is_not_distinguishable_from() -> None:
    found = conclude(seeds(sgd=[70, 71, 72], adam=[90, 91, 92], adamw=[89, 90, 91], lion=[60, 60, 60]))
    assert found.sentence == (
        "Best is adam with 91.0 of 100 clusters on average (90 to 92); its worst seed separates more than the best of "
        "sgd (71.0, 70 to 72) and lion (60.0, 60 in each); not distinguishable from it: adamw (90.0, 89 to 91)."
    )
    assert found.beaten == ("sgd", "lion")


def test_a_leader_that_beats_nobody_does_not_hide_who_does() -> None:
    sentence = conclude(seeds(wide=[50, 95, 95], steady=[75, 75, 75], low=[60, 61, 62])).sentence
    assert sentence.startswith("Best is wide with 80.0 of 100")
    assert sentence.endswith("; steady is better than low.")
    assert "its worst seed" not in sentence


def test_equal_means_are_no_difference_with_both_named() -> None:
    assert conclude(seeds(adam=[88, 90, 92], sgd=[89, 90, 91])).sentence == (
        "No difference that three seeds show: adam and sgd each separate 90.0 of 100 clusters on average, seeds alone "
        "differ by up to 4."
    )


def test_ties_go_to_the_better_average_precision_then_to_the_first() -> None:
    arms = {"first": 0.8, "second": 0.9, "third": 0.9}
    trials = [trial({"optim.kind": name}, seed, 90, ap50=ap50) for name, ap50 in arms.items() for seed in range(3)]
    low = [trial({"optim.kind": "low"}, seed, 10) for seed in range(3)]
    sentence = conclude(record([*trials, *low])).sentence
    assert sentence.startswith("Best is second ")
    assert "not distinguishable from it: third (90.0, 90 in each) and first (90.0, 90 in each)" in sentence


def test_one_seed_decides_nothing_below_two_standard_errors() -> None:
    """Of the difference: at 87.5 of 100 they are 2 * sqrt(2 * 100 * .875 * .125) = 9.4 clusters."""
    found = conclude(seeds(adam=[90], sgd=[85]))
    assert found.sentence == (
        "No difference that one seed shows: between adam and sgd lie only 5.0 of 100 clusters on average (90.0 and "
        "85.0), two standard errors are 9.4."
    )


def test_one_seed_tells_larger_differences() -> None:
    found = conclude(seeds(adam=[90], sgd=[78], adamw=[88]))
    assert found.beaten == ("sgd",)
    assert found.sentence == (
        "Best is adam with 90.0 of 100 clusters on average (one seed); one seed alone, so only more than two standard "
        "errors count: ahead of sgd (78.0, one seed); not distinguishable from it: adamw (88.0, one seed)."
    )


def test_equal_arms_of_one_seed_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(0)
    counts = rng.binomial(100, 0.9, (2000, 2))
    told = [bool(conclude(seeds(adam=[int(a)], sgd=[int(b)])).beaten) for a, b in counts]
    assert 0.02 < np.mean(told) < 0.06


@pytest.mark.parametrize(("num_arms", "share"), [(2, 0.10), (3, 0.21), (5, 0.40), (7, 0.54)])
def test_how_often_the_first_of_equal_arms_comes_out_ahead(num_arms: int, share: float) -> None:
    """The page says so, of normal scores; where counts can be equal the rule is stricter."""
    values = np.random.default_rng(0).normal(size=(20_000, num_arms, 3))
    by_mean = values.mean(axis=2)
    lowest_of_first = np.take_along_axis(values.min(axis=2), by_mean.argmax(axis=1)[:, None], axis=1)
    ahead = (lowest_of_first > values.max(axis=2)).any(axis=1)
    assert ahead.mean() == pytest.approx(share, abs=0.02)


def test_two_seeds_are_not_ranked() -> None:
    """They are apart, but by less than two standard errors."""
    assert conclude(seeds(adam=[90, 91], sgd=[86, 87])).beaten == ()
    assert conclude(seeds(adam=[90, 91, 90], sgd=[86, 87, 86])).beaten == ("sgd",)


def test_a_failed_trial_is_told_and_leaves_too_few_seeds() -> None:
    found = conclude(seeds(adam=[90, 91, 92], sgd=[86, None, 87]))
    assert found.beaten == ()
    assert found.sentence.startswith("No difference that two seeds show")
    assert found.sentence.endswith("; 1 of 6 trials failed.")


def test_an_arm_that_failed_with_every_seed_is_named() -> None:
    sentence = conclude(seeds(adam=[90, 91, 92], sgd=[80, 80, 80], lion=[None, None, None])).sentence
    assert sentence.endswith("; 3 of 9 trials failed, all of lion.")
    assert sentence.startswith("Best is adam")


def test_without_another_arm_there_is_no_comparison() -> None:
    assert conclude(seeds(adam=[90, 91, 92], sgd=[None])).sentence == (
        "No comparison: adam alone came to its end, with 91.0 of 100 clusters; 1 of 4 trials failed, all of sgd."
    )
    assert conclude(seeds(adam=[None, None])).sentence == "No answer: all 2 trials failed."


def test_arms_scored_on_other_images_are_not_compared() -> None:
    trials = [trial({"optim.kind": name}, seed, 90 if name == "adam" else 10, split=name)
              for name in ("adam", "sgd") for seed in range(3)]  # fmt: skip
    found = conclude(record(trials))
    assert found.beaten == ()
    assert "scored on different images" in found.sentence


def test_folds_are_summed_and_compared_pair_by_pair() -> None:
    found = conclude(folds(sgd=[15, 15, 16, 15, 15], adam=[19, 19, 20, 18, 19]))
    assert found.sentence == (
        "adam separates 95 of 100 (95.0 %), each held out once; sgd 76 of 100 (76.0 %), fewer in each of five folds."
    )
    assert found.beaten == ("sgd",)


def test_few_folds_tell_nobody_apart() -> None:
    """Ahead in each of two is what chance gives once in four times."""
    found = conclude(folds(2, sgd=[15, 15], adam=[19, 19]))
    assert found.beaten == ()
    assert found.sentence.endswith("fewer in each of two folds, which are too few to call it worse: five would do.")


def test_an_arm_ahead_in_some_folds_only_is_not_better() -> None:
    found = conclude(folds(adam=[20, 20, 19, 18, 19], sgd=[15, 15, 20, 18, 18]))
    assert found.sentence.endswith(
        "; sgd 86 of 100 (86.0 %), fewer in 3 of five folds, as many in 1 and more in 1, so not called worse."
    )
    assert found.beaten == ()


def test_an_arm_that_lacks_a_fold_is_not_compared() -> None:
    found = conclude(folds(adam=[19, 19, 19, 19, 19], sgd=[20, 20, None, 20, 20]))
    assert found.sentence == (
        "adam separates 95 of 100 (95.0 %), each held out once; sgd lacks fold 2 and is not compared; 1 of 10 trials "
        "failed."
    )


def test_no_sum_is_made_of_some_folds() -> None:
    sentence = conclude(folds(adam=[19, None, 19, None, 19])).sentence
    assert sentence.startswith("No answer: no arm was trained on every fold; adam lacks folds 1, 3")


@pytest.mark.parametrize("arms", [{"adam": [90, 91, 92], "sgd": [80, 80, 80]}, {"adam": [90], "sgd": [90]}])
def test_a_conclusion_is_one_sentence(arms: dict[str, list[int]]) -> None:
    sentence = conclude(seeds(**arms)).sentence
    assert sentence.endswith(".")
    assert ". " not in sentence
