"""A network's predictions against the reference of a split, by subject, phase, class and slice."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
_CLINICAL = ("lv_edv_ml", "lv_esv_ml", "lv_sv_ml", "lv_ef_percent", "rv_edv_ml", "rv_esv_ml", "rv_sv_ml",
             "rv_ef_percent", "lv_mass_g")  # fmt: skip
AGREEMENT = [name for name in _CLINICAL if "_sv_" not in name]


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
        """The classes that the reference of at least one volume has; the others are left out of means."""
        return [c for c in CLASSES if any(r["in_reference"] for r in self.rows if r["class"] == c)]


def score(
    methods: Sequence[Segmentation],
    cines: Store,
    device: torch.device,
    *,
    phases: str,
    save: Path | None = None,
    **options: bool,
) -> Scores:
    """Predict the labelled ED and ES frames, or one of them (`phases`: ed, es, both), and measure them on
    each file's own grid; `options` are those of `predict_frames`. With `save`, write the label maps to that
    folder in the form of M&Ms: 4D, other frames 0. An error in one subject becomes an entry of `failed`.
    Each rank takes its share of the subjects and returns the scores of all of them, in the order of one
    process.
    """
    wanted = [
        {name: f for name, f in record.phases.items() if phases in (name.lower(), "both")}
        for record in cines.labels
    ]
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
        except Exception as error:  # of whatever kind: the other subjects are scored
            part.failed.append(f"{key}: {one_line(error)}")
        parts.append(part)
        if sum(len(s.clinical) for s in parts) == 1 and part.clinical and len(mine) > 1:
            print(f"estimated time: {progress.duration((time.monotonic() - began) * len(mine))}", flush=True)
    every = Scores()
    for part in distributed.merge(parts):
        for name, rows in vars(part).items():
            getattr(every, name).extend(rows)
    return every


def _score_subject(
    methods: Sequence[Segmentation], cines: Store, i: int, frames: dict[str, int], device: torch.device,
    save: Path | None, **options: bool,
) -> Scores:  # fmt: skip
    subject, record, scores = cines.subjects[i], cines.cines[i], Scores()
    who = {"subject": subject.key, "dataset": subject.dataset, "vendor": subject.vendor,
           "pathology": subject.pathology}  # fmt: skip
    spacing = (record.geometry.slice_pitch_mm, *record.geometry.spacing_mm)
    volumes: dict[str, dict] = {"volume_ml": {}, "reference_ml": {}}
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
    ours, theirs = (metrics.clinical(volumes[column]) for column in ("volume_ml", "reference_ml"))
    numbers: dict[str, float | None] = {}
    for name in _CLINICAL:
        error = None if None in (ours[name], theirs[name]) else ours[name] - theirs[name]
        numbers |= {name: ours[name], f"{name}_reference": theirs[name], f"{name}_error": error}
    scores.clinical.append({**who, **numbers})
    if save:
        save.mkdir(parents=True, exist_ok=True)
        alone = Counter(s.file_name for s in cines.subjects)[subject.file_name] == 1
        name = subject.file_name if alone else subject.key.replace("/", "__")
        write_labels(save / f"{name}.nii.gz", maps, record.geometry, cine_image(subject))
    return scores


def slice_rows(labels: np.ndarray, reference: np.ndarray) -> Iterator[dict]:
    """Dice of each class in each slice, NaN where neither map has it. `third` divides the slices from the
    first to the last one that the reference labels, if these are three or more. A single slice has no
    `position`.
    """
    labelled = np.flatnonzero(reference.any(axis=(1, 2)))
    first, last = (labelled[0], labelled[-1]) if len(labelled) else (0, len(reference) - 1)
    for z, pair in enumerate(zip(labels, reference, strict=True)):
        inside = first <= z <= last and last - first >= 2
        for name, (both, total) in metrics.overlap(*pair).items():
            yield {
                "class": name,
                "slice": z,
                "position": z / len(reference) if len(reference) > 1 else math.nan,
                "third": THIRDS[3 * (z - first) // (last - first + 1)] if inside else "",
                "overlap_px": both,
                "total_px": total,
                "dice": metrics.dice_of(both, total, neither=math.nan),
            }


def breakdown(scores: Scores, seed: int = 0) -> list[dict[str, Any]]:
    """Rows (by, group, class, metric): number of subjects, mean, std, median, 5th percentile, and the 95 %
    bootstrap interval of the mean over subjects. The class "mean" is the mean over the present classes.
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
    """(by what, group, its rows, the metrics that they have) of every breakdown."""
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


