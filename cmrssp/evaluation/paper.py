"""The paper's tables and learning curves from evaluated runs, and the commands of the missing runs."""

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cmrssp.data.subject import CLASSES
from cmrssp.evaluation.study import BEST, LABELS, SCRATCH, SUBSETS, VENDORS, Arm, Evaluated, arms, json_object
from cmrssp.files import atomic, below

SEEDS = (0, 1, 2)
_NOBODY = "no subjects"  # a cell with runs, but without a test subject of that vendor or phase


@dataclass(frozen=True)
class Table:
    """`name` is that of its CSV. Cells are strings; bold ones stand between two pairs of asterisks."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]


def tables(runs: Sequence[Evaluated]) -> list[Table]:
    """Tables 1 to 4, the comparison in section 3, and supplement B. A cell without a run is empty. A
    pretraining that the paper does not have, and self-training, get columns and rows of their own.

    Bold in table 1: the largest mean of a row, if it is above the baseline's; in tables 2 and 3: a mean above
    the one without pretraining. Means are compared as printed, with two decimals: cells that look equal are
    equal, so both cells of a tie are bold, and a gain in the third decimal is none.
    """
    ab, cd = ({"vendors": names} for names in VENDORS.values())
    ed, es = {"phases": ("ED",)}, {"phases": ("ES",)}
    starts = [Arm(method) for method in LABELS]
    found = {Arm(run.arm.pretraining, predicted=run.arm.predicted) for run in runs}
    further = sorted(found - set(starts), key=lambda arm: arm.label)
    baseline, columns = Arm(SCRATCH), [*starts, *further]

    def cells(arm: Arm, *subsets: dict) -> list[str]:
        return [_cell([run.dice(**subset) for run in runs if run.arm == arm]) for subset in subsets]

    def generalisation(named: dict[str, dict], *subsets: dict) -> list[list[str]]:
        rows = []
        for name, changes in named.items():
            none = cells(replace(baseline, **changes), *subsets)
            rows.append(["None", name, *none])
            for arm in (Arm(BEST), *further):
                ours = cells(replace(arm, **changes), *subsets)
                if arm == Arm(BEST) or any(ours):
                    bold = [_bold(c, above=_printed(n)) for c, n in zip(ours, none, strict=True)]
                    rows.append([arm.label, name, *bold])
        return rows

    over_seeds = "± sample standard deviation over training seeds"
    subjects = f"{len(runs[0].vendors)} test subjects" if runs else "the test subjects"
    by_subset = []
    for n in SUBSETS:
        without, *ours = (cells(replace(arm, n_subjects=n), {})[0] for arm in columns)
        best = max((_printed(cell) for cell in ours), key=np.nan_to_num)
        bold = [_bold(cell, above=_printed(without), at_least=best) for cell in ours]
        by_subset.append([_row_name(n, runs), without, *bold])
    return [
        Table(
            "table1",
            f"Table 1: Mean test Dice over {subjects} and the foreground classes {over_seeds}, by labelled "
            "training subjects (slices, mean over seeds). Bold: the largest increase over the baseline",
            ["#subjects (#slices)", *(arm.label for arm in columns)],
            by_subset,
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
                [answer, *cells(replace(baseline, augmentation=value), ed, es, ab, cd)]
                for answer, value in (("Yes", "on"), ("No", "off"))
            ],
        ),
        Table(
            "section3",
            f"Section 3: Training and fine-tuning without data augmentation. Mean test Dice {over_seeds}",
            ["Model", "With data augmentation", "Without data augmentation"],
            [
                [arm.label, *(cells(replace(arm, augmentation=a), {})[0] for a in ("on", "off"))]
                for arm in (baseline, Arm(BEST))
            ],
        ),
        Table(
            "supplementB",
            "Supplement B: Test Dice of each class, all labelled training subjects. Mean ± sample standard "
            "deviation over test subjects, both averaged over training seeds",
            ["Class", *(arm.label for arm in columns)],
            [
                [
                    name,
                    *(
                        _cell([r.dice(classes=(name,)) for r in runs if r.arm == arm], over_subjects=True)
                        for arm in columns
                    ),
                ]
                for name in CLASSES
            ],
        ),
    ]


def _cell(seeds: Sequence[dict[str, float]], *, over_subjects: bool = False) -> str:
    """From {subject: Dice} of each seed: the mean and its spread over seeds, or the mean of the spreads over
    subjects; a dash for the spread of one.
    """
    if not seeds:
        return ""
    if not all(seeds):
        return _NOBODY
    scores = [list(dice.values()) for dice in seeds]
    means = [float(np.mean(dice)) for dice in scores]
    spreads = [
        float(np.std(s, ddof=1)) if len(s) > 1 else None for s in (scores if over_subjects else [means])
    ]
    spread = "-" if None in spreads else f"{np.mean(spreads):.3f}"
    return f"{np.mean(means):.2f} ± {spread}"


def _printed(cell: str) -> float:
    """The mean that a cell shows; NaN, which is neither above nor below anything, for a cell without."""
    return float(cell.split(" ")[0]) if "±" in cell else np.nan


def _bold(cell: str, *, above: float, at_least: float = 0.0) -> str:
    return f"**{cell}**" if _printed(cell) > above and _printed(cell) >= at_least else cell


def _row_name(n: int | None, runs: Sequence[Evaluated]) -> str:
    """Labelled subjects, and the mean over seeds of their slices."""
    row = [run for run in runs if run.arm.in_table_1 and run.arm.n_subjects == n and not run.arm.predicted]
    if not row:
        return f"{n or 'all'} (-)"
    seeds: dict[int, list[int]] = {}
    for run in row:
        seeds.setdefault(run.seed, []).append(run.slices)
    numbers = [run.n_subjects for run in row]
    subjects = "–".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))
    return f"{subjects} ({np.mean([np.mean(slices) for slices in seeds.values()]):.0f})"


def learning_curves(runs: Sequence[Evaluated]) -> dict[str, dict[int, list[float]]]:
    """{label: {labelled subjects that it was fine-tuned on: mean test Dice of each seed}}, the baseline first
    and numbers rising, of the runs with every phase and vendor and with augmentation; numbers of subjects
    that the paper does not have are included.
    """
    curves: dict[str, dict[int, list[float]]] = {}
    order = list(LABELS.values())

    def place(run: Evaluated) -> tuple:
        known = run.arm.label in order
        position = order.index(run.arm.label) if known else len(order)
        return position, run.arm.label, run.n_subjects, run.seed

    for run in sorted(runs, key=place):
        if run.arm.in_table_1:
            points = curves.setdefault(run.arm.label, {})
            points.setdefault(run.n_subjects, []).append(float(np.mean(list(run.dice().values()))))
    return curves


def write(made: Sequence[Table], commands: Sequence[str], folder: Path) -> None:
    """One <name>.csv per table, cells as printed, without the asterisks of bold ones; and commands.sh."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in made:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([cell.strip("*") for cell in row] for row in (table.header, *table.rows))
        with atomic(folder / f"{table.name}.csv") as file:
            file.write(text.getvalue().encode())
    with atomic(folder / "commands.sh") as file:
        file.write("".join(f"{command}\n" for command in commands).encode())


