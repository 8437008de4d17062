"""A network's predictions against the reference of a split: one row per subject, phase,
class and slice; summaries.
"""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
from cmrssp.evaluation import plots, report, stats
from cmrssp.files import write_csv
from cmrssp.hardware import distributed
from cmrssp.runs import progress
from cmrssp.runs.folder import Run
from cmrssp.segmentation import Segmentation, predict_frames
from cmrssp.weights.checkpoints import Checkpoint

THIRDS = ("base", "mid", "apex")
METRICS = ("dice", "hd95_mm", "assd_mm", "hd95_filled_mm", "assd_filled_mm")  # what is broken down
_RESAMPLES = 2000
_NUMBERS = ("lv_edv_ml", "lv_esv_ml", "lv_sv_ml", "lv_ef_percent", "rv_edv_ml", "rv_esv_ml", "rv_sv_ml",
            "rv_ef_percent", "lv_mass_g")  # fmt: skip
AGREEMENT = [name for name in _NUMBERS if "_sv_" not in name]


@dataclass
class Scores:
    """What was measured on a split."""

    rows: list[dict] = field(default_factory=list)  # one per subject, phase and class
    slices: list[dict] = field(default_factory=list)  # one per subject, phase, class and slice
    clinical: list[dict] = field(default_factory=list)  # one per subject
    unlabelled: list[str] = field(default_factory=list)  # without a labelled frame of the wanted phases


def score(
    methods: Sequence[Segmentation],
    cines: Store,
    device: torch.device,
    *,
    phases: str,
    save: Path | None = None,
    **options: bool,
) -> Scores:
    """Predict and measure the labelled ED and ES frames, or one of them (`phases`: ed, es, both), on each
    file's own grid; `options` are those of `predict_frames`. With `save` the label maps are written to that
    folder, in the form of M&Ms: 4D, other frames 0. Each rank takes its share of the subjects; all of them
    get the scores of all subjects, in the order of one process.
    """
    wanted = [
        {name: f for name, f in record.phases.items() if phases in (name.lower(), "both")}
        for record in cines.labels
    ]
    slices = sum(len(w) * r.shape[1] for w, r in zip(wanted, cines.labels, strict=True))
    print(f"{len(cines.subjects)} subjects, {slices} slices to predict", flush=True)
    share, mine = distributed.own_items(range(len(cines.subjects))), []
    names = Counter(subject.file_name for subject in cines.subjects)
    for i in tqdm(share, "predicting", unit="subject", disable=distributed.hide_bar()):
        began, subject, scores = time.monotonic(), cines.subjects[i], Scores()
        mine.append(scores)
        if not wanted[i]:
            scores.unlabelled.append(subject.key)
            continue
        record = cines.cines[i]
        who = {"subject": subject.key, "dataset": subject.dataset, "vendor": subject.vendor,
               "pathology": subject.pathology}  # fmt: skip
        spacing = (record.geometry.slice_pitch_mm, *record.geometry.spacing_mm)
        predicted = dict(
            zip(wanted[i], predict_frames(methods, cines, i, list(wanted[i].values()), device, **options),
                strict=True)
        )  # fmt: skip
        volumes: dict[str, dict] = {"volume_ml": {}, "reference_ml": {}}
        for phase, labels in predicted.items():
            truth = cines.label_volume(i, wanted[i][phase])
            measured = metrics.score(labels, truth, spacing)
            at = {**who, "phase": phase, "frame": wanted[i][phase]}
            scores.rows += [{**at, "class": name, **measured[name]} for name in CLASSES]
            scores.slices += [{**at, **row} for row in _slice_rows(labels, truth)]
            for column, kept in volumes.items():
                kept[phase] = {name: measured[name][column] for name in CLASSES}
        scores.clinical.append({**who, **_clinical(volumes)})
        if save:
            save.mkdir(parents=True, exist_ok=True)
            maps = np.zeros(record.shape, np.uint8)
            for phase, labels in predicted.items():
                maps[wanted[i][phase]] = labels
            name = subject.file_name if names[subject.file_name] == 1 else subject.key.replace("/", "__")
            write_labels(save / f"{name}.nii.gz", maps, record.geometry, cine_image(subject))
        if sum(len(s.clinical) for s in mine) == 1 and len(share) > 1:
            seconds = (time.monotonic() - began) * len(share)
            print(f"estimated time: {progress.duration(seconds)}", flush=True)
    every = Scores()
    for scores in distributed.merge(mine):
        for name, rows in vars(scores).items():
            getattr(every, name).extend(rows)
    return every


