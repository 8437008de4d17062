"""Charts of an evaluation, for print at 170 mm. Colours are Okabe and Ito's, which readers with colour
blindness tell apart; markers, lines and hatches also differ, for print in grey.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from cmrssp.data.subject import CLASSES
from cmrssp.evaluation import stats
from cmrssp.runs.figures import save_figure

PHASES = ("ED", "ES")
BINS = 10  # of a slice's position between base and apex
CLASS_COLOURS = dict(zip(CLASSES, ("#D55E00", "#009E73", "#56B4E9"), strict=True))
_CLASS_LINES = {
    name: {"color": CLASS_COLOURS[name], "marker": marker, "linestyle": line}
    for name, marker, line in zip(CLASSES, "os^", ("-", "--", "-."), strict=True)
}
_EDGE = {"edgecolor": "black", "linewidth": 0.8}
_PHASE_BOXES = {"ED": {"facecolor": "#4C9CC9"}, "ES": {"facecolor": "#EDBC4C", "hatch": "////"}}
_METHOD_LINES = (("#0072B2", "s", "--"), ("#D55E00", "^", "-."), ("#009E73", "D", ":"),
                 ("#CC79A7", "v", "-"), ("#56B4E9", "P", "--"), ("#E69F00", "X", "-."))  # fmt: skip
_POINTS = 7.5
_WIDTH = 164 / 25.4  # inches; with the margin of save_figure below 170 mm, so that text never shrinks


def bland_altman(pairs: Mapping[str, tuple[np.ndarray, np.ndarray, str]], path: Path) -> None:
    """A panel per title. pairs: {title: (measured (N,), reference (N,), unit)}, NaN for a missing value."""
    figure, axes = _grid(len(pairs), 3, height=2)
    for axis, (title, (measured, reference, unit)) in zip(axes, pairs.items(), strict=False):
        difference, mean = measured - reference, (measured + reference) / 2
        found = stats.bland_altman(measured, reference)
        n, bias, low, high = (found[key] for key in ("number", "bias", "lower", "upper"))
        axis.set_title(f"{title}, N = {n}" + (f" of {len(difference)}" if n < len(difference) else ""))
        axis.set(xlabel=f"mean of both ({unit})", ylabel=f"measured − reference ({unit})")
        if n < 2:
            axis.set(xticks=[], yticks=[])
            _note(axis, "fewer than 2 pairs")
            continue
        kept = np.isfinite(difference)
        spread = max(high - bias, abs(difference[kept] - bias).max())
        reach = 1.4 * max(spread, abs(bias) / 10, abs(mean[kept]).max() / 100) or 1.0
        axis.scatter(mean[kept], difference[kept], s=9, color="#0072B2", alpha=0.7, linewidths=0, zorder=5)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        place = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
        for value, name, colour, line, x, side, above, points in (
            (bias, "bias", "black", "-", 0.02, "left", "bottom", 1),
            (high, "+1.96 SD", "#D55E00", "--", 0.98, "right", "bottom", 1),
            (low, "−1.96 SD", "#D55E00", "--", 0.98, "right", "top", -2),
        ):
            axis.axhline(value, color=colour, linewidth=1.2, linestyle=line)
            text = f"{name}: {value:+.1f}".replace("-", "−")
            text = axis.annotate(text, (x, value), (0, points), ha=side, va=above, **place)
            text.set(zorder=4, path_effects=[withStroke(linewidth=2, foreground="white")])
        axis.set_ylim(bias - reach, bias + reach)
    _write(figure, path)


def binned(position: np.ndarray, dice: np.ndarray) -> np.ndarray:
    """(BINS, 4): number of slices and the 25th, 50th and 75th percentile of their Dice (NaN in an empty bin).
    position (N,) from 0 to 1, 1 in the last bin; dice (N,). NaN in either leaves a slice out.
    """
    position, dice = np.asarray(position, float), np.asarray(dice, float)
    kept = np.isfinite(position) & np.isfinite(dice)
    bins, dice = np.clip((position[kept] * BINS).astype(int), 0, BINS - 1), dice[kept]
    table = np.full((BINS, 4), np.nan)
    table[:, 0] = np.bincount(bins, minlength=BINS)
    for i in np.unique(bins):
        table[i, 1:] = np.percentile(dice[bins == i], (25, 50, 75))
    return table


def dice_by_position(slices: Sequence[dict], path: Path) -> None:
    """Median Dice, its inter-quartile range and the number of slices, in ten bins from base to apex. slices:
    dicts with position (0 base, 1 apex), phase, class, dice (NaN if neither map has the class) and, to show
    their number, subject.
    """
    figure = Figure(figsize=(_WIDTH, 3.3), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(4, 1))
    centres = (np.arange(BINS) + 0.5) / BINS
    for column, phase in enumerate(PHASES):
        above, below = axes[:, column]
        rows = [row for row in slices if row["phase"] == phase]
        subjects = {row["subject"] for row in rows if "subject" in row}
        above.set_title(phase + (f", N = {len(subjects)} subjects" if subjects else ""))
        for i, name in enumerate(CLASSES):
            points = [(row["position"], row["dice"]) for row in rows if row["class"] == name]
            n, low, median, high = binned(*np.reshape(points, (-1, 2)).T).T
            colour = CLASS_COLOURS[name]
            above.fill_between(centres, low, high, color=colour, alpha=0.18, linewidth=0)
            above.plot(centres, median, **_CLASS_LINES[name], markersize=4, label=name)
            below.bar(centres + (i - 1) * 0.28 / BINS, n, 0.28 / BINS, color=colour, alpha=0.6)
        above.grid(alpha=0.3)
        below.set(xlim=(0, 1), xticks=np.linspace(0, 1, 6), xlabel="position of the slice (0 base, 1 apex)")
        if not rows:
            _note(above, "no slices")
    axes[0, 0].set(ylabel="Dice per slice\n(median, 25th to 75th percentile)", ylim=(None, 1.01))
    axes[1, 0].set(ylabel="slices", ylim=(0, None))
    figure.legend(handles=axes[0, 0].lines, loc="outside upper right", ncols=3, fontsize=_POINTS)
    _write(figure, path)


def by_vendor(rows: Sequence[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{vendor: {phase: {subject: Dice}}} of the rows of one class, without NaN; unknown vendors last."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: row["vendor"] or "~"):
        if np.isfinite(row["dice"]):
            vendor = groups.setdefault(row["vendor"] or "unknown", {phase: {} for phase in PHASES})
            vendor[row["phase"]][row["subject"]] = float(row["dice"])
    return groups


def boxes(rows: Sequence[dict], path: Path) -> None:
    """Dice by vendor, a panel per class. rows: dicts with subject, phase, vendor, class, dice. Whiskers reach
    to the furthest value within 1.5 box heights; groups of fewer than ten show every value.
    """
    columns = len(CLASSES) if len({row["vendor"] for row in rows}) <= 4 else 1
    figure, axes = _grid(len(CLASSES), columns, height=1.9, sharey=True)
    for axis, name in zip(axes, CLASSES, strict=True):
        groups = by_vendor([row for row in rows if row["class"] == name])
        room = max(4, 88 // (columns * max(len(groups), 1)))  # characters of a name side by side
        labels = []
        for i, (vendor, phases) in enumerate(groups.items()):
            labels.append(f"{fill(vendor, room)}\nn={len(set().union(*phases.values()))}")
            for side, phase in zip((-0.2, 0.2), PHASES, strict=True):
                if values := list(phases[phase].values()):
                    _box(axis, i + side, values, phase)
        axis.set(title=name, xlim=(-0.6, max(len(groups), 1) - 0.4))
        axis.set_xticks(range(len(groups)), labels, parse_math=False)
        axis.grid(axis="y", alpha=0.3)
        if not groups:
            _note(axis, "no subjects")
    for axis in axes[::columns]:
        axis.set_ylabel("3D Dice")
    handles = [Patch(label=phase, **_PHASE_BOXES[phase], **_EDGE) for phase in PHASES]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=_POINTS)
    _write(figure, path)


def _box(axis: Axes, x: float, values: list[float], phase: str) -> None:
    few = len(values) < 10
    axis.boxplot(
        [values], positions=[x], widths=0.34, patch_artist=True, manage_ticks=False, showfliers=not few,
        boxprops=_PHASE_BOXES[phase] | _EDGE, medianprops={"color": "black", "linewidth": 1.4},
        flierprops={"marker": "o", "markersize": 2.5, "markeredgewidth": 0.6},
    )  # fmt: skip
    if few:
        beside = (np.arange(len(values)) - (len(values) - 1) / 2) * 0.025
        axis.plot(x + beside, values, "o", color="black", markersize=2.2, zorder=3)


def over_seeds(scores: Mapping[int, Sequence[float]]) -> np.ndarray:
    """(N, 4): number of subjects, rising, seeds, mean, sample standard deviation (NaN for one seed)."""
    found = {number: stats.describe(dice) for number, dice in sorted(scores.items())}
    rows = [(n, f["number"], f["mean"], f["std"]) for n, f in found.items() if f["number"]]
    return np.reshape(np.array(rows, float), (-1, 4))


def learning_curves(
    scores: Mapping[str, Mapping[int, Sequence[float]]], path: Path, baseline: str = "Baseline"
) -> bool:
    """Mean Dice by number of labelled subjects; bars are the sample standard deviation over seeds. scores:
    {label: {number of subjects: [Dice of each seed]}}; `baseline` is black. Returns whether it drew any.
    """
    order = sorted(scores, key=lambda label: label != baseline)  # the baseline first
    tables = {label: table for label in order if len(table := over_seeds(scores[label]))}
    if not tables:
        return False
    figure, (axis,) = _grid(1, 1, height=2.9)
    axis.set(xlabel="labelled subjects", ylabel="3D Dice (mean ± SD over seeds)")
    numbers, looks = sorted({int(n) for table in tables.values() for n in table[:, 0]}), cycle(_METHOD_LINES)
    for i, (label, table) in enumerate(tables.items()):
        number, seeds, mean, std = table.T
        colour, marker, line = ("black", "o", "-") if label == baseline else next(looks)
        aside = (i - (len(tables) - 1) / 2) * 0.3 / len(tables)  # so that bars do not cover each other
        few, many = int(seeds.min()), int(seeds.max())
        axis.errorbar(
            np.searchsorted(numbers, number) + aside, mean, std, capsize=2, markersize=4, linewidth=1.2,
            color=colour, marker=marker, linestyle=line,
            label=f"{label} (seeds: {few}" + (f" to {many})" if few < many else ")"),
        )  # fmt: skip
    axis.set_xticks(range(len(numbers)), numbers)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=_POINTS)
    _write(figure, path)
    return True


def volume_curve(
    title: str, volumes_ml: Mapping[str, Sequence[float]], path: Path, step_s: float | None,
    phases: Mapping[str, int], excluded: Sequence[int] = (),
) -> None:  # fmt: skip
    """Volumes over the cycle. volumes_ml: {LV, RV: (T,)}; step_s: time between frames, None if unknown;
    phases: {ED, ES: frame}, shown as vertical lines; `excluded` frames, which cannot be ED or ES, get a mark.
    """
    figure, (axis,) = _grid(1, 1, height=1.6)
    frames = np.arange(len(volumes_ml["LV"]))
    x, label = (frames * step_s * 1000, "time (ms)") if step_s else (frames, "frame")
    for name in ("LV", "RV"):
        axis.plot(x, volumes_ml[name], **_CLASS_LINES[name], markersize=2, label=name)
    for name, frame in phases.items():
        line = "-" if name == "ED" else ":"
        axis.axvline(x[frame], color="0.3", linewidth=0.9, linestyle=line, label=name, zorder=0)
    if len(excluded):
        ml = [volumes_ml[name][t] for name in ("LV", "RV") for t in excluded]
        axis.plot([*x[list(excluded)]] * 2, ml, "x", color="0.4", markersize=5, label="not for ED, ES")
    axis.set_title(shortened(title), parse_math=False)
    axis.set(xlabel=label, ylabel="volume (ml)", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=5, fontsize=_POINTS)
    _write(figure, path)


def shortened(name: str) -> str:
    """At most 60 characters of a name."""
    return name if len(name) <= 60 else f"{name[:28]}…{name[-31:]}"


def _grid(count: int, columns: int, *, height: float, sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure with rows of `height` inches, and its `count` axes."""
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH, max(2.6, height * rows + 0.3)), layout="constrained")
    axes = figure.subplots(rows, min(columns, count), squeeze=False, sharey=sharey).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _note(axis: Axes, words: str) -> None:
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center")


def _write(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.tick_params(labelsize=_POINTS)
    for text in figure.findobj(Text):
        text.set_fontsize(_POINTS)
    save_figure(figure, path, dpi=300)
