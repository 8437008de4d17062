"""The paper's tables and learning curves from evaluated runs, and the commands of the missing runs."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cmrssp.data import dataset
from cmrssp.data.subject import CLASSES
from cmrssp.evaluation import stats
from cmrssp.evaluation.study import BEST, LABELS, SCRATCH, SUBSETS, VENDORS, Arm, Evaluated, arms
from cmrssp.files import atomic, below, json_object, write_csv

SEEDS = (0, 1, 2)
_MEAN = "mean test Dice ± sample standard deviation over training seeds"
_TITLES = {
    "table1": f"Table 1: {_MEAN}, by labelled training subjects (slices). Bold: the largest increase",
    "table2": f"Table 2: Generalisation to unseen cardiac phases, {_MEAN}. Bold: gains by pretraining",
    "table3": f"Table 3: Generalisation to unseen vendors, {_MEAN}. Bold: gains by pretraining",
    "table4": f"Table 4: Baselines with and without data augmentation, {_MEAN}",
    "section3": f"Section 3: Training and fine-tuning without data augmentation, {_MEAN}",
    "supplementB": "Supplement B: Test Dice of each class, all labelled training subjects, mean ± sample "
    "standard deviation over test subjects, both averaged over training seeds",
}


@dataclass(frozen=True)
class Table:
    """A bold cell has two asterisks before and behind it."""

    name: str  # of its CSV
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([_TITLES[self.name], "", *(f"| {' | '.join(line)} |" for line in lines)])


def tables(runs: Sequence[Evaluated]) -> list[Table]:
    """Tables 1 to 4, the comparison in section 3, and supplement B. A cell without a run is empty. Arms that
    the paper does not have get their own columns and rows. Bold, by the printed means: in table 1 the
    largest of a row, if above the baseline's; in tables 2 and 3 all above that without pretraining.
    """
    baseline, best = Arm(SCRATCH), Arm(BEST)
    paper_arms = [Arm(method) for method in LABELS]
    found = {Arm(run.arm.pretraining, predicted=run.arm.predicted) for run in runs}
    further = sorted(found - set(paper_arms), key=lambda arm: arm.label)
    columns = {arm: arm.label for arm in (*paper_arms, *further)}
    phases = {f"{phase} time frames": {"phase": phase} for phase in ("ED", "ES")}
    groups = {f"Vendors {group}": {"vendors": frozenset(names)} for group, names in VENDORS.items()}

    def cell(arm: Arm, *, over_subjects: bool = False, **subset) -> str:
        return _cell([run.dice(**subset) for run in runs if run.arm == arm], over_subjects)

    def generalisation(trained_on: dict[str, dict], subsets: dict[str, dict]) -> list[list[str]]:
        rows = []
        for name, change in trained_on.items():
            none, *others = (
                [cell(replace(arm, **change), **subset) for subset in ({}, *subsets.values())]
                for arm in (baseline, best, *further)
            )
            rows.append(["None", name, *none])
            for arm, ours in zip((best, *further), others, strict=True):
                if arm == best or any(ours):
                    rows.append([arm.label, name, *map(_bold, ours, none)])
        return rows

    numbers = {*SUBSETS, *(run.arm.n_subjects for run in runs if run.arm.in_table_1)} - {None}
    by_subset = []
    for n in (None, *sorted(numbers, reverse=True)):
        none, *ours = (cell(replace(arm, n_subjects=n)) for arm in columns)
        largest = max(map(_printed, ours), key=np.nan_to_num)
        bold = [_bold(each, none) if _printed(each) == largest else each for each in ours]
        by_subset.append([_row_name(n, runs), none, *bold])
    by_phase = generalisation({name: {"phases": p["phase"].lower()} for name, p in phases.items()}, phases)
    plain, plain_best = (replace(arm, augmentation="off") for arm in (baseline, best))
    subsets = phases | groups
    by_augmentation = [
        [word, *(cell(arm, **subset) for subset in subsets.values())]
        for word, arm in (("Yes", baseline), ("No", plain))
    ]
    section3 = [[a.label, cell(a), cell(b)] for a, b in ((baseline, plain), (best, plain_best))]
    by_class = [[c, *(cell(arm, over_subjects=True, classes=[c]) for arm in columns)] for c in CLASSES]
    trained = ["Pretraining", "Fine-tuning"]
    return [
        Table("table1", ["#subjects (#slices)", *columns.values()], by_subset),
        Table("table2", [*trained, "Both time frames", *phases], by_phase),
        Table("table3", [*trained, "All vendors", *groups], generalisation(groups, groups)),
        Table("table4", ["Data augmentation", *subsets], by_augmentation),
        Table("section3", ["Model", "With data augmentation", "Without data augmentation"], section3),
        Table("supplementB", ["Class", *columns.values()], by_class),
    ]


def _cell(seeds: Sequence[dict[str, float]], over_subjects: bool) -> str:
    """The mean of {subject: Dice} of each seed, and its standard deviation (a dash for one value) over seeds,
    or that over subjects, averaged over the seeds.
    """
    if not all(seeds):
        return "no subjects"  # of that vendor or phase
    if not seeds:
        return ""
    scores = [list(dice.values()) for dice in seeds]
    means = [float(np.mean(dice)) for dice in scores]
    spread = np.mean([stats.describe(each)["std"] for each in (scores if over_subjects else [means])])
    return f"{np.mean(means):.2f} ± " + ("-" if np.isnan(spread) else f"{spread:.3f}")


def _printed(cell: str) -> float:
    """The mean that a cell shows; NaN, which is neither above nor below anything, for a cell without."""
    return float(cell.split(" ")[0]) if "±" in cell else np.nan


def _bold(cell: str, baseline: str) -> str:
    return f"**{cell}**" if _printed(cell) > _printed(baseline) else cell


def _row_name(n: int | None, runs: Sequence[Evaluated]) -> str:
    """Labelled subjects, and the mean over seeds of their slices."""
    row = [run for run in runs if run.arm.in_table_1 and run.arm.n_subjects == n and not run.arm.predicted]
    if not row:
        return f"{n or 'all'} (-)"
    numbers = {run.n_subjects for run in row}
    slices = {run.seed: run.slices for run in row}
    return f"{'–'.join(map(str, sorted({min(numbers), max(numbers)})))} ({np.mean([*slices.values()]):.0f})"


def learning_curves(runs: Sequence[Evaluated]) -> dict[str, dict[int, list[float]]]:
    """{label: {labelled subjects, rising: mean test Dice of each seed}}, the baseline first, of the runs with
    every phase, every vendor and augmentation.
    """
    curves: dict[str, dict[int, list[float]]] = {label: {} for label in LABELS.values()}
    for run in sorted(runs, key=lambda run: (run.arm.label, run.n_subjects, run.seed)):
        if run.arm.in_table_1:
            points = curves.setdefault(run.arm.label, {})
            points.setdefault(run.n_subjects, []).append(float(np.mean(list(run.dice().values()))))
    return {label: points for label, points in curves.items() if points}


def write(made: Sequence[Table], commands: Sequence[str], folder: Path) -> None:
    """One <name>.csv per table, cells as printed without asterisks; and commands.sh."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in made:
        rows = [[cell.strip("*") for cell in row] for row in table.rows]
        write_csv(folder / f"{table.name}.csv", [dict(zip(table.header, row, strict=True)) for row in rows])
    with atomic(folder / "commands.sh") as file:
        file.write("".join(f"{command}\n" for command in commands).encode())


