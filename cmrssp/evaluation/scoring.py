"""A network's predictions against the reference of a split, by subject, phase, class and slice."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cmrssp import metrics
from cmrssp.data import splits
from cmrssp.data.dataset import PREDICTED
from cmrssp.data.nifti import cine_image, write_labels
from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.errors import one_line
from cmrssp.evaluation import contours, plots, stats
from cmrssp.files import hashed, write_csv, write_json
from cmrssp.hardware import distributed
from cmrssp.weights.checkpoints import Checkpoint
from cmrssp.weights.provenance import Provenance

THIRDS = ("base", "mid", "apex")
METRICS = ("dice", "hd95_mm", "assd_mm", "hd95_filled_mm", "assd_filled_mm")  # of the breakdown
_RESAMPLES = 2000
Predict = Callable[[int, list[int]], Iterator[np.ndarray]]  # (subject, frames) -> label maps (Z, H, W)


@dataclass
class Scores:
    """What was measured on a split."""

    rows: list[dict] = field(default_factory=list)  # one per subject, phase and class
    slices: list[dict] = field(default_factory=list)  # one per subject, phase, class and slice
    clinical: list[dict] = field(default_factory=list)  # one per subject
    undrawn: list[str] = field(default_factory=list)  # such as "RV" or "MYO at ES": no reference has it
    unlabelled: list[str] = field(default_factory=list)  # subjects without a labelled frame of these phases
    failed: list[str] = field(default_factory=list)  # "subject: what went wrong"

    @property
    def present(self) -> list[str]:
        """The classes that at least one reference has."""
        found = {row["class"] for row in self.rows}
        return [name for name in CLASSES if name in found]

    @property
    def missed(self) -> dict[str, int]:
        """{class: volumes in which only one of the two label maps has it}."""
        found = Counter(row["class"] for row in self.rows if row["missed"])
        return {name: found[name] for name in CLASSES if found[name]}

    def leave_out_undrawn(self) -> None:
        """Drop the rows of a class in a phase in which no reference has it."""
        lost = {(row["phase"], row["class"]) for row in self.rows}
        lost -= {(row["phase"], row["class"]) for row in self.rows if row["in_reference"]}
        for rows in (self.rows, self.slices):
            rows[:] = [row for row in rows if (row["phase"], row["class"]) not in lost]
        present = self.present
        self.undrawn = [name for name in CLASSES if name not in present]
        self.undrawn += [f"{name} at {phase}" for phase, name in sorted(lost) if name in present]


def score(predict: Predict, cines: Store, *, phases: str, save: Path | None = None) -> Scores:
    """Predict the labelled frames (`phases`: ed, es, both) and measure them on each file's own grid. Label
    maps go to the folder `save`, 4D with other frames 0. The ranks share the subjects and return all scores.
    """
    mine, parts = distributed.own_items(range(len(cines.subjects))), []
    for i in tqdm(mine, "predicting", unit="subject", disable=distributed.hide_bar()):
        key = cines.subjects[i].key
        frames = {name: t for name, t in cines.labels[i].phases.items() if phases in (name.lower(), "both")}
        try:
            parts.append(_score_subject(predict, cines, i, frames, save))
        except Exception as error:  # the other subjects must not suffer
            parts.append(Scores(failed=[f"{key}: {one_line(error)}"]))
    every = Scores()
    for part in distributed.merge(parts):
        for name, rows in vars(part).items():
            getattr(every, name).extend(rows)
    every.leave_out_undrawn()
    return every


def _score_subject(
    predict: Predict, cines: Store, i: int, frames: dict[str, int], save: Path | None
) -> Scores:
    subject, record, scores = cines.subjects[i], cines.cines[i], Scores()
    if not frames:
        return Scores(unlabelled=[subject.key])
    who = {name: getattr(subject, name) for name in ("dataset", "vendor", "pathology")}
    who = {"subject": subject.key, **who}
    spacing = (record.geometry.slice_pitch_mm, *record.geometry.spacing_mm)
    ours, theirs = {}, {}  # volumes in ml by phase and class
    maps = np.zeros(record.shape if save else 0, np.uint8)
    for (phase, frame), labels in zip(frames.items(), predict(i, list(frames.values())), strict=True):
        reference = cines.label_volume(i, frame)
        measured = metrics.score(labels, reference, spacing)
        if not record.measurable:  # lengths and volumes would be wrong
            for found in measured.values():
                found |= {column: math.nan for column in found if column.endswith(("_mm", "_ml"))}
        at = {**who, "phase": phase, "frame": frame}
        scores.rows += [{**at, "class": name, **measured[name]} for name in CLASSES]
        scores.slices += [{**at, **row} for row in slice_rows(labels, reference)]
        ours[phase] = {name: measured[name]["volume_ml"] for name in CLASSES}
        drawn = [name for name in CLASSES if measured[name]["in_reference"]]  # 0 ml are no measurement
        theirs[phase] = {name: measured[name]["reference_ml"] for name in drawn}
        if save:
            maps[frame] = labels
    expected = metrics.clinical(theirs)
    for name, value in metrics.clinical(ours).items():
        error = None if value is None or expected[name] is None else value - expected[name]
        who |= {name: value, f"{name}_reference": expected[name], f"{name}_error": error}
    scores.clinical.append(who)
    if save:
        save.mkdir(parents=True, exist_ok=True)
        alone = [s.file_name for s in cines.subjects].count(subject.file_name) == 1
        name = subject.file_name if alone else subject.key.replace("/", "__")
        write_labels(save / f"{name}{PREDICTED}", maps, record.geometry, cine_image(subject))
    return scores


def slice_rows(labels: np.ndarray, reference: np.ndarray) -> Iterator[dict]:
    """Dice of each class in each slice of two label maps (Z, H, W), NaN if neither has it. `third` divides
    the slices from the reference's first to its last, if three or more. A single slice has no `position`.
    """
    labelled = np.flatnonzero(reference.any(axis=(1, 2)))
    first, last = labelled[0], labelled[-1]
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


def breakdown(scores: Scores) -> list[dict[str, Any]]:
    """For each by, group, class and metric: `stats.describe` over subjects, and low and high, the 95 %
    bootstrap interval of the mean. The class "mean" is the mean over the present classes.
    """
    groups = [("all", "", scores.rows)]
    for by in ("phase", "vendor", "pathology", "dataset"):
        for name in sorted({row[by] for row in scores.rows}):
            groups.append((by, name or "unknown", [row for row in scores.rows if row[by] == name]))
    groups += [("third", third, _rows_of(third, scores.slices)) for third in THIRDS]
    table = []
    for by, group, rows in groups:
        for metric in METRICS if by != "third" else ("dice",):
            for name, members in {**{c: [c] for c in scores.present}, "mean": scores.present}.items():
                found = list(stats.per_subject(rows, "both", members, metric).values())
                low, high = stats.bootstrap_interval(found, _RESAMPLES)
                where = {"by": by, "group": group, "class": name, "metric": metric}
                table.append({**where, **stats.describe(found), "low": low, "high": high})
    return table


def _rows_of(third: str, slices: Sequence[dict]) -> list[dict]:
    """The Dice of each subject, phase and class over all slices of a third of the heart."""
    counts: dict[tuple, np.ndarray] = {}
    for row in slices:
        if row["third"] == third and row["total_px"]:
            key = row["subject"], row["phase"], row["class"]
            counts[key] = counts.get(key, 0) + np.array((row["overlap_px"], row["total_px"]))
    return [
        {"subject": subject, "phase": phase, "class": name, "dice": metrics.dice_of(*pixels)}
        for (subject, phase, name), pixels in counts.items()
    ]


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a study must know of a fine-tuned network: its place in the tables (arm), network and length,
    which all runs of a study should share (settings), and what all seeds of an arm should share (recipe).
    """
    link = checkpoint.provenance
    trainings = [each for each in link.contributions() if each.method == link.method]  # also of teachers
    same = ("all_subjects", "slices", "phases", "vendors", "augmentation", "seed")
    arm = {
        "pretraining": link.history()[-1].method if link.init else "scratch",
        "n_subjects": len({key for each in trainings for key in each.subjects}),
        "predicted": bool(link.predicted),
        **{name: getattr(link, name) for name in same},
    }
    settings = {**checkpoint.network, "epochs": link.epochs}
    return {"arm": arm, "settings": settings, "recipe": training_recipe(link)}


