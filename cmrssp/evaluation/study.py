"""The paper's study: its arms, and the evaluated runs that a folder holds."""

import csv
import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cmrssp.data.subject import CLASSES, vendor_name
from cmrssp.errors import UserError, one_line
from cmrssp.evaluation import stats
from cmrssp.files import below, json_object

SCRATCH = "scratch"  # the baseline, without pretraining
LABELS = {SCRATCH: "Baseline", "simclr": "SimCLR", "pcl": "PCL", "dino": "DINO", "mim": "MIM"}  # the paper's
BEST = "mim"  # the pretraining that the paper's tables 2 and 3 compare with the baseline
SUBSETS = (None, 50, 25, 15, 10)  # labelled training subjects, None: all
VENDORS = {"A+B": ("Siemens", "Philips"), "C+D": ("GE", "Canon")}
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Arm:
    """What the runs that one cell averages have in common; the defaults are those of table 1."""

    pretraining: str  # SCRATCH or a method's name, also one that the paper does not have
    n_subjects: int | None = None  # None: all labelled training subjects
    phases: str = "both"
    vendors: frozenset[str] = frozenset()  # empty: all
    augmentation: str = "on"
    predicted: bool = False  # trained also on label maps that a network of ours predicted

    @property
    def label(self) -> str:
        """The name of its column or row."""
        return LABELS.get(self.pretraining, self.pretraining) + " + self-training" * self.predicted

    @property
    def in_table_1(self) -> bool:
        """Whether it belongs to table 1 and to a learning curve."""
        return self == Arm(self.pretraining, self.n_subjects, predicted=self.predicted)


def arms() -> dict[Arm, tuple[str, list[str]]]:
    """{arm: (name of its runs, flags of finetune.py)} of the paper, in the order of its tables."""
    of_all = [("all", {}, [])]
    of_all += [(f"n{n}", {"n_subjects": n}, ["--n-subjects", str(n)]) for n in SUBSETS if n]
    of_two = [(f"all-{phase}", {"phases": phase}, ["--phases", phase]) for phase in ("ed", "es")]
    for group, names in VENDORS.items():
        name = f"all-{group.replace('+', '').lower()}"
        of_two.append((name, {"vendors": frozenset(names)}, ["--vendors", *names]))
    of_two.append(("all-noaug", {"augmentation": "off"}, ["--augmentation", "off"]))
    made = {}
    for variants, methods in ((of_all, LABELS), (of_two, (SCRATCH, BEST))):
        for name, change, flags in variants:
            made |= {Arm(method, **change): (f"{method}-{name}", flags) for method in methods}
    return made


@dataclass(frozen=True)
class Evaluated:
    """One fine-tuned run's scores on the subjects of a split."""

    folder: Path  # of the run
    arm: Arm
    seed: int
    n_subjects: int  # that it was fine-tuned on
    slices: int
    rows: list[dict]  # subject, vendor, phase (ED or ES), class and Dice of metrics.csv
    settings: dict[str, Any]  # network, length, and how it predicted
    recipe: dict[str, Any]  # how it was trained and pretrained
    written_ns: int  # when it was evaluated
    args: dict[str, Any]  # its args.json, empty without one

    @property
    def subjects(self) -> set[str]:
        return {row["subject"] for row in self.rows}

    def dice(
        self, phase: str = "both", vendors: Collection[str] = (), classes: Sequence[str] = CLASSES
    ) -> dict[str, float]:
        """{subject: Dice}, the mean over phases and classes; no vendors: all."""
        rows = [row for row in self.rows if not vendors or row["vendor"] in vendors]
        return stats.per_subject(rows, phase, classes)


def collect(folder: Path) -> list[Evaluated]:
    """Every RUN/evaluation-test/ at any depth below `folder`, the newest run of each arm and seed. Prints
    which runs are skipped, or unlike those that they are averaged with. Raises UserError for runs on
    different subjects or phases.
    """
    newest: dict[tuple[Arm, int], Evaluated] = {}
    for path in below(folder, ("summary.json",)):
        if path.parts[-2:] != ("evaluation-test", "summary.json"):
            continue
        try:
            run = read(path)
        except _UNREADABLE as error:
            print(f"skipped: {path}: {one_line(error)}")
            continue
        if other := newest.get((run.arm, run.seed)):
            old, run = sorted((other, run), key=lambda each: each.written_ns)
            print(f"left out: {old.folder}; {run.folder} is a newer run of the same arm and seed")
        newest[run.arm, run.seed] = run
    runs = list(newest.values())
    refuse_other_subjects(runs)
    folders = [run.folder for run in runs]
    _print_differences("runs that a cell may average differ", folders, [run.settings for run in runs])
    for arm in dict.fromkeys(run.arm for run in runs):
        seeds = [run for run in runs if run.arm == arm]
        folders, recipes = [run.folder for run in seeds], [run.recipe for run in seeds]
        _print_differences("seeds of one arm that also differ", folders, recipes)
    known = {replace(arm, pretraining="") for arm in arms()}
    for run in runs:
        if not run.arm.in_table_1 and replace(run.arm, pretraining="", predicted=False) not in known:
            print(f"in no table: {run.folder}; the paper has no such run")
    return runs