def missing(runs: Sequence[Evaluated], runs_dir: Path, data: Sequence[str] = ()) -> list[str]:
    """The commands that bring every cell to three seeds: the pretrainings first, then one line for the
    fine-tuning and evaluation of each missing seed. Started again, each goes on where it stopped.

    Runs are named RUNS_DIR/<Arm.run_name>, pretrainings RUNS_DIR/<method>. Data, split and --quick are those
    of the newest of the `runs` that knows its data; without such a run the paths `data`, else DATA, which the
    reader replaces. Other flags of that run, such as --epochs, are not repeated.
    """
    newest = sorted(runs, key=lambda run: run.written_ns, reverse=True)
    model = next((run for run in newest if run.args.get("data")), next(iter(newest), None))
    args = model.args if model else {}
    suffix = ["--label-suffix", args["label_suffix"]] if args.get("label_suffix") else []
    split = model.folder / "split.json" if model else None
    source = ["--data", *(data or args.get("data", ["DATA"])), *suffix]
    source += ["--split-file", str(split)] if split and split.is_file() and not data else []
    skip = ["--skip-broken"] if args.get("skip_broken") else []
    common = [*skip, *(["--quick"] if args.get("quick") else [])]
    known = {SCRATCH: None, **_pretrained(newest, runs_dir)}
    pretrainings, others = [], []
    most = max((run.n_subjects for run in runs if run.arm.n_subjects is None), default=None)
    for seed in SEEDS:
        for arm in arms():
            method, done = arm.pretraining, {run.seed for run in runs if run.arm == arm}
            lacking = [seed for seed in SEEDS if seed not in done][: max(0, len(SEEDS) - len(done))]
            if seed not in lacking or (most and arm.n_subjects and arm.n_subjects >= most):
                continue  # the data has no more labelled training subjects than `most`
            if method not in known:
                known[method] = str(runs_dir / method)
                flags = ["--method", method, *source, *common, "--out", known[method], "--resume", "auto"]
                pretrainings.append(shlex.join(["python", "train_ssp.py", *flags]))
            out = str(runs_dir / arm.run_name(seed))
            start = ["--init", known[method]] if known[method] else source
            flags = [*start, *arm.flags, *common, "--seed", str(seed), "--out", out, "--resume", "auto"]
            score = ["python", "evaluate.py", "--split", "test", "--checkpoint", out, *skip]
            others.append(f"{shlex.join(['python', 'finetune.py', *flags])} && {shlex.join(score)}")
    return pretrainings + others


def _pretrained(newest: Sequence[Evaluated], runs_dir: Path) -> dict[str, str]:
    """{method: what its newest run started from; without one, the newest finished pretraining below
    `runs_dir` that holds out the same test subjects}.
    """
    test = set(newest[0].vendors) if newest else set()
    finished = []
    for path in below(runs_dir, ("args.json",)):
        args, weights = json_object(path), path.with_name("unet.pt")
        held_out = json_object(path.with_name("split.json")).get("test", ())
        if args.get("kind") == "pretraining" and weights.is_file() and test <= set(held_out):
            finished.append((weights.stat().st_mtime_ns, str(args.get("method")), str(path.parent)))
    starts = [(r.arm.pretraining, r.args.get("init")) for r in reversed(newest) if not r.arm.predicted]
    return {
        **{method: folder for _, method, folder in sorted(finished)},
        **{method: init for method, init in starts if init and Path(init).expanduser().exists()},
    }
