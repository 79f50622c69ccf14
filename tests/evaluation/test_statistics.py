"""Intervals and tests of successes against statsmodels and published examples."""

from math import comb

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from demo2eval.evaluation.statistics import (
    episodes_for_power,
    mcnemar_mid_p,
    paired_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        # The four cases that Newcombe (1998) compares methods on.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # No and only successes: one bound is exact, the other is z^2 / (n + z^2) away from it.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval(successes, episodes, low, high):
    interval = wilson_interval(successes, episodes)
    assert interval == pytest.approx((low, high), abs=1e-4)
    assert interval == pytest.approx(proportion_confint(successes, episodes, method="wilson"))


def test_paired_interval_of_a_published_example():
    # Airway hyper-responsiveness of 21 children before and after a transplantation, in Fagerland,
    # Lydersen and Laake, Statistics in Medicine 33 (2014).
    assert paired_interval(1, 1, 7, 12) == pytest.approx((-0.507, -0.026), abs=5e-4)


@pytest.mark.parametrize("counts", [(4, 6, 2, 3), (20, 30, 40, 60), (0, 0, 5, 5)])
def test_pairs_without_correlation_are_independent(counts):
    n11, n10, n01, _ = counts
    episodes = sum(counts)
    independent = confint_proportions_2indep(
        n11 + n10, episodes, n11 + n01, episodes, method="newcomb", compare="diff"
    )
    assert paired_interval(*counts) == pytest.approx(independent, abs=1e-9)


def test_pairs_that_agree_have_a_narrower_interval():
    low, high = paired_interval(45, 10, 2, 43)
    independent = confint_proportions_2indep(55, 100, 47, 100, method="newcomb", compare="diff")
    assert independent[0] < low < 0.08 < high < independent[1]
    assert low > 0 > independent[0]


@pytest.mark.parametrize(("n10", "n01"), [(1, 7), (7, 1), (12, 5), (30, 44), (0, 3)])
def test_mid_p_is_the_exact_p_less_the_outcome(n10, n01):
    exact = mcnemar([[0, n10], [n01, 0]], exact=True).pvalue
    assert mcnemar_mid_p(n10, n01) == pytest.approx(exact - comb(n10 + n01, n10) / 2 ** (n10 + n01))


def test_mid_p_of_a_published_example_and_of_no_difference():
    # Of the same example.
    assert mcnemar_mid_p(1, 7) == pytest.approx(0.0391, abs=5e-5)
    assert mcnemar_mid_p(6, 6) == pytest.approx(1)
    assert mcnemar_mid_p(0, 0) == pytest.approx(1)


def test_episodes_for_power_show_the_difference_as_often_as_they_say():
    needed = episodes_for_power(20, 10, 100)
    assert needed is not None
    assert episodes_for_power(10, 20, 100) == needed
    assert episodes_for_power(7, 7, 100) is None
    draws = np.random.default_rng(0).multinomial(needed, [0.2, 0.1, 0.7], size=2000)
    found = np.mean([mcnemar_mid_p(*draw[:2].tolist()) < 0.05 for draw in draws])
    assert found == pytest.approx(0.8, abs=0.03)
