"""Tables and pictures: what a person reads of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.evaluation import stats
from cmrssp.runs.figures import save_figure

_TRUTH, _PREDICTION = "#56B4E9", "#E69F00"  # two hues that colour-blind readers tell apart
_SHEET_MM = 160.0


def dice_table(rows: Sequence[dict]) -> str:
    """Mean and sample standard deviation over subjects, per class: 3D Dice by phase, then the distances in
    mm.

    rows: dicts with subject, phase (ED or ES), class, dice, hd95_mm and assd_mm. `mean` averages the classes
    of a subject, `both` its phases; subjects with a missed structure have no distance and are left out of it.
    """
    lines = [f"{'3D Dice':<8}" + "".join(f"{name:>16}" for name in (*CLASSES, "mean"))]
    phases = [phase for phase in ("ED", "ES") if any(row["phase"] == phase for row in rows)]
    for phase in (*phases, *(["both"] if len(phases) > 1 else [])):
        lines.append(f"{phase:<8}" + _line(rows, phase, "dice", 3))
    for metric, title in (("hd95_mm", "HD95 mm"), ("assd_mm", "ASSD mm")):
        lines.append(f"{title:<8}" + _line(rows, "both", metric, 2))
    return "\n".join(lines)


def _line(rows: Sequence[dict], phase: str, metric: str, digits: int) -> str:
    cells = [spread(per_subject(rows, phase, [name], metric)) for name in CLASSES]
    cells.append(spread(per_subject(rows, phase, CLASSES, metric)))
    return "".join(f"{f'{mean:.{digits}f} ± {std:.{digits}f}':>16}" for mean, std in cells)


def per_subject(
    rows: Sequence[dict], phase: str, classes: Sequence[str], metric: str = "dice"
) -> dict[str, float]:
    """{subject: mean over its values of the classes, in both phases where `phase` is "both"}. NaN for a
    distance where one of the structures was missed; one that neither label map has is not asked for.
    """
    scores: dict[str, list[float]] = {}
    for row in rows:
        asked = metric == "dice" or not row["absent"]
        if phase in (row["phase"], "both") and row["class"] in classes and asked:
            scores.setdefault(row["subject"], []).append(row[metric])
    return {subject: float(np.mean(values)) for subject, values in scores.items()}


def breakdown_table(rows: Sequence[dict], metric: str = "dice") -> str:
    """The mean over classes of each group of `evaluation.breakdown`, one line per group; what has one group
    is left out.
    """
    groups = {row["by"]: {r["group"] for r in rows if r["by"] == row["by"]} for row in rows}
    rows = [row for row in rows if row["by"] == "all" or len(groups[row["by"]]) > 1]
    lines = [f"{'':<32}{'n':>4}{'mean':>8}{'std':>8}{'median':>8}{'5 %':>8}   95 % interval of the mean"]
    for row in rows:
        if row["class"] == "mean" and row["metric"] == metric:
            figures = "".join(f"{row[k]:>8.3f}" for k in ("mean", "std", "median", "percentile_5"))
            name = f"{row['by']} {row['group']}".strip()
            lines.append(f"{name:<32}{row['number']:>4}{figures}   {row['low']:.3f} to {row['high']:.3f}")
    return "\n".join(lines)


def agreement_table(clinical: Sequence[dict], names: Sequence[str]) -> str:
    """Bias and limits of agreement of the clinical numbers, predicted minus reference."""
    lines = [f"{'predicted - reference':<24}{'n':>4}{'bias':>9}   limits of agreement"]
    for name in names:
        found = stats.bland_altman(*([row[name + end] for row in clinical] for end in ("", "_reference")))
        lines.append(
            f"{name:<24}{found['number']:>4}{found['bias']:>9.2f}   {found['lower']:.2f} to "
            f"{found['upper']:.2f}"
        )
    return "\n".join(lines)


def prediction_table(rows: Sequence[dict]) -> str:
    """Volumes, function and flags of predicted cines, in the order of the rows."""
    columns = {"lv_edv_ml": "EDV ml", "lv_esv_ml": "ESV ml", "lv_ef_percent": "EF %", "lv_mass_g": "mass g",
               "rv_edv_ml": "RV EDV", "rv_ef_percent": "RV EF %"}  # fmt: skip
    lines = [f"{'cine':<32}" + "".join(f"{title:>9}" for title in columns.values()) + "   flags"]
    for row in rows:
        cells = "".join(f"{'-':>9}" if row[c] is None else f"{row[c]:>9.1f}" for c in columns)
        lines.append(f"{row['cine']:<32}{cells}   {row['flags'] or 'none'}")
    return "\n".join(lines)


def comparison_table(rows: dict[str, dict], first: str) -> str:
    """Every run against the first, as `statistics.compare` gives it."""
    lines = [
        f"{'against ' + first:<40}{'n':>4}{'difference':>11}   95 % interval       p       Holm p  effect"
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:<40}{row['number']:>4}{row['difference']:>+11.4f}   {row['lower']:+.4f} to "
            f"{row['upper']:+.4f}  {row['p']:<8.2g}{row['p_holm']:<8.2g}{row['effect']:+.2f}"
        )
    return "\n".join(lines)


def spread(scores: dict[str, float]) -> tuple[float, float]:
    """(mean, sample standard deviation) of what is a number; NaN where there is too little."""
    found = stats.describe(scores.values())
    return found["mean"], found["std"]


def around(centre: Sequence[float], spacing_mm: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of a 160 mm square around a centre in pixels, as far as the image reaches."""
    half = [_SHEET_MM / 2 / spacing for spacing in spacing_mm]
    return tuple(slice(max(0, int(c - h)), int(c + h) + 1) for c, h in zip(centre, half, strict=True))


