"""The paper's tables and learning curves from evaluated runs, and the commands of the missing runs."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cmrssp.data.subject import CLASSES
from cmrssp.evaluation import stats
from cmrssp.evaluation.study import BEST, LABELS, SCRATCH, SUBSETS, VENDORS, Arm, Evaluated, arms, json_object
from cmrssp.files import atomic, below, write_csv

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Table:
    """`name` is that of its CSV. A bold cell has two asterisks before and behind it."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]


def tables(runs: Sequence[Evaluated]) -> list[Table]:
    """Tables 1 to 4, the comparison in section 3, and supplement B. A cell without a run is empty. A
    pretraining that the paper does not have, and self-training, get their own columns and rows.

    Bold in table 1: the largest mean of a row, if it is above the baseline's; in tables 2 and 3: a mean above
    that without pretraining. Compared are the printed means, with two decimals: both cells of a tie are bold,
    and a gain in the third decimal is none.
    """
    baseline, best = Arm(SCRATCH), Arm(BEST)
    paper_arms = [Arm(method) for method in LABELS]
    found = {Arm(run.arm.pretraining, predicted=run.arm.predicted) for run in runs}
    further = sorted(found - set(paper_arms), key=lambda arm: arm.label)
    columns = [*paper_arms, *further]
    labels = [arm.label for arm in columns]
    phases = {f"{phase} time frames": phase for phase in ("ED", "ES")}
    groups = {f"Vendors {group}": frozenset(names) for group, names in VENDORS.items()}
    each_phase = [{"phases": (phase,)} for phase in phases.values()]
    each_group = [{"vendors": names} for names in groups.values()]

    def cells(arm: Arm, *subsets: dict) -> list[str]:
        return [_cell([run.dice(**subset) for run in runs if run.arm == arm]) for subset in subsets or ({},)]

    def generalisation(trained_on: dict[str, dict], *subsets: dict) -> list[list[str]]:
        rows = []
        for name, changes in trained_on.items():
            none = cells(replace(baseline, **changes), {}, *subsets)
            rows.append(["None", name, *none])
            for arm in (best, *further):
                ours = cells(replace(arm, **changes), {}, *subsets)
                if arm == best or any(ours):
                    bold = [_bold(c, above=_printed(n)) for c, n in zip(ours, none, strict=True)]
                    rows.append([arm.label, name, *bold])
        return rows

    by_subset = []
    for n in SUBSETS:
        none, *ours = (cells(replace(arm, n_subjects=n))[0] for arm in columns)
        largest = max((_printed(cell) for cell in ours), key=np.nan_to_num)
        bold = [_bold(cell, above=_printed(none), at_least=largest) for cell in ours]
        by_subset.append([_row_name(n, runs), none, *bold])
    by_phase = generalisation({n: {"phases": p.lower()} for n, p in phases.items()}, *each_phase)
    by_vendor = generalisation({n: {"vendors": v} for n, v in groups.items()}, *each_group)
    plain, plain_best = (replace(arm, augmentation="off") for arm in (baseline, best))
    by_augmentation = [
        [word, *cells(arm, *each_phase, *each_group)] for word, arm in (("Yes", baseline), ("No", plain))
    ]
    section3 = [[a.label, *cells(a), *cells(b)] for a, b in ((baseline, plain), (best, plain_best))]
    by_class = []
    for name in CLASSES:
        dice = [[run.dice(classes=(name,)) for run in runs if run.arm == arm] for arm in columns]
        by_class.append([name, *(_cell(seeds, over_subjects=True) for seeds in dice)])
    over_seeds = "± sample standard deviation over training seeds"
    mean = f"Mean test Dice {over_seeds}"
    subjects = f"{len(runs[0].vendors)} test subjects" if runs else "the test subjects"
    gains = "Bold: improvements by pretraining"
    return [
        Table("table1", f"Table 1: Mean test Dice over {subjects} and the foreground classes {over_seeds}, "
              "by labelled training subjects (slices, mean over seeds). Bold: the largest increase over the "
              "baseline", ["#subjects (#slices)", *labels], by_subset),
        Table("table2", f"Table 2: Generalisation to unseen cardiac phases. {mean}. {gains}",
              ["Pretraining", "Fine-tuning", "Both time frames", *phases], by_phase),
        Table("table3", f"Table 3: Generalisation to unseen vendors. {mean}. {gains}",
              ["Pretraining", "Fine-tuning", "All vendors", *groups], by_vendor),
        Table("table4", f"Table 4: Baselines with and without data augmentation. {mean}",
              ["Data augmentation", *phases, *groups], by_augmentation),
        Table("section3", f"Section 3: Training and fine-tuning without data augmentation. {mean}",
              ["Model", "With data augmentation", "Without data augmentation"], section3),
        Table("supplementB", "Supplement B: Test Dice of each class, all labelled training subjects. Mean ± "
              "sample standard deviation over test subjects, both averaged over training seeds",
              ["Class", *labels], by_class),
    ]  # fmt: skip