def _slice_rows(labels: np.ndarray, truth: np.ndarray) -> Iterator[dict]:
    """Dice of each class in each slice, NaN where neither map has it; `third` counts from the first to the
    last slice that the reference labels, where these are three or more. A single slice has no position.
    """
    labelled = np.flatnonzero(truth.any(axis=(1, 2)))
    first, last = (labelled[0], labelled[-1]) if len(labelled) else (0, len(truth) - 1)
    for z, (ours, theirs) in enumerate(zip(labels, truth, strict=True)):
        inside = first <= z <= last and last - first >= 2
        third = THIRDS[3 * (z - first) // (last - first + 1)] if inside else ""
        for id, name in enumerate(CLASSES, start=1):
            a, b = ours == id, theirs == id
            both, total = int((a & b).sum()), int(a.sum()) + int(b.sum())
            yield {
                "class": name,
                "slice": z,
                "position": z / len(truth) if len(truth) > 1 else math.nan,
                "third": third,
                "overlap_px": both,
                "total_px": total,
                "dice": 2 * both / total if total else math.nan,
            }


def _clinical(volumes: dict[str, dict]) -> dict[str, float | None]:
    """Each clinical number as predicted, in the reference, and the difference."""
    ours, theirs = metrics.clinical(volumes["volume_ml"]), metrics.clinical(volumes["reference_ml"])
    row: dict[str, float | None] = {}
    for name in _NUMBERS:
        pair = (ours[name], theirs[name])
        row[name], row[f"{name}_reference"] = pair
        row[f"{name}_error"] = None if None in pair else pair[0] - pair[1]
    return row


def groups(scores: Scores) -> Iterator[tuple[str, str, dict[str, dict[str, list]]]]:
    """(by what, group, {metric: {class or mean: values, one per subject}}) of every breakdown."""
    yield "all", "", _per_subject(scores.rows)
    for by in ("phase", "vendor", "pathology", "dataset"):
        for name in sorted({row[by] for row in scores.rows}):
            yield by, name or "unknown", _per_subject([row for row in scores.rows if row[by] == name])
    for third in THIRDS:
        counts: dict[tuple, list] = {}
        for row in scores.slices:
            if row["third"] == third and row["total_px"]:
                cell = counts.setdefault((row["subject"], row["phase"], row["class"]), [0, 0])
                cell[0] += row["overlap_px"]
                cell[1] += row["total_px"]
        rows = [
            {"subject": subject, "phase": phase, "class": name, "dice": 2 * both / total}
            for (subject, phase, name), (both, total) in counts.items()
        ]
        yield "third", third, _per_subject(rows, ("dice",))


def _per_subject(rows: Sequence[dict], names: Sequence[str] = METRICS) -> dict[str, dict[str, list]]:
    """{metric: {class or mean: values, one per subject}}, as `report.per_subject` over both phases."""
    return {
        metric: {
            group: list(report.per_subject(rows, "both", names_of, metric).values())
            for group, names_of in (*((name, (name,)) for name in CLASSES), ("mean", CLASSES))
        }
        for metric in names
    }


def breakdown(scores: Scores, seed: int = 0) -> list[dict[str, Any]]:
    """Rows (by, group, class, metric): number of subjects, mean, std, median, 5th percentile, and the 95 %
    bootstrap interval of the mean over subjects.
    """
    table = []
    for by, group, values in groups(scores):
        for metric, classes in values.items():
            for name, found in classes.items():
                low, high = stats.bootstrap_interval(found, seed, _RESAMPLES)
                where = {"by": by, "group": group, "class": name, "metric": metric}
                table.append({**where, **stats.describe(found), "low": low, "high": high})
    return table


def missed(rows: Iterable[dict]) -> dict[str, int]:
    """{class: volumes in which it is in one of the two label maps alone}."""
    counts = dict.fromkeys(CLASSES, 0)
    for row in rows:
        counts[row["class"]] += bool(row["missed"])
    return counts


def arm(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a fine-tuned network belongs in the tables of a study: how it was trained, and its seed."""
    link = checkpoint.provenance
    return {
        "pretraining": list(link.history())[-1].method if link.init else "scratch",
        "n_subjects": len(link.subjects),
        "all_subjects": link.all_subjects,
        "slices": link.slices,
        "phases": link.phases,
        "vendors": link.vendors,
        "augmentation": link.augmentation,
        "seed": link.seed,
    }


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Network and length, which all runs of a study should share."""
    names, link = ("channels", "image_size", "spacing_mm"), checkpoint.provenance
    return {**{n: checkpoint.config[n] for n in names}, "norm": checkpoint.norm, "epochs": link.epochs}


def recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """How, and on the training subjects of which split, it was trained and pretrained, as far as it
    remembers: what seeds of one experiment share.
    """
    found = {}
    for when, link in zip(("", "pretraining "), checkpoint.provenance.history(), strict=False):
        pool = hashlib.sha256(json.dumps(sorted(link.split["train"])).encode()).hexdigest()[:16]
        own_list = splits.published_subset(link.split)  # each seed has another
        every = {**link.hyperparameters, "training subjects": None if own_list else pool}
        found |= {when + name: value for name, value in every.items()}
    return found


def write(out: Path, scores: Scores, table: Sequence[dict], summary: dict[str, Any]) -> list[str]:
    """The CSV files, the figures and, last, summary.json of a scored split; their names. Without summary.json
    an evaluation counts for nothing: what was begun over another one is not taken for it.
    """
    (out / "summary.json").unlink(missing_ok=True)
    for name, rows in (("metrics", scores.rows), ("slices", scores.slices), ("clinical", scores.clinical),
                       ("breakdown", table)):  # fmt: skip
        write_csv(out / f"{name}.csv", rows)
    pairs = {}
    for name in AGREEMENT:
        title, unit = name.rsplit("_", 1)
        columns = (
            np.array([row[name + end] for row in scores.clinical], float) for end in ("", "_reference")
        )
        pairs[title.replace("_", " ").upper()] = (*columns, unit.replace("percent", "%"))
    plots.bland_altman(pairs, out / "agreement.png")
    plots.dice_by_position(scores.slices, out / "position.png")
    plots.boxes(scores.rows, out / "boxes.png")
    dice: dict[str, dict] = {}
    for phase in ("ED", "ES", "both"):
        dice[phase] = {}
        for name in (*CLASSES, "mean"):
            found = report.per_subject(scores.rows, phase, CLASSES if name == "mean" else [name])
            mean, std = report.spread(found)
            dice[phase][name] = {"mean": _finite_or_none(mean), "std": _finite_or_none(std)}
    content = {
        **summary,
        "subjects": sorted({row["subject"] for row in scores.rows}),
        "without_labels": scores.unlabelled,
        "dice": dice,
        "missed": missed(scores.rows),
    }
    Run(out).write_json("summary.json", content)
    return ["metrics.csv", "slices.csv", "clinical.csv", "breakdown.csv", "summary.json", "agreement.png",
            "position.png", "boxes.png"]  # fmt: skip


def _finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def cases(
    scores: Scores, cines: Store, methods: Sequence[Segmentation], device: torch.device, **options: bool
) -> list[dict]:
    """For a contour sheet: worst, median and best subject by mean Dice, every scored phase of each."""
    rows = scores.rows
    ranked = sorted(report.per_subject(rows, "both", CLASSES).items(), key=lambda item: item[1])
    chosen = {ranked[i][0]: name for name, i in (("median", len(ranked) // 2), ("best", -1), ("worst", 0))}
    sheet = []
    for key, name in sorted(chosen.items(), key=lambda item: ("worst", "median", "best").index(item[1])):
        i = cines.index[key]
        for phase, frame in sorted({(row["phase"], row["frame"]) for row in rows if row["subject"] == key}):
            mean = np.mean([row["dice"] for row in rows if (row["subject"], row["phase"]) == (key, phase)])
            (labels,) = predict_frames(methods, cines, i, [frame], device, **options)
            title = f"{name}: {key}, {phase}, Dice {mean:.3f}"
            sheet.append(report.case(cines, i, frame, title, labels, truth=True))
    return sheet
