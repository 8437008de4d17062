"""The paper's tables, from evaluated runs."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmrssp.data.subject import CLASSES
from cmrssp.evaluation.study import METHODS, SUBSETS, VENDORS, Arm, Evaluated
from cmrssp.files import atomic

_NOBODY = "no subjects"  # in a cell whose runs are there, but no test subject of that vendor or phase


@dataclass(frozen=True)
class Table:
    """`name` is that of its CSV; cells are as they are printed, bold ones between two pairs of asterisks."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]


def tables(runs: Sequence[Evaluated]) -> list[Table]:
    """Tables 1 to 4, the comparison in section 3, and supplement B, of at least one run. A cell without a run
    is empty.

    Bold in table 1: of each row the methods with the biggest mean, if it is above the baseline's; in tables 2
    and 3: a mean above the one without pretraining. Means count as printed, with two decimals, so that what
    looks equal is equal: a tie is bold twice, and a gain in the third decimal is none.
    """
    ab, cd = ({"vendors": names} for names in VENDORS.values())
    ed, es = {"phases": ("ED",)}, {"phases": ("ES",)}

    def cells(arm: Arm, *columns: dict) -> list[str]:
        return [_cell([run.dice(**column) for run in runs if run.arm == arm]) for column in columns]

    def generalisation(named: dict[str, dict], *columns: dict) -> list[list[str]]:
        rows = []
        for name, arm in named.items():
            none, ours = (cells(Arm(method, **arm), *columns) for method in ("scratch", "mim"))
            bold = [_bold(c, above=_printed(n)) for c, n in zip(ours, none, strict=True)]
            rows += [["None", name, *none], ["MIM", name, *bold]]
        return rows

    over_seeds = "± sample standard deviation over training seeds"
    subsets = []
    for n in SUBSETS:
        baseline, *ours = (cells(Arm(method, n), {})[0] for method in METHODS)
        best = max((_printed(cell) for cell in ours), key=np.nan_to_num)
        bold = [_bold(cell, above=_printed(baseline), at_least=best) for cell in ours]
        subsets.append([_row_name(n, runs), baseline, *bold])
    return [
        Table(
            "table1",
            f"Table 1: Mean test Dice over {len(runs[0].vendors)} test subjects and the foreground classes "
            f"{over_seeds}, by labelled training subjects (slices, mean over seeds). Bold: the biggest "
            "increase over the baseline",
            ["#subjects (#slices)", *METHODS.values()],
            subsets,
        ),
        Table(
            "table2",
            f"Table 2: Generalisation to unseen cardiac phases. Mean test Dice {over_seeds}. Bold: "
            "improvements by pretraining",
            ["Pretraining", "Fine-tuning", "Both time frames", "ED time frames", "ES time frames"],
            generalisation({f"{p.upper()} time frames": {"phases": p} for p in ("ed", "es")}, {}, ed, es),
        ),
        Table(
            "table3",
            f"Table 3: Generalisation to unseen vendors. Mean test Dice {over_seeds}. Bold: improvements by "
            "pretraining",
            ["Pretraining", "Fine-tuning", "All vendors", "Vendors A+B", "Vendors C+D"],
            generalisation(
                {f"Vendors {group}": {"vendors": frozenset(v)} for group, v in VENDORS.items()}, {}, ab, cd
            ),
        ),
        Table(
            "table4",
            f"Table 4: Baselines with and without data augmentation. Mean test Dice {over_seeds}",
            ["Data augmentation", "ED time frames", "ES time frames", "Vendors A+B", "Vendors C+D"],
            [
                [answer, *cells(Arm("scratch", augmentation=a), ed, es, ab, cd)]
                for answer, a in (("Yes", "on"), ("No", "off"))
            ],
        ),
        Table(
            "section3",
            f"Section 3: Training and fine-tuning without data augmentation. Mean test Dice {over_seeds}",
            ["Model", "With data augmentation", "Without data augmentation"],
            [
                [METHODS[m], *(cells(Arm(m, augmentation=a), {})[0] for a in ("on", "off"))]
                for m in ("scratch", "mim")
            ],
        ),
        Table(
            "supplementB",
            "Supplement B: Test Dice of each class, all labelled training subjects. Mean ± sample standard "
            "deviation over test subjects, both averaged over training seeds",
            ["Class", *METHODS.values()],
            [
                [
                    name,
                    *(
                        _cell([r.dice(classes=(name,)) for r in runs if r.arm == Arm(m)], over_subjects=True)
                        for m in METHODS
                    ),
                ]
                for name in CLASSES
            ],
        ),
    ]


def _cell(seeds: Sequence[Sequence[float]], *, over_subjects: bool = False) -> str:
    """From the subjects' Dice of each seed: the mean and its spread over seeds, or the mean of the spreads
    over subjects; a dash for the spread of one.
    """
    if not seeds:
        return ""
    if not all(seeds):
        return _NOBODY
    means = [float(np.mean(dice)) for dice in seeds]
    spreads = [
        float(np.std(s, ddof=1)) if len(s) > 1 else None for s in (seeds if over_subjects else [means])
    ]
    spread = "-" if None in spreads else f"{np.mean(spreads):.3f}"
    return f"{np.mean(means):.2f} ± {spread}"


def _printed(cell: str) -> float:
    """The mean that a cell shows; NaN, which is above and below nothing, for a cell without."""
    return float(cell.split(" ")[0]) if "±" in cell else np.nan


def _bold(cell: str, *, above: float, at_least: float = 0.0) -> str:
    return f"**{cell}**" if _printed(cell) > above and _printed(cell) >= at_least else cell


def _row_name(n: int | None, runs: Sequence[Evaluated]) -> str:
    """Labelled subjects, and the mean over seeds of their slices."""
    row = [run for run in runs if run.arm.plain and run.arm.n_subjects == n]
    if not row:
        return f"{n or 'all'} (-)"
    seeds: dict[int, list[int]] = {}
    for run in row:
        seeds.setdefault(run.seed, []).append(run.slices)
    numbers = [run.n_subjects for run in row]
    subjects = "–".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))
    return f"{subjects} ({np.mean([np.mean(slices) for slices in seeds.values()]):.0f})"


def learning_curves(runs: Sequence[Evaluated]) -> dict[str, dict[int, list[float]]]:
    """{method: {labelled subjects that it was fine-tuned on: mean test Dice of each seed}}, both in rising
    order, of the runs with every phase and vendor and with augmentation; also other numbers than the paper's.
    """
    curves: dict[str, dict[int, list[float]]] = {}
    order = list(METHODS)
    for run in sorted(runs, key=lambda run: (order.index(run.arm.pretraining), run.n_subjects, run.seed)):
        if run.arm.plain:
            points = curves.setdefault(run.arm.pretraining, {})
            points.setdefault(run.n_subjects, []).append(float(np.mean(run.dice())))
    return curves


def markdown(table: Table) -> str:
    """The title, an empty line, the table."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join([table.title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def write_csv(tables: Sequence[Table], folder: str | Path) -> list[Path]:
    """One <name>.csv per table, cells as they are printed, without the marks of bold ones; their paths."""
    paths = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for table in tables:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([cell.strip("*") for cell in row] for row in (table.header, *table.rows))
        paths.append(Path(folder) / f"{table.name}.csv")
        with atomic(paths[-1]) as file:
            file.write(text.getvalue().encode())
    return paths
