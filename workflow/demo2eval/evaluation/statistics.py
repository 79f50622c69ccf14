"""Statistics of successes: intervals, and pairs of episodes on the same seeds."""

import math


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def paired_interval(n11: int, n10: int, n01: int, n00: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two proportions on the same episodes.

    This is Newcombe's method 10, the square-and-add interval (Statistics in Medicine 17, 1998,
    2635-2650).

    Args:
        n11: episodes in which both succeed.
        n10: the first alone.
        n01: the second alone.
        n00: neither.
    """
    episodes = n11 + n10 + n01 + n00
    first, second = (n11 + n10) / episodes, (n11 + n01) / episodes
    low_1, high_1 = wilson_interval(n11 + n10, episodes)
    low_2, high_2 = wilson_interval(n11 + n01, episodes)
    margins = (n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00)
    determinant = n11 * n00 - n10 * n01
    if determinant > 0:
        # Newcombe's continuity correction.
        determinant = max(determinant - episodes / 2, 0)
    correlation = determinant / math.sqrt(margins) if margins else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(one**2 - 2 * correlation * one * other + other**2)

    difference = first - second
    return (
        difference - distance(first - low_1, high_2 - second),
        difference + distance(high_1 - first, second - low_2),
    )


def mcnemar_mid_p(n10: int, n01: int) -> float:
    """Return the two-sided mid-p value of McNemar's test (Fagerland, Lydersen and Laake, 2013).

    It is the exact p-value less the probability of the outcome itself.
    """
    from scipy.stats import binom

    different, fewer = n10 + n01, min(n10, n01)
    return float(2 * binom.cdf(fewer, different, 0.5) - binom.pmf(fewer, different, 0.5))


def episodes_for_power(n10: int, n01: int, episodes: int, power: float = 0.8) -> int | None:
    """Return how many episodes show a difference of this size at 5 % with a probability of `power`.

    The formula is Connor's (Biometrics 43, 1987, 207-211). None if there is no difference.
    """
    from scipy.stats import norm

    if n10 == n01:
        return None
    different, difference = (n10 + n01) / episodes, (n10 - n01) / episodes
    spread = math.sqrt(different - difference**2)
    needed = norm.ppf(0.975) * math.sqrt(different) + norm.ppf(power) * spread
    return math.ceil((needed / difference) ** 2)
