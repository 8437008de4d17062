"""Statistics over subjects. NaN and None stand for a value that was not measured."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from cmrssp.errors import UserError

Values = Iterable[float | None]
_BLOCK = 1 << 22  # numbers that a bootstrap draws at once: 32 MB for any number of subjects
_EXACT = 50  # pairs; the normal approximation is good enough from here, as in R
_DECIMALS = 12  # so that differences with other rounding errors are ties


def describe(values: Values) -> dict[str, float | int]:
    """mean, std (sample, ddof 1), median, percentile_5, number (measured) and missing; NaN if undefined."""
    numbers = np.array([*values], float)  # NaN for None
    measured = numbers[~np.isnan(numbers)]
    some = measured if len(measured) else np.array([np.nan])
    return {
        "mean": float(some.mean()),
        "std": float(some.std(ddof=1)) if len(some) > 1 else np.nan,
        "median": float(np.median(some)),
        "percentile_5": float(np.percentile(some, 5)),
        "number": len(measured),
        "missing": len(numbers) - len(measured),
    }


def per_subject(
    rows: Iterable[dict], phase: str, classes: Sequence[str], metric: str = "dice"
) -> dict[str, float]:
    """{subject: mean of its values over `classes` and one phase, or both if `phase` is "both"}. rows: dicts
    with subject, phase, class, the metric, and for a distance absent: whether neither map has the class.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        measurable = metric == "dice" or not row["absent"]
        if phase in (row["phase"], "both") and row["class"] in classes and measurable:
            values.setdefault(row["subject"], []).append(row[metric])
    return {subject: float(np.mean(found)) for subject, found in values.items()}


def bootstrap_interval(values: Values, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean over subjects, from fixed draws; NaN for fewer than 2."""
    numbers = np.array([*values], float)
    numbers = numbers[~np.isnan(numbers)]
    if len(numbers) < 2:
        return np.nan, np.nan
    options = {"n_resamples": resamples, "batch": max(1, _BLOCK // len(numbers)), "method": "percentile"}
    low, high = stats.bootstrap((numbers,), np.mean, rng=0, **options).confidence_interval
    return float(low), float(high)


def wilcoxon(difference: Sequence[float]) -> tuple[float, float]:
    """(two-sided p of the Wilcoxon signed-rank test, rank-biserial correlation) of differences of pairs.

    Differences of 0 are dropped; (1, 0) if all are 0. p is exact for fewer than 50 others without ties, else
    from the normal approximation, corrected for ties and continuity. The correlation (W+ - W-) / (W+ + W-)
    goes from -1 (every difference negative) to 1; Kerby 2014, doi 10.2466/11.IT.3.1.
    """
    difference = np.round(difference, _DECIMALS)
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(difference))
    tied = len(np.unique(ranks)) < len(ranks)
    method = "approx" if tied or len(ranks) >= _EXACT else "exact"
    p = stats.wilcoxon(difference, correction=True, method=method).pvalue
    return float(p), float((np.sign(difference) * ranks).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values adjusted for their number m: the k-th smallest times m - k + 1, at least the one before it, at
    most 1. Holm, Scand J Statist 6 (1979), 65-70.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order)]


def bland_altman(measured: Values, reference: Values) -> dict[str, float | int]:
    """Agreement of pairs, as measured - reference: bias, lower and upper limit (bias ± 1.96 sample standard
    deviations), and number of measured pairs. Bland and Altman, Lancet 1986, i, 307-310.
    """
    found = describe(np.array([*measured], float) - np.array([*reference], float))
    bias, reach = found["mean"], 1.96 * found["std"]
    return {"bias": bias, "lower": bias - reach, "upper": bias + reach, "number": found["number"]}


def compare(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | int]]:
    """Every other run minus the first, paired by subject. scores: {run: {subject: finite score}}, all of the
    same subjects. Returns {run: number of subjects, mean difference, lower and upper end of its bootstrap
    interval, Wilcoxon p and effect, p_holm over all comparisons}. Raises UserError for fewer than two runs.
    """
    if len(scores) < 2:
        need = "a comparison needs two or more runs (seeds of one experiment count as one)"
        raise UserError(f"{need}, got {', '.join(scores) or 'none'}")
    first, *others = scores
    subjects = sorted(scores[first])  # the interval must not depend on the order of a file's lines
    rows: dict[str, dict[str, float | int]] = {}
    for name in others:
        difference = np.array([scores[name][subject] - scores[first][subject] for subject in subjects])
        low, high = bootstrap_interval(difference)
        p, effect = wilcoxon(difference)
        sizes = {"number": len(subjects), "difference": float(difference.mean()), "effect": effect}
        rows[name] = {**sizes, "lower": low, "upper": high, "p": p}
    for row, p_holm in zip(rows.values(), holm([row["p"] for row in rows.values()]), strict=True):
        row["p_holm"] = float(p_holm)
    return rows
