"""The runs that the paper's tables average: which of them a folder holds, and the commands of the others."""

import csv
import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmrssp.data.subject import CLASSES, vendor_name
from cmrssp.errors import UserError
from cmrssp.files import below

METHODS = {"scratch": "Baseline", "simclr": "SimCLR", "pcl": "PCL", "dino": "DINO", "mim": "MIM"}
OTHERS = ("motion",)  # not in the paper's tables; --compare takes them
SUBSETS = (None, 50, 25, 15, 10)  # labelled training subjects, None: all
SEEDS = (0, 1, 2)
VENDORS = {"A+B": ("Siemens", "Philips"), "C+D": ("GE", "Canon")}
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error)
_SETTINGS = ("settings", "flips", "largest_component")  # of a summary: what all runs should share
_KINDS = {"n_subjects": int, "all_subjects": bool, "slices": int, "vendors": list | None, "seed": int}


@dataclass(frozen=True)
class Arm:
    """What is alike in the runs that one cell averages; the defaults are those of table 1."""

    pretraining: str  # a key of METHODS
    n_subjects: int | None = None  # None: all labelled training subjects
    phases: str = "both"
    vendors: frozenset[str] = frozenset()  # none named: all
    augmentation: str = "on"

    @property
    def plain(self) -> bool:
        """It belongs to table 1 or to a learning curve."""
        return self == Arm(self.pretraining, self.n_subjects)

    @property
    def words(self) -> list[str]:
        """What finetune.py is told of it, without --init."""
        vendors = [name for group in VENDORS.values() for name in group if name in self.vendors]
        return [
            *(["--n-subjects", str(self.n_subjects)] if self.n_subjects is not None else []),
            *(["--phases", self.phases] if self.phases != "both" else []),
            *(["--vendors", *vendors] if vendors else []),
            *(["--augmentation", self.augmentation] if self.augmentation != "on" else []),
        ]

    def name(self, seed: int) -> str:
        """Of its run's folder, such as mim-n15-seed1, scratch-all-ed-seed0 or mim-all-noaug-seed2."""
        parts = [self.pretraining, "all" if self.n_subjects is None else f"n{self.n_subjects}"]
        parts += [self.phases] if self.phases != "both" else []
        parts += [group.replace("+", "").lower() for group, v in VENDORS.items() if self.vendors == set(v)]
        parts += ["noaug"] if self.augmentation == "off" else []
        return "-".join([*parts, f"seed{seed}"])


