"""Statistics over subjects: means, intervals, agreement, paired comparisons of evaluated runs.

NaN and None stand for a value that was not measured. Descriptions leave such values out and count them as
`missing`. A comparison of runs refuses them: it must compare the same subjects.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cmrssp.errors import UserError

_BLOCK = 1 << 22  # numbers that a bootstrap draws at once: 32 MB for any number of subjects
_EXACT = 50  # pairs; from here on the normal approximation is good enough, as in R
_DECIMALS = 12  # differences that only float rounding separates are ties


def describe(values: Iterable[float | None]) -> dict[str, float | int]:
    """mean, std (sample, ddof 1), median, percentile_5, number (measured) and missing.

    NaN where too few are measured: std needs two values, the others one.
    """
    measured, missing = _measured(values)
    some = len(measured) > 0
    return {
        "mean": float(measured.mean()) if some else np.nan,
        "std": float(measured.std(ddof=1)) if len(measured) > 1 else np.nan,
        "median": float(np.median(measured)) if some else np.nan,
        "percentile_5": float(np.percentile(measured, 5)) if some else np.nan,
        "number": len(measured),
        "missing": missing,
    }


def per_subject(
    rows: Iterable[dict], phase: str, classes: Sequence[str], metric: str = "dice"
) -> dict[str, float]:
    """{subject: mean of its values over `classes`, and over both phases where `phase` is "both"}.

    rows: dicts with subject, phase (ED or ES), class and the metric. A distance is NaN where one map misses
    the structure; a structure that neither map has (`absent`) is left out of a distance's mean.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        measurable = metric == "dice" or not row["absent"]
        if phase in (row["phase"], "both") and row["class"] in classes and measurable:
            values.setdefault(row["subject"], []).append(row[metric])
    return {subject: float(np.mean(found)) for subject, found in values.items()}


def bootstrap_interval(
    values: Iterable[float | None], seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of one value per subject, subjects drawn with replacement; (NaN, NaN)
    for fewer than two values. Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    measured, _ = _measured(values)
    if len(measured) < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    number, means = len(measured), np.empty(resamples)
    for block in np.array_split(means, -(-resamples * number // _BLOCK)):
        block[:] = measured[generator.integers(number, size=(len(block), number))].mean(axis=1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def wilcoxon(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(two-sided p of the Wilcoxon signed-rank test, matched-pairs rank-biserial correlation) of a - b.

    Pairs without a difference are dropped before ranking, as Wilcoxon did. p is exact for fewer than 50
    remaining pairs without ties, otherwise from the normal approximation with corrections for ties and
    continuity. Without any difference p is 1 and the correlation 0. Raises ValueError for NaN or unequal
    lengths.

    The correlation is (W+ - W-) / (W+ + W-), from -1 (every difference negative) to 1; Kerby 2014, doi
    10.2466/11.IT.3.1.
    """
    from scipy import stats  # takes half a second to import, and no training needs it

    difference = np.round(_differences(a, b), _DECIMALS)
    if np.isnan(difference).any():
        raise ValueError(f"wilcoxon: expected numbers, got {np.isnan(difference).sum()} pairs with NaN")
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(difference))
    tied = len(np.unique(ranks)) < len(ranks)
    method = "approx" if tied or len(ranks) >= _EXACT else "exact"
    p = stats.wilcoxon(difference, correction=True, method=method).pvalue
    return float(p), float((np.sign(difference) * ranks).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values adjusted for their number, in their order: the k-th smallest of m times m - k + 1, at least
    the one before it, at most 1. Holm, Scand J Statist 6 (1979), 65-70.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def bland_altman(
    measured: Iterable[float | None], reference: Iterable[float | None]
) -> dict[str, float | int]:
    """Agreement of pairs, as measured - reference: bias, lower and upper limit (bias ± 1.96 sample standard
    deviations), number of pairs, and missing pairs. Bland and Altman, Lancet 1986, i, 307-310.
    """
    found = describe(_differences(measured, reference))
    bias, reach = found["mean"], 1.96 * found["std"]
    limits = {"bias": bias, "lower": bias - reach, "upper": bias + reach}
    return {**limits, "number": found["number"], "missing": found["missing"]}


def compare(scores: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, dict[str, float | int]]:
    """Compare every other run with the first, paired by subject. scores: {run: {subject: score}}.

    {run: number of subjects, mean difference (run - first), lower and upper end of its 95 % bootstrap
    interval, Wilcoxon p, p_holm over all comparisons, effect (rank-biserial)}.
    Raises UserError for fewer than two runs, ValueError where the subjects differ or a score is not finite.
    """
    if len(scores) < 2:
        raise UserError(
            "a comparison needs two or more runs (seeds of one experiment count as one), got "
            f"{', '.join(scores) or 'none'}"
        )
    first, *others = scores
    subjects = sorted(scores[first])  # the interval must not depend on the order of a file's lines
    for name, found in scores.items():  # read from complete files of the same subjects, so no user meets it
        if set(found) != set(subjects) or not np.isfinite(list(found.values())).all():
            raise ValueError(f"compare: expected finite scores of the same subjects, got others in {name}")
    theirs = [scores[first][subject] for subject in subjects]
    rows: dict[str, dict[str, float | int]] = {}
    for name in others:
        ours = [scores[name][subject] for subject in subjects]
        difference = _differences(ours, theirs)
        lower, upper = bootstrap_interval(difference, seed)
        p, effect = wilcoxon(ours, theirs)
        rows[name] = {
            "number": len(subjects),
            "difference": float(difference.mean()),
            "lower": lower,
            "upper": upper,
            "p": p,
            "effect": effect,
        }
    for row, p_holm in zip(rows.values(), holm([row["p"] for row in rows.values()]), strict=True):
        row["p_holm"] = float(p_holm)
    return rows


def _numbers(values: Iterable[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _measured(values: Iterable[float | None]) -> tuple[np.ndarray, int]:
    """(the values that are not NaN or None, the number of the others)."""
    numbers = _numbers(values)
    measured = numbers[~np.isnan(numbers)]
    return measured, len(numbers) - len(measured)


def _differences(a: Iterable[float | None], b: Iterable[float | None]) -> np.ndarray:
    """a - b of pairs, NaN where one is missing. Raises ValueError where the lengths differ."""
    a, b = _numbers(a), _numbers(b)
    if len(a) != len(b):
        raise ValueError(f"expected pairs, got {len(a)} and {len(b)} values")
    return a - b
