"""Charts of an evaluation, for print at 170 mm: Okabe and Ito's colours for readers with colour blindness,
other markers, lines and hatches for print in grey.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill

import numpy as np
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
_METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_METHOD_LINES = list(zip(_METHOD_COLOURS, "s^DvPX", ("--", "-.", ":", "-", "--", "-."), strict=True))
_POINTS = 7.5
_WIDTH = 164 / 25.4  # inches; with the margin of save_figure below 170 mm, so that text never shrinks


def bland_altman(pairs: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """A panel per number. pairs: {name_unit: (measured (N,), reference (N,))}, NaN for a missing value."""
    figure, axes = _grid(len(pairs), 3, height=2)
    for axis, (name, (measured, reference)) in zip(axes, pairs.items(), strict=True):
        title, _, unit = name.replace("percent", "%").rpartition("_")
        title = title.replace("_", " ").upper()
        found = stats.bland_altman(measured, reference)
        number, bias = found["number"], found["bias"]
        axis.set_title(f"{title}, N = {number}" + f" of {len(measured)}" * (number < len(measured)))
        axis.set(xlabel=f"mean of both ({unit})", ylabel=f"measured − reference ({unit})")
        if number < 2:  # no limits of agreement
            continue
        mean, difference = (measured + reference) / 2, measured - reference
        axis.scatter(mean, difference, s=9, color="#0072B2", alpha=0.7, linewidths=0, zorder=5)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        for value, name, colour, line, x, side, above in (
            (bias, "bias", "black", "-", 0.02, "left", "bottom"),
            (found["upper"], "+1.96 SD", "#D55E00", "--", 0.98, "right", "bottom"),
            (found["lower"], "−1.96 SD", "#D55E00", "--", 0.98, "right", "top"),
        ):
            axis.axhline(value, color=colour, linewidth=1.2, linestyle=line)
            words = f"{name}: {value:+.1f}".replace("-", "−")
            text = axis.text(x, value, words, transform=axis.get_yaxis_transform(), ha=side, va=above)
            text.set(zorder=4, path_effects=[withStroke(linewidth=2, foreground="white")])
        axis.margins(y=0.25)  # room for the words
    _write(figure, path)


def binned(position: np.ndarray, dice: np.ndarray) -> np.ndarray:
    """(BINS, 4): number of slices and the 25th, 50th and 75th percentile of their Dice (NaN in an empty bin).
    position (N,) from 0 to 1, 1 in the last bin; dice (N,). NaN in either leaves a slice out.
    """
    position, dice = np.asarray(position, float), np.asarray(dice, float)
    kept = np.isfinite(position) & np.isfinite(dice)
    bins, dice = np.minimum((position[kept] * BINS).astype(int), BINS - 1), dice[kept]
    table = np.full((BINS, 4), np.nan)
    table[:, 0] = np.bincount(bins, minlength=BINS)
    for i in np.unique(bins):
        table[i, 1:] = np.percentile(dice[bins == i], (25, 50, 75))
    return table


def dice_by_position(slices: Sequence[dict], path: Path) -> None:
    """Median Dice, its inter-quartile range and the number of slices, in ten bins from base to apex. slices:
    dicts with subject, position (0 base, 1 apex), phase, class, dice (NaN if neither map has the class).
    """
    figure = Figure(figsize=(_WIDTH, 3.3), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(4, 1))
    centres = (np.arange(BINS) + 0.5) / BINS
    for column, phase in enumerate(PHASES):
        above, below = axes[:, column]
        rows = [row for row in slices if row["phase"] == phase]
        above.set_title(f"{phase}, N = {len({row['subject'] for row in rows})} subjects")
        for i, name in enumerate(CLASSES):
            points = [(row["position"], row["dice"]) for row in rows if row["class"] == name]
            n, low, median, high = binned(*np.reshape(points, (-1, 2)).T).T
            colour = CLASS_COLOURS[name]
            above.fill_between(centres, low, high, color=colour, alpha=0.18, linewidth=0)
            above.plot(centres, median, **_CLASS_LINES[name], markersize=4, label=name)
            below.bar(centres + (i - 1) * 0.28 / BINS, n, 0.28 / BINS, color=colour, alpha=0.6)
        above.grid(alpha=0.3)
        below.set(xlim=(0, 1), xticks=np.linspace(0, 1, 6), xlabel="position of the slice (0 base, 1 apex)")
    axes[0, 0].set(ylabel="Dice per slice\n(median, 25th to 75th percentile)", ylim=(None, 1.01))
    axes[1, 0].set(ylabel="slices", ylim=(0, None))
    figure.legend(handles=axes[0, 0].lines, loc="outside upper right", ncols=3)
    _write(figure, path)


def boxes(rows: Sequence[dict], path: Path) -> None:
    """Dice by vendor, a panel per class. rows: dicts with subject, phase, vendor, class, dice. Whiskers reach
    to the furthest value within 1.5 box heights; groups of fewer than ten show every value.
    """
    classes = [name for name in CLASSES if any(row["class"] == name for row in rows)]
    vendors = sorted({row["vendor"] for row in rows}, key=lambda vendor: vendor or "~")  # unknown ones last
    columns = len(classes) if len(vendors) <= 4 else 1
    figure, axes = _grid(len(classes), columns, height=1.9, sharey=True)
    labels = []
    for vendor in vendors:
        name = fill(vendor or "unknown", max(4, 88 // (columns * len(vendors))))  # characters side by side
        labels.append(f"{name}\nn={len({row['subject'] for row in rows if row['vendor'] == vendor})}")
    look = {"medianprops": {"color": "black", "linewidth": 1.4}, "widths": 0.34, "patch_artist": True}
    look |= {"flierprops": {"marker": "o", "markersize": 2.5, "markeredgewidth": 0.6}, "manage_ticks": False}
    for axis, name in zip(axes, classes, strict=True):
        axis.set(title=name, xlim=(-0.6, len(vendors) - 0.4))
        axis.set_xticks(range(len(vendors)), labels, parse_math=False)
        axis.grid(axis="y", alpha=0.3)
        for side, phase in zip((-0.2, 0.2), PHASES, strict=True):
            shown = [row for row in rows if (row["class"], row["phase"]) == (name, phase)]
            groups = [[row["dice"] for row in shown if row["vendor"] == vendor] for vendor in vendors]
            places = np.arange(len(vendors)) + side
            axis.boxplot(groups, positions=places, boxprops=_PHASE_BOXES[phase] | _EDGE, **look)
            for x, dice in zip(places, groups, strict=True):
                if len(dice) < 10:
                    beside = (np.arange(len(dice)) - (len(dice) - 1) / 2) * 0.025
                    axis.plot(x + beside, dice, "o", color="black", markersize=2.2, zorder=3)
    for axis in axes[::columns]:
        axis.set_ylabel("3D Dice")
    handles = [Patch(label=phase, **_PHASE_BOXES[phase], **_EDGE) for phase in PHASES]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    _write(figure, path)


def learning_curves(scores: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """Mean Dice by number of labelled subjects; bars are the sample standard deviation over seeds. scores:
    {label: {number of subjects, rising: [Dice of each seed]}}; "Baseline" is black.
    """
    figure, (axis,) = _grid(1, 1, height=2.9)
    axis.set(xlabel="labelled subjects", ylabel="3D Dice (mean ± SD over seeds)")
    numbers, looks = sorted({n for points in scores.values() for n in points}), cycle(_METHOD_LINES)
    for i, (label, points) in enumerate(scores.items()):
        found = [stats.describe(seeds) for seeds in points.values()]
        mean, std, seeds = ([each[name] for each in found] for name in ("mean", "std", "number"))
        colour, marker, line = ("black", "o", "-") if label == "Baseline" else next(looks)
        aside = (i - (len(scores) - 1) / 2) * 0.3 / len(scores)  # so that bars do not cover each other
        name = f"{label} (seeds: {' to '.join(map(str, sorted({min(seeds), max(seeds)})))})"
        look = {"fmt": marker + line, "color": colour, "capsize": 2, "markersize": 4, "linewidth": 1.2}
        axis.errorbar(np.searchsorted(numbers, list(points)) + aside, mean, std, label=name, **look)
    axis.set_xticks(range(len(numbers)), numbers)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    _write(figure, path)


def volume_curve(
    title: str, ml: dict, path: Path, step_s: float | None, phases: dict, excluded: Sequence[int]
) -> None:
    """Volumes over the cycle. ml: {LV, RV: (T,)}; step_s: time between frames, None if unknown; phases: {ED,
    ES: frame}, shown as vertical lines; `excluded` frames, which cannot be ED or ES, get a mark.
    """
    figure, (axis,) = _grid(1, 1, height=1.6)
    frames = np.arange(len(ml["LV"]))
    x, label = (frames * step_s * 1000, "time (ms)") if step_s else (frames, "frame")
    for name in ("LV", "RV"):
        axis.plot(x, ml[name], **_CLASS_LINES[name], markersize=2, label=name)
    for name, frame in phases.items():
        line = "-" if name == "ED" else ":"
        axis.axvline(x[frame], color="0.3", linewidth=0.9, linestyle=line, label=name, zorder=0)
    if excluded:
        marked = [*ml["LV"][excluded], *ml["RV"][excluded]]
        axis.plot([*x[excluded]] * 2, marked, "x", color="0.4", markersize=5, label="not for ED, ES")
    axis.set_title(shortened(title), parse_math=False)
    axis.set(xlabel=label, ylabel="volume (ml)", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=5)
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


def _write(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.tick_params(labelsize=_POINTS)
    for text in figure.findobj(Text):
        text.set_fontsize(_POINTS)
    save_figure(figure, path, dpi=300)
