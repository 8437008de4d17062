"""The paper's study: its arms, and the evaluated runs that a folder holds."""

import csv
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmrssp.data.subject import CLASSES, vendor_name
from cmrssp.errors import UserError
from cmrssp.files import below

SCRATCH = "scratch"  # the baseline, without pretraining
LABELS = {SCRATCH: "Baseline", "simclr": "SimCLR", "pcl": "PCL", "dino": "DINO", "mim": "MIM"}  # the paper's
BEST = "mim"  # the pretraining that the paper's tables 2 and 3 compare with the baseline
SUBSETS = (None, 50, 25, 15, 10)  # labelled training subjects, None: all
VENDORS = {"A+B": ("Siemens", "Philips"), "C+D": ("GE", "Canon")}
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error)
_SHARED = ("settings", "flips", "largest_component")  # parts of a summary that all runs should share


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
        """Whether it belongs to table 1 or to a learning curve."""
        return self == Arm(self.pretraining, self.n_subjects, predicted=self.predicted)

    @property
    def flags(self) -> list[str]:
        """The flags of finetune.py that make it, without --init."""
        vendors = [name for group in VENDORS.values() for name in group if name in self.vendors]
        return [
            *(["--n-subjects", str(self.n_subjects)] if self.n_subjects is not None else []),
            *(["--phases", self.phases] if self.phases != "both" else []),
            *(["--vendors", *vendors] if vendors else []),
            *(["--augmentation", self.augmentation] if self.augmentation != "on" else []),
        ]

    def run_name(self, seed: int) -> str:
        """Such as mim-n15-seed1, scratch-all-ed-seed0 or mim-all-noaug-seed2."""
        parts = [self.pretraining, "all" if self.n_subjects is None else f"n{self.n_subjects}"]
        parts += [self.phases] if self.phases != "both" else []
        parts += [group.replace("+", "").lower() for group, v in VENDORS.items() if self.vendors == set(v)]
        parts += ["noaug"] if self.augmentation == "off" else []
        return "-".join([*parts, f"seed{seed}"])


def arms() -> list[Arm]:
    """Every arm of the paper, in the order of its tables."""
    pair = (SCRATCH, BEST)
    return [
        *(Arm(method, n) for n in SUBSETS for method in LABELS),
        *(Arm(method, phases=phases) for phases in ("ed", "es") for method in pair),
        *(Arm(method, vendors=frozenset(names)) for names in VENDORS.values() for method in pair),
        *(Arm(method, augmentation="off") for method in pair),
    ]


@dataclass(frozen=True)
class Evaluated:
    """One fine-tuned run's scores on the subjects of a split."""

    folder: Path  # of the run
    arm: Arm
    seed: int
    n_subjects: int  # that it was fine-tuned on
    slices: int
    scores: dict[tuple[str, str, str], float]  # Dice by subject, phase (ED or ES), class
    vendors: dict[str, str]  # of each subject
    settings: str  # network and length, as text
    recipe: dict[str, Any]  # how it was trained and pretrained
    written_ns: int  # when it was evaluated
    args: dict[str, Any] = field(default_factory=dict)  # its args.json, empty without one

    def dice(
        self, phases: Collection[str] = ("ED", "ES"), vendors: Collection[str] | None = None,
        classes: Collection[str] = CLASSES,
    ) -> dict[str, float]:  # fmt: skip
        """{subject: Dice}, the mean over these phases and classes; vendors None: all."""
        scores: dict[str, list[float]] = {}
        for (subject, phase, name), value in self.scores.items():
            if phase in phases and name in classes and (vendors is None or self.vendors[subject] in vendors):
                scores.setdefault(subject, []).append(value)
        return {subject: float(np.mean(values)) for subject, values in scores.items()}


def collect(folder: Path) -> list[Evaluated]:
    """Every RUN/evaluation-test/ at any depth below `folder`, the newest run of each arm and seed.

    Prints a line for each run that is skipped, replaced by a newer one, or in no table of the paper. Raises
    UserError for runs that were evaluated on different subjects or phases.
    """
    newest: dict[tuple[Arm, int], Evaluated] = {}
    for path in below(folder, ("summary.json",)):
        if path.parts[-2:] != ("evaluation-test", "summary.json"):
            continue
        try:
            run = read(path)
        except UNREADABLE as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            print(f"skipped: {path}: {what[:200]}")
            continue
        if run is None:
            continue
        if other := newest.get((run.arm, run.seed)):
            old, run = sorted((other, run), key=lambda each: each.written_ns)
            print(f"left out: {old.folder}; {run.folder} is a newer run of the same arm and seed")
        newest[run.arm, run.seed] = run
    runs = list(newest.values())
    refuse_other_subjects(runs)
    by_settings = {run.settings: run for run in runs}
    if len(by_settings) > 1:
        found = "; ".join(f"{run.folder} {settings}" for settings, run in by_settings.items())
        print(f"these runs differ in network or length, and a cell may average over that: {found}")
    for arm in dict.fromkeys(run.arm for run in runs):
        recipes = [run.recipe for run in runs if run.arm == arm]
        names = sorted({name for r in recipes for name in r if r[name] != recipes[0].get(name)})
        if names:
            folders = ", ".join(str(run.folder) for run in runs if run.arm == arm)
            print(f"seeds of one arm that also differ in {', '.join(names)}: {folders}")
    known = [(arm.n_subjects, arm.phases, arm.vendors, arm.augmentation) for arm in arms()]
    for run in runs:
        if (run.arm.n_subjects, run.arm.phases, run.arm.vendors, run.arm.augmentation) not in known:
            print(f"in no table: {run.folder}; the paper has no such run")
    return runs