def _cell(seeds: Sequence[dict[str, float]], *, over_subjects: bool = False) -> str:
    """From {subject: Dice} of each seed: the mean and its spread over seeds, or the mean of the spreads over
    subjects. The spread of one value is a dash.
    """
    if not seeds:
        return ""
    if not all(seeds):
        return "no subjects"  # of that vendor or phase
    scores = [list(dice.values()) for dice in seeds]
    means = [float(np.mean(dice)) for dice in scores]
    spread = np.mean([stats.describe(each)["std"] for each in (scores if over_subjects else [means])])
    return f"{np.mean(means):.2f} ± " + ("-" if np.isnan(spread) else f"{spread:.3f}")


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
    numbers = [run.n_subjects for run in row]
    subjects = "–".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))
    seeds = dict.fromkeys(run.seed for run in row)
    slices = [np.mean([run.slices for run in row if run.seed == seed]) for seed in seeds]
    return f"{subjects} ({np.mean(slices):.0f})"


def learning_curves(runs: Sequence[Evaluated]) -> dict[str, dict[int, list[float]]]:
    """{label: {labelled subjects: mean test Dice of each seed}}, the baseline first and numbers rising, of
    the runs with every phase, every vendor and augmentation, whether the paper has their number or not.
    """
    curves: dict[str, dict[int, list[float]]] = {}
    place = {label: i for i, label in enumerate(LABELS.values())}
    rising = sorted(runs, key=lambda run: (run.arm.label, run.n_subjects, run.seed))
    for run in sorted(rising, key=lambda run: place.get(run.arm.label, len(place))):
        if run.arm.in_table_1:
            points = curves.setdefault(run.arm.label, {})
            points.setdefault(run.n_subjects, []).append(float(np.mean(list(run.dice().values()))))
    return curves


def write(made: Sequence[Table], commands: Sequence[str], folder: Path) -> None:
    """One <name>.csv per table, cells as printed without asterisks; and commands.sh."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in made:
        rows = [[cell.strip("*") for cell in row] for row in table.rows]
        write_csv(folder / f"{table.name}.csv", [dict(zip(table.header, row, strict=True)) for row in rows])
    with atomic(folder / "commands.sh") as file:
        file.write("".join(f"{command}\n" for command in commands).encode())


def missing(runs: Sequence[Evaluated], runs_dir: Path, data: Sequence[str] = ()) -> list[str]:
    """The commands that bring every cell to three seeds: the pretrainings first, then one line for the
    fine-tuning and evaluation of each missing seed. A command that runs again continues where it stopped.

    Runs are named RUNS_DIR/<Arm.run_name>, pretrainings RUNS_DIR/<method>. Split, --quick and, without
    `data`, the data are those of the newest run that knows its data; without such a run the data are DATA,
    for the reader to replace. Other flags of that run, such as --epochs, are not repeated.
    """
    newest = sorted(runs, key=lambda run: run.written_ns, reverse=True)
    model = next((run for run in newest if run.args.get("data")), next(iter(newest), None))
    args = model.args if model else {}
    source = ["--data", *(data or args.get("data", ["DATA"]))]
    source += ["--label-suffix", args["label_suffix"]] if args.get("label_suffix") else []
    if model and (split := model.folder / "split.json").is_file() and not data:
        source += ["--split-file", str(split)]
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
    """{method: the checkpoint that its newest run started from, else the newest finished pretraining below
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