def missed(rows: Iterable[dict]) -> dict[str, int]:
    """{class: volumes in which only one of the two label maps has it}."""
    return dict(Counter(row["class"] for row in rows if row["missed"]))


def arm(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a fine-tuned network belongs in the tables of a study: how it was trained, and its seed."""
    link = checkpoint.provenance
    same = ("all_subjects", "slices", "phases", "vendors", "augmentation", "seed")
    return {
        "pretraining": list(link.history())[-1].method if link.init else "scratch",
        "n_subjects": len(link.subjects),
        "predicted": bool(getattr(link, "predicted", False)),
        **{name: getattr(link, name) for name in same},
    }


def network_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Network and length, which all runs of a study should share."""
    kept = {name: checkpoint.config[name] for name in ("channels", "image_size", "spacing_mm")}
    return {**kept, "norm": checkpoint.norm, "epochs": checkpoint.provenance.epochs}


def training_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the seeds of one experiment share: how, and on which split's training subjects, the network was
    trained and pretrained, as far as the checkpoint remembers.
    """
    found = {}
    for when, link in zip(("", "pretraining "), checkpoint.provenance.history(), strict=False):
        pool = hashlib.sha256(json.dumps(sorted(link.split["train"])).encode()).hexdigest()[:16]
        own_list = splits.published_subset(link.split)  # each seed has another
        every = {**link.hyperparameters, "training subjects": None if own_list else pool}
        found |= {when + name: value for name, value in every.items()}
    return found


def write(
    out: Path, scores: Scores, table: Sequence[dict], summary: dict[str, Any],
    contour_cases: Callable[[], list[dict]],
) -> list[str]:  # fmt: skip
    """Write the CSV files, the pictures and, last, summary.json of a scored split; returns their names. A
    picture that cannot be drawn becomes an entry of `scores.failed`. Without summary.json an evaluation
    counts for nothing, so that an interrupted one is not taken for the one before it.
    """
    present = scores.present
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    tables = {"metrics": scores.rows, "slices": scores.slices, "clinical": scores.clinical,
              "breakdown": table}  # fmt: skip
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
    pictures = {
        "agreement.png": lambda path: plots.bland_altman(agreement_pairs(scores.clinical), path),
        "position.png": lambda path: plots.dice_by_position(scores.slices, path),
        "boxes.png": lambda path: plots.boxes([r for r in scores.rows if r["class"] in present], path),
        "contours.png": lambda path: contours.contour_sheet(contour_cases(), path),
    }
    for name, draw in pictures.items():
        try:
            draw(out / name)
        except Exception as error:  # the scores are worth more than a picture
            scores.failed.append(f"{name}: {one_line(error)}")
    dice: dict[str, dict] = {}
    for phase in ("ED", "ES", "both"):
        for name, classes in {**{c: [c] for c in present}, "mean": present}.items():
            found = stats.describe(stats.per_subject(scores.rows, phase, classes).values())
            kept = {
                k: v if math.isfinite(v := found[k]) else None for k in ("mean", "std")
            }  # JSON has no NaN
            dice.setdefault(phase, {})[name] = kept
    content = {
        **summary,
        "subjects": sorted({row["subject"] for row in scores.rows}),
        "without_labels": scores.unlabelled,
        "without_reference": [name for name in CLASSES if name not in present],
        "failed": scores.failed,
        "dice": dice,
        "missed": missed(scores.rows),
    }
    Run(out).write_json("summary.json", content)
    return [name for name in (*(f"{table}.csv" for table in tables), "summary.json", *pictures)
            if (out / name).is_file()]  # fmt: skip


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
    """For a contour sheet: worst, median and best subject by mean Dice, every scored phase of each."""
    ranked = sorted(stats.per_subject(scores.rows, "both", scores.present).items(), key=lambda item: item[1])
    places = {"median": len(ranked) // 2, "best": -1, "worst": 0} if ranked else {}
    names = {ranked[place][0]: name for name, place in places.items()}  # one name for each subject
    sheet = []
    for key, name in sorted(names.items(), key=lambda item: ("worst", "median", "best").index(item[1])):
        i = cines.index[key]
        rows = [row for row in scores.rows if row["subject"] == key and row["class"] in scores.present]
        for phase, frame in sorted({(row["phase"], row["frame"]) for row in rows}):
            mean = np.mean([row["dice"] for row in rows if row["phase"] == phase])
            (labels,) = predict_frames(methods, cines, i, [frame], device, **options)
            sheet.append(contours.case(cines, i, frame, f"{name}: {key}, {phase}, Dice {mean:.3f}", labels))
    return sheet
