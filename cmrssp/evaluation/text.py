"""What an evaluation prints: tables as plain text."""

from collections.abc import Iterable, Sequence

from cmrssp.data.subject import CLASSES
from cmrssp.evaluation import plots, stats
from cmrssp.evaluation.paper import Table
from cmrssp.evaluation.scoring import Scores, missed


def dice_table(rows: Sequence[dict], present: Sequence[str]) -> str:
    """Mean and sample standard deviation over subjects, per class: 3D Dice by phase, then distances in mm.

    rows: dicts with subject, phase (ED or ES), class, dice, hd95_mm and assd_mm. `mean` averages a subject's
    `present` classes; other classes show a dash. A subject with a missed structure has no distance.
    """

    def line(title: str, phase: str, metric: str, digits: int) -> str:
        cells = []
        for classes in (*([name] for name in CLASSES), present):
            found = stats.describe(stats.per_subject(rows, phase, classes, metric).values())
            shown = f"{found['mean']:.{digits}f} ± {found['std']:.{digits}f}"
            cells.append(shown if set(classes) <= set(present) else "-")
        return f"{title:<8}" + "".join(f"{cell:>16}" for cell in cells)

    phases = sorted({row["phase"] for row in rows})
    lines = [f"{'3D Dice':<8}" + "".join(f"{name:>16}" for name in (*CLASSES, "mean"))]
    lines += [line(phase, phase, "dice", 3) for phase in (*phases, *(["both"] if len(phases) > 1 else []))]
    lines += [line(f"{name} mm", "both", f"{name.lower()}_mm", 2) for name in ("HD95", "ASSD")]
    return "\n".join(lines)


def notes(scores: Scores) -> str:
    """Lines about what the tables leave out."""
    lines = []
    if absent := [name for name in CLASSES if name not in scores.present]:
        lines.append(f"no reference has {' or '.join(absent)}: left out of every mean")
    if lost := missed(scores):
        where = ", ".join(f"{name} in {count} volumes" for name, count in lost.items())
        lines.append(f"missed (in only one of the two label maps, so without a distance): {where}")
    if scores.unlabelled:
        lines.append(f"left out, without labels: {', '.join(scores.unlabelled)}")
    return "".join(f"{line}\n" for line in lines)


def breakdown_table(rows: Sequence[dict], metric: str = "dice") -> str:
    """The mean over classes of each group of `scoring.breakdown`, unless it is the only group of its kind."""
    groups = {row["by"]: {r["group"] for r in rows if r["by"] == row["by"]} for row in rows}
    lines = [f"{'':<32}{'n':>4}{'mean':>8}{'std':>8}{'median':>8}{'5 %':>8}   95 % interval of the mean"]
    for row in rows:
        shown = row["by"] == "all" or len(groups[row["by"]]) > 1
        if shown and (row["class"], row["metric"]) == ("mean", metric):
            figures = "".join(f"{row[k]:>8.3f}" for k in ("mean", "std", "median", "percentile_5"))
            name = f"{row['by']} {row['group']}".strip()
            lines.append(f"{name:<32}{row['number']:>4}{figures}   {row['low']:.3f} to {row['high']:.3f}")
    return "\n".join(lines)


def agreement_table(clinical: Sequence[dict], names: Iterable[str]) -> str:
    """Bias and limits of agreement of the clinical numbers, predicted minus reference."""
    lines = [f"{'predicted - reference':<24}{'n':>4}{'bias':>9}   limits of agreement"]
    for name in names:
        found = stats.bland_altman(*([row[name + end] for row in clinical] for end in ("", "_reference")))
        limits = f"{found['lower']:.2f} to {found['upper']:.2f}"
        lines.append(f"{name:<24}{found['number']:>4}{found['bias']:>9.2f}   {limits}")
    return "\n".join(lines)


def prediction_table(rows: Sequence[dict]) -> str:
    """Volumes, ejection fractions and flags of predicted cines."""
    columns = {"lv_edv_ml": "EDV ml", "lv_esv_ml": "ESV ml", "lv_ef_percent": "EF %", "lv_mass_g": "mass g",
               "rv_edv_ml": "RV EDV", "rv_ef_percent": "RV EF %"}  # fmt: skip
    lines = [f"{'cine':<32}" + "".join(f"{title:>9}" for title in columns.values()) + "   flags"]
    for row in rows:
        cells = "".join(f"{'-':>9}" if row[c] is None else f"{row[c]:>9.1f}" for c in columns)
        notes = filter(None, (row["flags"], row["error"] and f"error: {row['error']}"))
        lines.append(f"{plots.shortened(row['cine']):<32}{cells}   {'; '.join(notes) or 'none'}")
    return "\n".join(lines)


def comparison_table(rows: dict[str, dict], first: str) -> str:
    """Every run against the first, from `stats.compare`."""
    lines = [
        f"{f'against {first}':<40}{'n':>4}{'difference':>11}   95 % interval       p       Holm p  effect"
    ]
    for name, row in rows.items():
        figures = "{number:>4}{difference:>+11.4f}   {lower:+.4f} to {upper:+.4f}  {p:<8.2g}{p_holm:<8.2g}"
        lines.append(f"{name:<40}{figures.format(**row)}{row['effect']:+.2f}")
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """The title, an empty line and the table."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join([table.title, "", *(f"| {' | '.join(line)} |" for line in lines)])