def case(store: Store, subject: int, frame: int, title: str, prediction: np.ndarray, *, truth: bool) -> dict:
    """What `contour_sheet` shows of a frame; with its reference or without."""
    return {
        "title": title,
        "image": store.volume(subject, frame),
        "truth": store.label_volume(subject, frame) if truth else None,
        "prediction": prediction,
        "spacing_mm": store.cines[subject].geometry.spacing_mm,
        "centre": store.cines[subject].centre,
    }


def contour_sheet(cases: Sequence[dict], path: Path, columns: int = 4) -> None:
    """Contours of truth and prediction on evenly spread slices, base on the left; one row per case.

    case: title, image (Z, H, W), truth and prediction (Z, H, W) label ids (truth may be None), spacing_mm and
    centre as (row, column).
    """
    figure = Figure(figsize=(2.3 * columns, 2.45 * len(cases) + 0.4))
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        shown = case["prediction"] if case["truth"] is None else case["truth"]
        slices = np.flatnonzero(shown.any(axis=(1, 2)))
        slices = slices if len(slices) else np.arange(len(shown))
        chosen = slices[np.unique(np.linspace(0, len(slices) - 1, columns).round().astype(int))]
        box = around(case["centre"], case["spacing_mm"])
        high = np.percentile(case["image"][(slice(None), *box)], 99.5)
        for axis in row[len(chosen) :]:
            axis.set_axis_off()
        for axis, z in zip(row, chosen, strict=False):
            axis.imshow(
                case["image"][(z, *box)],
                cmap="gray",
                vmin=0,
                vmax=high,
                aspect=case["spacing_mm"][0] / case["spacing_mm"][1],
            )
            for labels, colour in ((case["truth"], _TRUTH), (case["prediction"], _PREDICTION)):
                for id in () if labels is None else range(1, len(CLASSES) + 1):
                    mask = labels[(z, *box)] == id
                    if mask.any():
                        axis.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1.1)
            axis.set(xticks=[], yticks=[], xlabel=f"slice {z + 1} of {len(case['image'])}")
            axis.xaxis.label.set_fontsize(7)
        row[0].set_title(case["title"], loc="left", fontsize=9, parse_math=False)
    reference = "blue: reference, " if any(case["truth"] is not None for case in cases) else ""
    legend = f"{reference}orange: prediction; {_SHEET_MM:.0f} mm square around the crop centre"
    axes[-1, 0].text(0, -0.25, legend, transform=axes[-1, 0].transAxes, fontsize=9)
    save_figure(figure, path)