def read(path: Path, split: str = "test") -> Evaluated | None:
    """The evaluation that a summary.json belongs to, without classes that no reference has; None for one of
    another split. Raises UNREADABLE errors.
    """
    summary = json.loads(path.read_text())
    if summary["split"] != split:
        return None
    arm = summary["arm"]
    scores: dict[tuple[str, str, str], float] = {}
    vendors: dict[str, str] = {}
    with open(path.with_name("metrics.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["subject"], row["phase"], row["class"]
            scores[key] = value = float(row["dice"])
            vendors[row["subject"]] = vendor_name(row["vendor"])
            if key[1] not in ("ED", "ES") or key[2] not in CLASSES or not 0 <= value <= 1:
                raise ValueError(f"metrics.csv: expected ED or ES, LV, MYO or RV, a Dice; got {row}")
    volumes = {(subject, phase) for subject, phase, _ in scores}
    if not scores or len(scores) < len(volumes) * len(CLASSES) or set(vendors) != set(summary["subjects"]):
        raise ValueError("metrics.csv: expected every class of every subject that summary.json names")
    absent = summary.get("without_reference", ())
    networks = {"networks": len(summary.get("checkpoints") or [None])}  # whose probabilities were averaged
    trained_on = None if arm["all_subjects"] else arm["n_subjects"]
    chosen = frozenset(map(vendor_name, arm["vendors"] or ()))
    return Evaluated(
        folder=path.parents[1], seed=arm["seed"], n_subjects=arm["n_subjects"], slices=arm["slices"],
        arm=Arm(arm["pretraining"], trained_on, arm["phases"], chosen, arm["augmentation"],
                bool(arm.get("predicted"))),
        scores={key: value for key, value in scores.items() if key[2] not in absent}, vendors=vendors,
        settings=json.dumps({key: summary.get(key) for key in _SHARED} | networks, sort_keys=True),
        recipe=dict(summary.get("recipe") or {}), written_ns=path.stat().st_mtime_ns,
        args=json_object(path.parents[1] / "args.json"),
    )  # fmt: skip


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} for any other file or none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def refuse_other_subjects(runs: Sequence[Evaluated]) -> None:
    """Raise UserError for runs that were evaluated on different subjects or phases."""
    volumes = [{key[:2] for key in run.scores} for run in runs]  # (subject, phase)
    for run, evaluated in zip(runs, volumes, strict=True):
        if odd := sorted({subject for subject, _ in evaluated ^ volumes[0]}):
            differ = f"{len(odd)} subjects differ, the first is {odd[0]}"
            raise UserError(
                f"{runs[0].folder} and {run.folder}: evaluated on different subjects or phases: {differ}; "
                "give runs of one split, or evaluate one of them again"
            )


def groups(runs: Sequence[str], split: str) -> dict[str, list[Evaluated]]:
    """{name: runs} for --compare. Runs that differ in the seed only form one group, named after its first run
    and the number of further seeds. Raises UserError for a folder without scores, a run that is named twice,
    and runs that were evaluated on different subjects or phases.
    """
    found: dict[str, list[Evaluated]] = {}
    seen: set[Path] = set()
    for name in runs:
        folder = Path(name) if (Path(name) / "summary.json").is_file() else Path(name) / f"evaluation-{split}"
        try:
            run = read(folder / "summary.json", split)
        except UNREADABLE as error:
            raise UserError(
                f"{name}: no complete scores of the {split} split ({str(error)[:80]}); first run python "
                f"evaluate.py --split {split} --checkpoint {name}"
            ) from None
        if run is None:
            raise UserError(f"{folder}: expected scores of the {split} split (--split), got those of another")
        if folder.resolve() in seen:
            raise UserError(f"--compare: {name} is named twice")
        seen.add(folder.resolve())
        for seeds in found.values():
            alike = all(getattr(seeds[0], k) == getattr(run, k) for k in ("arm", "settings", "recipe"))
            if alike and run.seed not in {each.seed for each in seeds}:
                seeds.append(run)
                break
        else:
            found[name] = [run]
    refuse_other_subjects([run for seeds in found.values() for run in seeds])
    more = {name: f" and {len(seeds) - 1} more seeds" * (len(seeds) > 1) for name, seeds in found.items()}
    return {name + more[name]: seeds for name, seeds in found.items()}


def seed_means(found: dict[str, list[Evaluated]], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """{group: {subject: Dice}}: the mean over a subject's phases and classes, then over the seeds."""
    means = {}
    for name, seeds in found.items():
        scores = [run.dice(classes=classes) for run in seeds]
        means[name] = {subject: float(np.mean([each[subject] for each in scores])) for subject in scores[0]}
    return means