def _print_differences(what: str, runs: Sequence[Path | str], found: Sequence[dict[str, Any]]) -> None:
    every = {name for each in found for name in each}
    names = sorted(name for name in every if any(each.get(name) != found[0].get(name) for each in found))
    if names:
        unlike = [run for run, each in zip(runs, found, strict=True) if each != found[0]]
        print(f"{what} in {', '.join(names)}: {', '.join(map(str, [runs[0], *unlike]))}")


def read(path: Path, split: str = "test") -> Evaluated:
    """The evaluation that a summary.json belongs to, without classes that no reference has. Raises one of
    the _UNREADABLE errors for another split, and if something is missing.
    """
    summary = json.loads(path.read_text())
    if summary["split"] != split:
        raise UserError(f"these are scores of the {summary['split']} split")
    arm, absent = summary["arm"], summary.get("without_reference", ())
    with open(path.with_name("metrics.csv"), newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] not in absent]
    for row in rows:
        row |= {"dice": float(row["dice"]), "vendor": vendor_name(row["vendor"])}
    place = {name: arm[name] for name in ("pretraining", "phases", "augmentation")}
    place["n_subjects"] = None if arm["all_subjects"] else arm["n_subjects"]
    place["vendors"] = frozenset(map(vendor_name, arm["vendors"] or ()))
    shared = {name: summary.get(name) for name in ("flips", "largest_component")}
    shared["networks"] = len(summary.get("checkpoints", [None]))  # whose probabilities were averaged
    return Evaluated(
        folder=path.parents[1],
        arm=Arm(**place, predicted=arm.get("predicted", False)),
        **{name: arm[name] for name in ("seed", "n_subjects", "slices")},
        rows=rows,
        settings={**summary.get("settings", {}), **shared},
        recipe=summary.get("recipe", {}),
        written_ns=path.stat().st_mtime_ns,
        args=json_object(path.parents[1] / "args.json"),
    )


def refuse_other_subjects(runs: Sequence[Evaluated]) -> None:
    """Raise UserError for runs that were evaluated on different subjects or phases."""
    volumes = [{(row["subject"], row["phase"]) for row in run.rows} for run in runs]
    for run, evaluated in zip(runs, volumes, strict=True):
        if odd := sorted({subject for subject, _ in evaluated ^ volumes[0]}):
            raise UserError(
                f"{runs[0].folder} and {run.folder}: evaluated on different subjects or phases: {len(odd)} "
                f"subjects differ, the first is {odd[0]}; give runs of one split, or evaluate one again"
            )


def groups(runs: Sequence[str], split: str) -> dict[str, list[Evaluated]]:
    """{name: runs} for --compare. Runs that differ in the seed only form one group, named after its first run
    and the number of further seeds. Prints in what else the groups of one arm differ. Raises UserError for a
    folder without scores, and for runs that were evaluated on different subjects or phases.
    """
    found: list[tuple[str, list[Evaluated]]] = []
    for name in runs:
        folder = Path(name) if (Path(name) / "summary.json").is_file() else Path(name) / f"evaluation-{split}"
        try:
            run = read(folder / "summary.json", split)
        except _UNREADABLE as error:
            how = f"first run python evaluate.py --split {split} --checkpoint {shlex.quote(name)}"
            how = how if (Path(name) / "unet.pt").is_file() else "expected the folder of a fine-tuned run"
            if split == "all":
                how = "give the folders evaluation-all-... themselves"
            what = f"no complete scores of the {split} split ({one_line(error)})"
            raise UserError(f"{name}: {what}; {how}") from None
        for _, seeds in found:
            alike = all(getattr(seeds[0], k) == getattr(run, k) for k in ("arm", "settings", "recipe"))
            if alike and run.seed not in [each.seed for each in seeds]:
                seeds.append(run)
                break
        else:
            found.append((name, [run]))
    refuse_other_subjects([run for _, seeds in found for run in seeds])
    for arm in dict.fromkeys(seeds[0].arm for _, seeds in found):
        alike = {name: seeds[0] for name, seeds in found if seeds[0].arm == arm}
        ways = [{**run.recipe, **run.settings} for run in alike.values()]  # epochs: planned, then done
        _print_differences(f"kept apart, runs of {arm.label} that differ", list(alike), ways)
    return {name + f" and {len(s) - 1} more seeds" * (len(s) > 1): s for name, s in found}


def seed_means(found: dict[str, list[Evaluated]], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """{group: {subject: Dice}}: the mean over a subject's phases and classes, then over the seeds."""
    means = {}
    for name, seeds in found.items():
        scores = [run.dice(classes=classes) for run in seeds]
        means[name] = {subject: float(np.mean([each[subject] for each in scores])) for subject in scores[0]}
    return means
