import math

import numpy as np
import pytest
from scipy.special import ndtr

from cmrssp.errors import UserError
from cmrssp.evaluation.stats import (
    bland_altman,
    bootstrap_interval,
    compare,
    describe,
    holm,
    per_subject,
    wilcoxon,
)

# Hollander and Wolfe, Nonparametric Statistical Methods, 1973, page 29: depression before and after a drug.
# Differences  .952 -.147 1.022 .430 .620 .590 .490 -.080 .010
# ranks           8    -3     9    4    7    6    5    -2    1     W+ = 40, W- = 5
# Of the 2^9 sign patterns, W- is at most 5 in 10: {} {1} {2} {3} {12} {4} {13} {5} {14} {23}. So the
# two-sided p is 2 * 10 / 512.
BEFORE = (1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30)
AFTER = (0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29)
P, EFFECT = 20 / 512, (40 - 5) / 45


def test_describe_by_hand():
    """5th percentile of four values: at 0.15 of 0..3. Squared deviations 2.25, 0.25, 0.25, 2.25."""
    expected = {"mean": 2.5, "std": math.sqrt(5 / 3), "median": 2.5, "percentile_5": 1.15, "number": 4}
    assert describe([4, 1, 3, 2]) == pytest.approx({**expected, "missing": 0})
    assert describe([4, math.nan, 1, 3, None, 2]) == pytest.approx({**expected, "missing": 2})


def test_describe_too_little():
    one = describe([0.7])
    assert (one["mean"], one["median"], one["percentile_5"], one["number"]) == (0.7, 0.7, 0.7, 1)
    assert math.isnan(one["std"])
    none = describe([None, math.nan])
    assert (none["number"], none["missing"]) == (0, 2)
    assert all(math.isnan(none[name]) for name in ("mean", "std", "median", "percentile_5"))


def test_bootstrap_of_two_values_by_hand():
    """The mean of two draws from {0, 1} is 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0, 1]) == bootstrap_interval([0, None, 1]) == (0, 1)


def test_bootstrap_equals_the_normal_approximation_for_many_subjects():
    """3000 skewed values, so that the draws come in several blocks. The ends' own sampling error with 10000
    resamples is 3 % of the half width; 0.1 is three times that.
    """
    values = np.random.default_rng(5).exponential(2.0, 3000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(list(values)) == (low, high)  # always the same draws


def test_bootstrap_of_one_subject_claims_nothing():
    assert all(math.isnan(end) for end in bootstrap_interval([0.9]))


def test_wilcoxon_exact_from_a_textbook():
    assert wilcoxon(np.subtract(BEFORE, AFTER)) == pytest.approx((P, EFFECT), rel=1e-12)
    assert wilcoxon(np.subtract(AFTER, BEFORE)) == pytest.approx((P, -EFFECT), rel=1e-12)


def test_wilcoxon_with_ties_and_a_zero():
    """Differences  15 -7  5   20 0 -9 17 -12  5   -10
    ranks            7 -3 1.5   9   -4  8  -6 1.5   -5     W+ = 27, W- = 18, nine pairs
    Mean 9 * 10 / 4; variance 9 * 10 * 19 / 24 less (2^3 - 2) / 48 for the tie; half a rank for continuity.
    """
    a = (125, 115, 130, 140, 140, 115, 140, 125, 140, 135)
    b = (110, 122, 125, 120, 140, 124, 123, 137, 135, 145)
    z = (27 - 22.5 - 0.5) / math.sqrt(71.25 - 0.125)
    assert wilcoxon(np.subtract(a, b)) == pytest.approx((2 * ndtr(-z), 9 / 45), rel=1e-12)
    # In hundredths the two fives are still tied, though as floats 1.3 - 1.25 > 1.4 - 1.35.
    assert wilcoxon(np.divide(a, 100) - np.divide(b, 100)) == wilcoxon(np.subtract(a, b))


@pytest.mark.parametrize("pairs", [49, 50])
def test_wilcoxon_is_exact_below_50_pairs(pairs):
    """Differences 1, 2, ..., n but -1: W- = 1, as few as 2 of 2^n patterns (none, and 1 alone), twice."""
    difference = np.arange(1.0, pairs + 1)
    difference[0] = -1
    p, _ = wilcoxon(difference)
    mean, variance = pairs * (pairs + 1) / 4, pairs * (pairs + 1) * (2 * pairs + 1) / 24
    expected = 4 / 2**pairs if pairs < 50 else 2 * ndtr((1 + 0.5 - mean) / math.sqrt(variance))
    assert p == pytest.approx(expected, rel=1e-9)


def test_wilcoxon_without_a_difference():
    assert wilcoxon([0.0, 0.0]) == (1, 0)


def test_holm_by_hand():
    """Sorted 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not be less than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([0.04]).tolist() == [0.04]
    assert holm([]).tolist() == []


def test_bland_altman_by_hand():
    """Differences 3, -1, 4: mean 2, squared deviations 1, 9, 4, so a variance of 7."""
    found = bland_altman([103, None, 79, 64], [100, 90, 80, 60])
    reach = 1.96 * math.sqrt(7)
    assert found == pytest.approx({"bias": 2, "lower": 2 - reach, "upper": 2 + reach, "number": 3})


def runs():
    """A: after the drug, B: before, C: A once more with one subject changed by 1 (ranks: 1 alone, p = 1)."""
    subjects = [f"mnms/{letter}" for letter in "ABCDEFGHI"]
    a = dict(zip(subjects, AFTER, strict=True))
    b = dict(zip(reversed(subjects), reversed(BEFORE), strict=True))  # order must not matter
    return {"A": a, "B": b, "C": {**a, "mnms/C": a["mnms/C"] - 1}}


def test_compare_by_hand():
    found = compare(runs())
    assert list(found) == ["B", "C"]
    lower, upper = bootstrap_interval(np.subtract(BEFORE, AFTER))
    assert found["B"] == pytest.approx(
        {"number": 9, "difference": 3.887 / 9, "lower": lower, "upper": upper,
         "p": P, "p_holm": 2 * P, "effect": EFFECT}
    )  # fmt: skip
    assert found["C"]["difference"] == pytest.approx(-1 / 9)
    assert [found["C"][name] for name in ("p", "p_holm", "effect")] == [1, 1, -1]


def test_compare_does_not_depend_on_the_order_of_subjects():
    turned = {name: dict(reversed(scores.items())) for name, scores in runs().items()}
    assert compare(turned) == compare(runs())


def test_compare_refuses_fewer_than_two_runs():
    with pytest.raises(UserError, match=r"got A$"):
        compare({"A": runs()["A"]})
    with pytest.raises(UserError, match=r"got none"):
        compare({})


def test_per_subject_by_hand():
    rows = [
        {"subject": "a", "phase": phase, "class": name, "dice": dice, "hd95_mm": mm, "absent": name == "RV"}
        for phase, name, dice, mm in (
            ("ED", "LV", 0.9, 2.0), ("ED", "RV", 1.0, math.nan), ("ES", "LV", 0.7, 4.0),
            ("ES", "RV", 0.0, math.nan),
        )
    ]  # fmt: skip
    assert per_subject(rows, "ED", ["LV"]) == {"a": 0.9}
    assert per_subject(rows, "both", ["LV", "RV"]) == {"a": pytest.approx((0.9 + 1 + 0.7 + 0) / 4)}
    assert per_subject(rows, "both", ["LV", "RV"], "hd95_mm") == {"a": 3.0}  # RV is in neither map
    assert per_subject(rows, "both", []) == {}