def missing(
    runs: Sequence[Evaluated], runs_dir: Path, data: Sequence[str] = (), label_suffix: str | None = None
) -> list[str]:
    """The commands that bring every cell to three seeds: the pretrainings first, then one line for the
    fine-tuning and evaluation of each missing seed, as long and with the learning rate, transfer, list of
    labelled subjects and batch size of the seeds that are there. Split, --quick and, without `data`, the data
    are those of the newest run; without one DATA, for the reader to replace.
    """
    newest = sorted(runs, key=lambda run: run.written_ns, reverse=True)
    model = next((run for run in newest if run.args.get("data")), None)
    args = model.args if model else {}
    source = ["--data", *(data or args.get("data", ["DATA"]))]
    suffix = label_suffix or args.get("label_suffix")
    source += [f"--label-suffix={suffix}"] if suffix else []
    source += ["--split-file", str(model.folder / "split.json")] if model and not data else []
    skip = ["--skip-broken"] * args.get("skip_broken", False)
    common = skip + ["--quick"] * args.get("quick", False)
    wanted, start = dataset.absolute(data) or args.get("data"), {SCRATCH: source}
    for method, run in _pretrained(newest, runs_dir).items():
        folder = Path(run).expanduser()
        pretrained_on = json_object((folder if folder.is_dir() else folder.parent) / "args.json").get("data")
        elsewhere = wanted and pretrained_on not in (None, wanted)
        start[method] = ["--init", run, *(source if elsewhere else [])]
    most = max((run.n_subjects for run in runs if run.arm.n_subjects is None), default=math.inf)
    pretrainings, others = [], []
    for seed in SEEDS:
        for arm, (name, changes) in arms().items():
            done = {run.seed for run in runs if run.arm == arm}
            lacking = [seed for seed in SEEDS if seed not in done][: max(0, len(SEEDS) - len(done))]
            if seed not in lacking or (arm.n_subjects or 0) >= most:
                continue  # the data has no more labelled training subjects than `most`
            method = arm.pretraining
            if method not in start:
                start[method] = ["--init", str(runs_dir / method)]
                flags = ["--method", method, *source, *common, "--out", str(runs_dir / method)]
                pretrainings.append(shlex.join(["python", "train_ssp.py", *flags, "--resume", "auto"]))
            out = str(runs_dir / f"{name}-seed{seed}")
            like = next((run.args for run in newest if run.arm == arm), {})  # another seed, if there is one
            names = ["epochs", "lr", *["transfer"] * (method != SCRATCH), "labelled", "batch_size"]
            same = [f"--{name.replace('_', '-')}={like[name]}" for name in names if like.get(name)]
            flags = [*start[method], *changes, *same, *common, "--seed", str(seed), "--out", out]
            flags += ["--resume", "auto"]
            score = ["python", "evaluate.py", "--split", "test", "--checkpoint", out, *skip]
            others.append(f"{shlex.join(['python', 'finetune.py', *flags])} && {shlex.join(score)}")
    return pretrainings + others


def _pretrained(newest: Sequence[Evaluated], runs_dir: Path) -> dict[str, str]:
    """{method: the checkpoint that its newest run started from, else the newest finished pretraining below
    `runs_dir` that holds out the same test subjects}.
    """
    test = newest[0].subjects if newest else set()
    found: list[tuple[float, str, str]] = []  # the last of a method counts
    for weights in below(runs_dir, ("unet.pt",)):
        args, split = (json_object(weights.with_name(name)) for name in ("args.json", "split.json"))
        if args.get("kind") == "pretraining" and test <= set(split.get("test", ())):
            found.append((weights.stat().st_mtime, args["method"], str(weights.parent)))
    started = {run.arm.pretraining: run.args.get("init") for run in reversed(newest) if not run.arm.predicted}
    kept = {method: init for method, init in started.items() if init and Path(init).expanduser().exists()}
    return {method: folder for _, method, folder in sorted(found)} | kept