def training_recipe(provenance: Provenance) -> dict[str, Any]:
    """Hyperparameters and training subjects of the fine-tuning and of the pretraining, as far as known."""
    found = {}
    for when, link in zip(("", "pretraining "), provenance.history(), strict=False):
        pool = hashed(json.dumps(sorted(link.split["train"])))
        own_list = splits.published_subset(link.split)  # which differs by seed
        every = {**link.hyperparameters, "training subjects": None if own_list else pool}
        if link.teachers:
            every |= {"predicting": link.predicting, "teachers": [training_recipe(t) for t in link.teachers]}
        found |= {when + name: value for name, value in every.items()}
    return found


def write(
    out: Path, scores: Scores, table: Sequence[dict], summary: dict[str, Any], predict: Predict, cines: Store
) -> list[str]:
    """Write the CSV files, the pictures and, last, summary.json, without which an evaluation is incomplete;
    returns their names. A failed picture becomes an entry of `scores.failed`.
    """
    present = scores.present
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    tables = {
        "metrics": scores.rows,
        "slices": scores.slices,
        "clinical": scores.clinical,
        "breakdown": table,
    }
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
    pictures = {
        "agreement.png": lambda path: plots.bland_altman(agreement_pairs(scores.clinical), path),
        "position.png": lambda path: plots.dice_by_position(scores.slices, path),
        "boxes.png": lambda path: plots.boxes(scores.rows, path),
        "contours.png": lambda path: contours.contour_sheet(cines, extremes(scores, cines, predict), path),
    }
    for name, draw in pictures.items():
        try:
            draw(out / name)
        except Exception as error:  # the scores matter more
            scores.failed.append(f"{name}: {one_line(error)}")
    unknown = {"mean": None, "std": None}
    dice = {phase: dict.fromkeys((*present, "mean"), unknown) for phase in ("ED", "ES", "both")}
    for row in table:
        if row["metric"] == "dice" and row["by"] in ("all", "phase"):
            kept = {k: None if math.isnan(row[k]) else row[k] for k in ("mean", "std")}  # JSON has no NaN
            dice[row["group"] or "both"][row["class"]] = kept
    content = {
        **summary,
        "subjects": sorted({row["subject"] for row in scores.rows}),
        "without_labels": scores.unlabelled,
        "without_reference": [name for name in CLASSES if name not in present],
        "failed": scores.failed,
        "dice": dice,
        "missed": scores.missed,
    }
    write_json(out / "summary.json", content)
    names = [*(f"{name}.csv" for name in tables), "summary.json", *pictures]
    return [name for name in names if (out / name).is_file()]