def arms() -> list[Arm]:
    """Every arm of the paper, in the order of its tables."""
    pair = ("scratch", "mim")
    return [
        *(Arm(method, n) for n in SUBSETS for method in METHODS),
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
    vendors: dict[str, str]  # of each test subject
    settings: str  # network and length, as text
    recipe: dict[str, Any]  # how it was trained and pretrained
    written_ns: int  # when it was evaluated
    args: dict[str, Any] = field(default_factory=dict)  # its args.json, empty without one

    def dice(
        self,
        phases: Collection[str] = ("ED", "ES"),
        vendors: Collection[str] | None = None,
        classes: Collection[str] = CLASSES,
    ) -> list[float]:
        """The Dice of each subject, as `by_subject`."""
        return list(self.by_subject(phases, vendors, classes).values())

    def by_subject(
        self,
        phases: Collection[str] = ("ED", "ES"),
        vendors: Collection[str] | None = None,
        classes: Collection[str] = CLASSES,
    ) -> dict[str, float]:
        """{subject: Dice}, the mean over these of its phases and classes; vendors None: all."""
        scores: dict[str, list[float]] = {}
        for (subject, phase, name), value in self.scores.items():
            if phase in phases and name in classes and (vendors is None or self.vendors[subject] in vendors):
                scores.setdefault(subject, []).append(value)
        return {subject: float(np.mean(values)) for subject, values in scores.items()}

    @property
    def phases(self) -> dict[str, frozenset[str]]:
        """{test subject: its evaluated phases}"""
        subjects: dict[str, set[str]] = {}
        for subject, phase, _ in self.scores:
            subjects.setdefault(subject, set()).add(phase)
        return {subject: frozenset(phases) for subject, phases in subjects.items()}


def collect(folder: str | Path) -> list[Evaluated]:
    """Every RUN/evaluation-test/ at any depth below `folder`, one run per arm and seed: the newest.

    Prints a line for what is skipped, replaced by a newer run, or in none of the tables. Raises UserError
    without any evaluated run, or when two were not evaluated on the same phases of the same test subjects.
    """
    newest: dict[tuple[Arm, int], Evaluated] = {}
    for path in below(Path(folder), ("summary.json",)):
        if path.name != "summary.json" or path.parent.name != "evaluation-test":
            continue
        try:
            run = read(path)
        except UNREADABLE as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            print(f"skipped: {path}: {what[:200]}")
            continue
        if run is None:
            continue
        other = newest.setdefault((run.arm, run.seed), run)
        if other is not run:
            old, new = sorted((other, run), key=lambda each: each.written_ns)
            print(f"left out: {old.folder}; {new.folder} is a newer run of the same arm and seed")
            newest[run.arm, run.seed] = new
    runs = list(newest.values())
    if not runs:
        raise UserError(
            f"{folder}: expected evaluated runs at any depth below it (RUN/evaluation-test/summary.json), "
            "found none; run evaluate.py --split test first"
        )
    for run in runs[1:]:
        refuse_other_subjects(runs[0], run)
    kinds = {run.settings: run for run in runs}
    if len(kinds) > 1:
        found = "; ".join(f"{run.folder} {settings}" for settings, run in kinds.items())
        print(f"these runs differ in network or length, and cells may average over that: {found}")
    for arm in dict.fromkeys(run.arm for run in runs):
        recipes = [run.recipe for run in runs if run.arm == arm]
        names = sorted({name for r in recipes for name in r if r[name] != recipes[0].get(name)})
        if names:
            folders = ", ".join(str(run.folder) for run in runs if run.arm == arm)
            print(f"seeds of one arm that differ in {', '.join(names)}, too: {folders}")
    for run in runs:
        if run.arm not in arms():
            print(f"in no table: {run.folder}; the paper has no such run")
    return runs


def read(path: Path, split: str = "test") -> Evaluated | None:
    """An evaluation, by its summary.json; None for one of another split. Raises UNREADABLE errors."""
    summary = json.loads(path.read_text())
    if not isinstance(summary, dict):
        raise ValueError("expected a JSON object")
    if summary.get("split") != split:
        return None
    arm = summary.get("arm")
    if not isinstance(arm, dict):
        raise ValueError("has no arm, run evaluate.py again")
    for key, allowed in (
        ("pretraining", (*METHODS, *OTHERS)),
        ("phases", ("both", "ed", "es")),
        ("augmentation", ("on", "off")),
    ):
        if arm[key] not in allowed:
            raise ValueError(f"arm: {key}: expected one of {', '.join(allowed)}, got {arm[key]!r}")
    for key, kind in _KINDS.items():
        if not isinstance(arm[key], kind):
            raise ValueError(f"arm: {key}: got {arm[key]!r}")
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
    networks = {"networks": len(summary.get("checkpoints") or [None])}  # whose probabilities were averaged
    return Evaluated(
        folder=path.parents[1],
        arm=Arm(
            arm["pretraining"],
            None if arm["all_subjects"] else arm["n_subjects"],
            arm["phases"],
            frozenset(map(vendor_name, arm["vendors"] or ())),
            arm["augmentation"],
        ),
        seed=arm["seed"],
        n_subjects=arm["n_subjects"],
        slices=arm["slices"],
        scores=scores,
        vendors=vendors,
        settings=json.dumps({key: summary.get(key) for key in _SETTINGS} | networks, sort_keys=True),
        recipe=dict(summary.get("recipe") or {}),
        written_ns=path.stat().st_mtime_ns,
        args=_object(path.parents[1] / "args.json"),
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none to read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def refuse_other_subjects(one: Evaluated, other: Evaluated) -> None:
    ours, theirs = one.phases, other.phases
    odd = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if odd:
        raise UserError(
            f"{one.folder} and {other.folder}: evaluated on different subjects or phases, {len(odd)} "
            f"subjects differ, the first is {odd[0]}; give a folder with runs of one split, or evaluate one "
            "of them again"
        )


def missing(runs: Sequence[Evaluated], runs_dir: str | Path) -> list[str]:
    """The commands that bring every cell to three seeds, each once: pretrainings first, then a fine-tuning
    and its evaluation for each missing seed; the evaluation alone where that training has finished.

    Runs are named RUNS_DIR/<Arm.name>, pretrainings RUNS_DIR/<method>. Data, split and --quick are those of
    the newest of the `runs` (at least one) that says its data; else DATA stands for the path to type. What
    else was typed for it, such as --epochs, is not repeated.
    """
    runs_dir = Path(runs_dir)
    newest = sorted(runs, key=lambda run: run.written_ns, reverse=True)
    model = next((run for run in newest if run.args.get("data")), newest[0])
    split, suffix = model.folder / "split.json", model.args.get("label_suffix")
    data = ["--data", *model.args.get("data", ["DATA"]), *(["--label-suffix", suffix] if suffix else [])]
    data += ["--split-file", str(split)] if split.is_file() else []
    common = [flag for flag in ("--skip-broken", "--quick") if model.args.get(flag[2:].replace("-", "_"))]
    known = {"scratch": None, **_pretrained(newest, runs_dir)}
    pretrainings, others = [], []
    most = max((run.n_subjects for run in runs if run.arm.n_subjects is None), default=None)
    for arm in arms():
        if most and arm.n_subjects and arm.n_subjects >= most:
            continue  # there are no so many labelled training subjects
        method, seeds = arm.pretraining, {run.seed for run in runs if run.arm == arm}
        lacking = [seed for seed in SEEDS if seed not in seeds][: max(0, len(SEEDS) - len(seeds))]
        if lacking and method not in known:
            known[method] = str(runs_dir / method)
            words = ["train_ssp.py", "--method", method, *data, *common, "--out", known[method]]
            pretrainings.append(shlex.join(["python", *words]))
        for seed in lacking:
            out = runs_dir / arm.name(seed)
            start = ["--init", known[method]] if known[method] else data
            words = [*start, *arm.words, *common, "--seed", str(seed), "--out", str(out)]
            if not (out / "unet.pt").is_file() or out in {run.folder for run in runs}:
                others.append(shlex.join(["python", "finetune.py", *words]))
            words = ["evaluate.py", "--split", "test", "--checkpoint", str(out), *common]
            others.append(shlex.join(["python", *words]))
    return pretrainings + others


def _pretrained(newest: Sequence[Evaluated], runs_dir: Path) -> dict[str, str]:
    """{method: what its newest run started from; without one, the newest finished pretraining below
    `runs_dir` that keeps the same test subjects apart}.
    """
    finished = []
    for path in below(runs_dir, ("args.json",)):
        args, weights = _object(path), path.with_name("unet.pt")
        apart = _object(path.with_name("split.json")).get("test", ())
        if args.get("kind") == "pretraining" and weights.is_file() and newest[0].vendors.keys() <= set(apart):
            finished.append((weights.stat().st_mtime_ns, str(args.get("method")), str(path.parent)))
    starts = [(run.arm.pretraining, run.args.get("init")) for run in reversed(newest)]
    return {
        **{method: folder for _, method, folder in sorted(finished)},
        **{method: init for method, init in starts if init and Path(init).expanduser().exists()},
    }
