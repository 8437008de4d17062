"""A network's predictions against the reference of a split, by subject, phase, class and slice."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cmrssp import metrics
from cmrssp.data import splits
from cmrssp.data.nifti import cine_image, write_labels
from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.errors import one_line
from cmrssp.evaluation import contours, plots, stats
from cmrssp.files import write_csv
from cmrssp.hardware import distributed
from cmrssp.runs import progress
from cmrssp.runs.folder import Run
from cmrssp.segmentation import Segmentation, predict_frames
from cmrssp.weights.checkpoints import Checkpoint

THIRDS = ("base", "mid", "apex")
METRICS = ("dice", "hd95_mm", "assd_mm", "hd95_filled_mm", "assd_filled_mm")  # of the breakdown
_RESAMPLES = 2000
AGREEMENT = [name for name in metrics.clinical({}) if "_sv_" not in name]


@dataclass
class Scores:
    """What was measured on a split."""

    rows: list[dict] = field(default_factory=list)  # one per subject, phase and class
    slices: list[dict] = field(default_factory=list)  # one per subject, phase, class and slice
    clinical: list[dict] = field(default_factory=list)  # one per subject
    unlabelled: list[str] = field(default_factory=list)  # subjects without a labelled frame of these phases
    failed: list[str] = field(default_factory=list)  # "subject: what went wrong"

    @property
    def present(self) -> list[str]:
        """The classes that at least one reference has; means leave the others out."""
        return [c for c in CLASSES if any(r["in_reference"] for r in self.rows if r["class"] == c)]


def score(
    methods: Sequence[Segmentation], cines: Store, device: torch.device, *, phases: str,
    save: Path | None = None, **options: bool,
) -> Scores:  # fmt: skip
    """Predict the labelled frames (`phases`: ed, es, both) and measure them on each file's own grid.
    `options` are those of `predict_frames`. Label maps go to the folder `save` as in M&Ms: 4D, other frames
    0. A failed subject becomes an entry of `failed`. The ranks share the subjects; each returns all scores.
    """
    wanted = [dict(record.phases) for record in cines.labels]  # {phase: frame} of each subject
    if phases != "both":
        wanted = [{name: f for name, f in frames.items() if name.lower() == phases} for frames in wanted]
    number = sum(len(w) * r.shape[1] for w, r in zip(wanted, cines.labels, strict=True))
    print(f"{len(wanted)} subjects, {number} slices to predict", flush=True)
    mine, parts = distributed.own_items(range(len(cines.subjects))), []
    for i in tqdm(mine, "predicting", unit="subject", disable=distributed.hide_bar()):
        began, part, key = time.monotonic(), Scores(), cines.subjects[i].key
        try:
            if wanted[i]:
                part = _score_subject(methods, cines, i, wanted[i], device, save, **options)
            else:
                part.unlabelled.append(key)
        except Exception as error:  # the other subjects must not suffer
            part.failed.append(f"{key}: {one_line(error)}")
        parts.append(part)
        if sum(len(s.clinical) for s in parts) == 1 and part.clinical and len(mine) > 1:
            print(f"estimated time: {progress.duration((time.monotonic() - began) * len(mine))}", flush=True)
    every = Scores()
    for part in distributed.merge(parts):
        for name, rows in vars(part).items():
            getattr(every, name).extend(rows)
    known = metrics.clinical({phase: dict.fromkeys(every.present, 1.0) for phase in ("ED", "ES")})
    for row in every.clinical:  # the 0 ml of a class that no reference has are no measurement
        ends = ("_reference", "_error")
        row |= {name + end: None for name, value in known.items() if value is None for end in ends}
    return every


def _score_subject(
    methods: Sequence[Segmentation], cines: Store, i: int, frames: dict[str, int], device: torch.device,
    save: Path | None, **options: bool,
) -> Scores:  # fmt: skip
    subject, record, scores = cines.subjects[i], cines.cines[i], Scores()
    who = {"subject": subject.key, "dataset": subject.dataset, "vendor": subject.vendor,
           "pathology": subject.pathology}  # fmt: skip
    spacing = (record.geometry.slice_pitch_mm, *record.geometry.spacing_mm)
    volumes: dict[str, dict] = {"volume_ml": {}, "reference_ml": {}}  # by phase and class
    maps = np.zeros(record.shape if save else 0, np.uint8)
    predicted = predict_frames(methods, cines, i, list(frames.values()), device, **options)
    for (phase, frame), labels in zip(frames.items(), predicted, strict=True):
        reference = cines.label_volume(i, frame)
        measured = metrics.score(labels, reference, spacing)
        if not record.measurable:  # lengths and volumes would be wrong
            for found in measured.values():
                found |= {column: math.nan for column in found if column.endswith(("_mm", "_ml"))}
        at = {**who, "phase": phase, "frame": frame}
        scores.rows += [{**at, "class": name, **measured[name]} for name in CLASSES]
        scores.slices += [{**at, **row} for row in slice_rows(labels, reference)]
        for column, kept in volumes.items():
            kept[phase] = {name: measured[name][column] for name in CLASSES}
        if save:
            maps[frame] = labels
    numbers: dict[str, Any] = {**who}
    expected = metrics.clinical(volumes["reference_ml"])
    for name, ours in metrics.clinical(volumes["volume_ml"]).items():
        theirs = expected[name]
        error = None if ours is None or theirs is None else ours - theirs
        numbers |= {name: ours, f"{name}_reference": theirs, f"{name}_error": error}
    scores.clinical.append(numbers)
    if save:
        save.mkdir(parents=True, exist_ok=True)
        alone = Counter(s.file_name for s in cines.subjects)[subject.file_name] == 1
        name = subject.file_name if alone else subject.key.replace("/", "__")
        write_labels(save / f"{name}.nii.gz", maps, record.geometry, cine_image(subject))
    return scores


def slice_rows(labels: np.ndarray, reference: np.ndarray) -> Iterator[dict]:
    """Dice of each class in each slice of two label maps (Z, H, W), NaN if neither has it. `third` divides
    the slices from the reference's first to its last, if three or more. A single slice has no `position`.
    """
    labelled = np.flatnonzero(reference.any(axis=(1, 2)))
    first, last = (labelled[0], labelled[-1]) if len(labelled) else (0, len(reference) - 1)
    for z, pair in enumerate(zip(labels, reference, strict=True)):
        inside = first <= z <= last and last - first >= 2
        for name, (both, total) in metrics.overlap(*pair).items():
            yield {
                "class": name, "slice": z,
                "position": z / len(reference) if len(reference) > 1 else math.nan,
                "third": THIRDS[3 * (z - first) // (last - first + 1)] if inside else "",
                "overlap_px": both, "total_px": total,
                "dice": metrics.dice_of(both, total, neither=math.nan),
            }  # fmt: skip


def breakdown(scores: Scores, seed: int = 0) -> list[dict[str, Any]]:
    """For each by, group, class and metric: `stats.describe` over subjects, and low and high, the 95 %
    bootstrap interval of the mean. The class "mean" is the mean over the present classes.
    """
    table = []
    classes = {**{name: [name] for name in scores.present}, "mean": scores.present}
    for by, group, rows, measured in _groups(scores):
        for metric in measured:
            for name, members in classes.items():
                found = list(stats.per_subject(rows, "both", members, metric).values())
                low, high = stats.bootstrap_interval(found, seed, _RESAMPLES)
                where = {"by": by, "group": group, "class": name, "metric": metric}
                table.append({**where, **stats.describe(found), "low": low, "high": high})
    return table


def _groups(scores: Scores) -> Iterator[tuple[str, str, list[dict], Sequence[str]]]:
    """by, group, its rows, their metrics."""
    yield "all", "", scores.rows, METRICS
    for by in ("phase", "vendor", "pathology", "dataset"):
        for name in sorted({row[by] for row in scores.rows}):
            yield by, name or "unknown", [row for row in scores.rows if row[by] == name], METRICS
    for third in THIRDS:
        counts: dict[tuple, np.ndarray] = {}
        for row in scores.slices:
            if row["third"] == third and row["total_px"]:
                key = row["subject"], row["phase"], row["class"]
                counts[key] = counts.get(key, 0) + np.array((row["overlap_px"], row["total_px"]))
        rows = [
            {"subject": subject, "phase": phase, "class": name, "dice": metrics.dice_of(both, total)}
            for (subject, phase, name), (both, total) in counts.items()
        ]
        yield "third", third, rows, ("dice",)


def missed(scores: Scores) -> dict[str, int]:
    """{class: volumes in which only one of the two label maps has it}, for the present classes."""
    present = scores.present
    return dict(Counter(row["class"] for row in scores.rows if row["missed"] and row["class"] in present))


def arm(checkpoint: Checkpoint) -> dict[str, Any]:
    """The place of a fine-tuned network in the tables of a study: its training and its seed."""
    link = checkpoint.provenance
    trainings = [each for each in link.contributions() if each.method == link.method]  # also of teachers
    same = ("all_subjects", "slices", "phases", "vendors", "augmentation", "seed")
    return {
        "pretraining": list(link.history())[-1].method if link.init else "scratch",
        "n_subjects": len({key for each in trainings for key in each.subjects}),
        "predicted": bool(link.predicted),
        **{name: getattr(link, name) for name in same},
    }


def network_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Network and length, which all runs of a study should share."""
    return {**checkpoint.network, "epochs": checkpoint.provenance.epochs}