def agreement_pairs(clinical: Sequence[dict]) -> dict[str, list[np.ndarray]]:
    """{clinical number: [predicted (N,), reference (N,)]}, NaN where it is unknown; no stroke volumes."""
    names = [name for name in metrics.clinical({}) if "_sv_" not in name]
    both = {name: (name, f"{name}_reference") for name in names}
    return {name: [np.array([r[c] for r in clinical], float) for c in pair] for name, pair in both.items()}


def extremes(scores: Scores, cines: Store, predict: Predict) -> list[contours.Case]:
    """Every scored phase of the worst, median and best subject by mean Dice."""
    dice = stats.per_subject(scores.rows, "both", scores.present)
    ranked = sorted(dice, key=dice.__getitem__)
    places = {len(ranked) // 2: "median", len(ranked) - 1: "best", 0: "worst"}  # one name for each subject
    sheet = []
    for place, name in sorted(places.items()):
        key = ranked[place]
        rows = [row for row in scores.rows if row["subject"] == key]
        for phase, frame in sorted({(row["phase"], row["frame"]) for row in rows}):
            mean = np.mean([row["dice"] for row in rows if row["phase"] == phase])
            (labels,) = predict(cines.index[key], [frame])
            title = f"{name}: {key}, {phase}, Dice {mean:.3f}"
            sheet.append((cines.index[key], frame, title, labels))
    return sheet
