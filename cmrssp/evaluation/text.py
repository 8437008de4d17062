"""What an evaluation prints: tables as plain text."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cmrssp.data.subject import CLASSES
from cmrssp.evaluation import plots, stats
from cmrssp.evaluation.scoring import Scores


def dice_table(table: Sequence[dict]) -> str:
    """Mean and sample standard deviation over subjects, per class: 3D Dice by phase, then distances in mm.
    table: of `scoring.breakdown`. A dash where no reference has the class.
    """
    found = {(row["by"], row["group"], row["metric"], row["class"]): row for row in table}
    phases = [group for by, group, metric, name in found if (by, metric, name) == ("phase", "dice", "mean")]
    lines = {phase: ("phase", phase, "dice") for phase in phases}
    lines |= {"both": ("all", "", "dice")} if len(phases) > 1 else {}
    lines |= {"HD95 mm": ("all", "", "hd95_mm"), "ASSD mm": ("all", "", "assd_mm")}
    text = f"{'3D Dice':<8}" + "".join(f"{name:>16}" for name in (*CLASSES, "mean"))
    for title, group in lines.items():
        text += f"\n{title:<8}"
        digits = 3 if group[2] == "dice" else 2
        for row in (found.get((*group, name)) for name in (*CLASSES, "mean")):
            measured = row and row["number"]
            shown = f"{row['mean']:.{digits}f} ± {row['std']:.{digits}f}" if measured else "-"
            text += f"{shown:>16}"
    return text


def notes(scores: Scores) -> str:
    """Lines about what the tables leave out."""
    lines = []
    if scores.undrawn:
        lines.append(f"no reference has {' or '.join(scores.undrawn)}: left out of every mean\n")
    if scores.missed:
        undrawn = Counter(row["class"] for row in scores.rows if row["missed"] and not row["in_reference"])
        volumes = [f"{n} in {count} volumes ({undrawn[n]} undrawn)" for n, count in scores.missed.items()]
        what = "missed (in only one of the two label maps, so without a distance; undrawn: by the reference)"
        lines.append(f"{what}: {', '.join(volumes)}\n")
    if scores.unlabelled:
        lines.append(f"left out, without labels: {', '.join(scores.unlabelled)}\n")
    return "".join(lines)


def breakdown_table(rows: Sequence[dict]) -> str:
    """The mean Dice of each group of `scoring.breakdown`, unless it is the only group of its kind."""
    lines = [f"{'':<32}{'n':>4}{'mean':>8}{'std':>8}{'median':>8}{'5 %':>8}   95 % interval of the mean"]
    rows = [row for row in rows if (row["class"], row["metric"]) == ("mean", "dice")]
    kinds = [row["by"] for row in rows]
    for row in rows:
        if row["by"] == "all" or kinds.count(row["by"]) > 1:
            figures = "".join(f"{row[k]:>8.3f}" for k in ("mean", "std", "median", "percentile_5"))
            name = f"{row['by']} {row['group']}".strip()
            lines.append(f"{name:<32}{row['number']:>4}{figures}   {row['low']:.3f} to {row['high']:.3f}")
    return "\n".join(lines)


def agreement_table(pairs: Mapping[str, Sequence[np.ndarray]]) -> str:
    """Bias and limits of agreement of clinical numbers: {name: (predicted (N,), reference (N,))}."""
    lines = [f"{'predicted - reference':<24}{'n':>4}{'bias':>9}   limits of agreement"]
    for name, pair in pairs.items():
        figures = "{number:>4}{bias:>9.2f}   {lower:.2f} to {upper:.2f}"
        lines.append(f"{name:<24}{figures.format(**stats.bland_altman(*pair))}")
    return "\n".join(lines)


def prediction_table(rows: Sequence[dict]) -> str:
    """Volumes, ejection fractions and flags of predicted cines."""
    columns = {"lv_edv_ml": "EDV ml", "lv_esv_ml": "ESV ml", "lv_ef_percent": "EF %", "lv_mass_g": "mass g"}
    columns |= {"rv_edv_ml": "RV EDV", "rv_ef_percent": "RV EF %"}
    lines = [f"{'cine':<32}" + "".join(f"{title:>9}" for title in columns.values()) + "   flags"]
    for row in rows:
        cells = "".join(f"{'-':>9}" if row[c] is None else f"{row[c]:>9.1f}" for c in columns)
        notes = "; ".join(filter(None, (row["flags"], row["error"] and f"error: {row['error']}")))
        lines.append(f"{plots.shortened(row['cine']):<32}{cells}   {notes or 'none'}")
    return "\n".join(lines)


def comparison_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Every run against the first. scores: {run: {subject: Dice}}. Raises UserError for a single run."""
    titles = f"{'difference':>11}   95 % interval       p       Holm p  effect"
    lines = [f"{f'against {next(iter(scores))}':<40}{'n':>4}{titles}"]
    figures = (
        "{number:>4}{difference:>+11.4f}   {lower:+.4f} to {upper:+.4f}  {p:<8.2g}{p_holm:<8.2g}{effect:+.2f}"
    )
    for name, row in stats.compare(scores).items():
        lines.append(f"{name:<40}{figures.format(**row)}")
    return "\n".join(lines)