def training_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the seeds of one experiment share: hyperparameters and training subjects of the fine-tuning and of
    the pretraining, as far as the checkpoint knows.
    """
    found = {}
    for when, link in zip(("", "pretraining "), checkpoint.provenance.history(), strict=False):
        pool = hashlib.sha256(json.dumps(sorted(link.split["train"])).encode()).hexdigest()[:16]
        own_list = splits.published_subset(link.split)  # which differs by seed
        every = {**link.hyperparameters, "training subjects": None if own_list else pool}
        found |= {when + name: value for name, value in every.items()}
    return found


def write(
    out: Path, scores: Scores, table: Sequence[dict], summary: dict[str, Any],
    contour_cases: Callable[[], list[dict]],
) -> list[str]:  # fmt: skip
    """Write the CSV files, the pictures and, last, summary.json of a scored split; returns their names. A
    failed picture becomes an entry of `scores.failed`. An evaluation without summary.json is incomplete, so
    the old file goes first.
    """
    present = scores.present
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    tables = {"metrics.csv": scores.rows, "slices.csv": scores.slices, "clinical.csv": scores.clinical,
              "breakdown.csv": table}  # fmt: skip
    for name, rows in tables.items():
        write_csv(out / name, rows)
    pictures = {
        "agreement.png": lambda path: plots.bland_altman(agreement_pairs(scores.clinical), path),
        "position.png": lambda path: plots.dice_by_position(scores.slices, path),
        "boxes.png": lambda path: plots.boxes([r for r in scores.rows if r["class"] in present], path),
        "contours.png": lambda path: contours.contour_sheet(contour_cases(), path),
    }
    for name, draw in pictures.items():
        try:
            draw(out / name)
        except Exception as error:  # the scores matter more
            scores.failed.append(f"{name}: {one_line(error)}")
    dice: dict[str, dict] = {}
    for phase in ("ED", "ES", "both"):
        for name, classes in {**{c: [c] for c in present}, "mean": present}.items():
            found = stats.describe(stats.per_subject(scores.rows, phase, classes).values())
            kept = {k: None if math.isnan(found[k]) else found[k] for k in ("mean", "std")}  # JSON has no NaN
            dice.setdefault(phase, {})[name] = kept
    content = {
        **summary, "subjects": sorted({row["subject"] for row in scores.rows}),
        "without_labels": scores.unlabelled,
        "without_reference": [name for name in CLASSES if name not in present],
        "failed": scores.failed, "dice": dice, "missed": missed(scores),
    }  # fmt: skip
    Run(out).write_json("summary.json", content)
    return [name for name in (*tables, "summary.json", *pictures) if (out / name).is_file()]


def agreement_pairs(clinical: Sequence[dict]) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """For `plots.bland_altman`: {title: (predicted (N,), reference (N,), unit)}."""
    pairs = {}
    for name in AGREEMENT:
        title, unit = name.rsplit("_", 1)
        both = (np.array([row[name + end] for row in clinical], float) for end in ("", "_reference"))
        pairs[title.replace("_", " ").upper()] = (*both, unit.replace("percent", "%"))
    return pairs


def extremes(
    scores: Scores, cines: Store, methods: Sequence[Segmentation], device: torch.device, **options: bool
) -> list[dict]:
    """Cases of a contour sheet: every scored phase of the worst, median and best subject by mean Dice."""
    dice = stats.per_subject(scores.rows, "both", scores.present)
    ranked = sorted(dice, key=dice.__getitem__)
    places = {len(ranked) // 2: "median", len(ranked) - 1: "best", 0: "worst"}  # one name for each subject
    sheet = []
    for place, name in sorted(places.items()) if ranked else ():
        key, i = ranked[place], cines.index[ranked[place]]
        rows = [row for row in scores.rows if row["subject"] == key and row["class"] in scores.present]
        for phase, frame in sorted({(row["phase"], row["frame"]) for row in rows}):
            mean = np.mean([row["dice"] for row in rows if row["phase"] == phase])
            (labels,) = predict_frames(methods, cines, i, [frame], device, **options)
            sheet.append(contours.case(cines, i, frame, f"{name}: {key}, {phase}, Dice {mean:.3f}", labels))
    return sheet
