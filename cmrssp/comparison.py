"""Evaluated runs side by side, paired by subject; the seeds of one experiment are averaged first."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmrssp.errors import UserError


def read(run: str | Path, split: str) -> tuple[dict, list[dict[str, str]]]:
    """(summary, rows of metrics.csv) of a run folder or of an evaluation folder in it. Raises UserError."""
    folder = Path(run) if (Path(run) / "summary.json").is_file() else Path(run) / f"evaluation-{split}"
    try:
        summary = json.loads((folder / "summary.json").read_text())
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        if summary["split"] != split or not rows:
            raise UserError(
                f"{folder}: expected scores of the {split} split (--split), got those of {summary['split']}"
            )
        return summary, rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{run}: no scores of the {split} split; run python evaluate.py --split {split} --checkpoint "
            f"{run} first"
        ) from None


def arms(runs: Sequence[str], split: str) -> dict[str, list[list[dict[str, str]]]]:
    """{name: metrics of each seed}: runs that differ in nothing but the seed belong together."""
    groups: list[tuple[dict, list[str], list, set]] = []  # what they share, names, metrics, seeds
    for run in runs:
        summary, rows = read(run, split)
        shared = {k: v for k, v in summary.get("arm", {}).items() if k not in ("seed", "slices")}
        seed = summary.get("arm", {}).get("seed")
        for known, names, metrics_of, seeds in groups:
            if shared and known == shared and seed not in seeds:
                names.append(Path(run).name)
                metrics_of.append(rows)
                seeds.add(seed)
                break
        else:
            groups.append((shared, [Path(run).name], [rows], {seed}))
    return {
        names[0] + (f" and {len(names) - 1} more seeds" if len(names) > 1 else ""): metrics_of
        for _, names, metrics_of, _ in groups
    }


def arm_scores(arms: dict[str, list], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """{arm: {subject: Dice}}: the mean over a subject's phases and classes, then over the seeds. Raises
    UserError where the seeds of an arm were evaluated on different subjects.
    """
    scores: dict[str, dict[str, float]] = {}
    for name, seeds in arms.items():
        found: list[dict[str, list[float]]] = []
        for rows in seeds:
            found.append({})
            for row in rows:
                if row["class"] in classes:
                    found[-1].setdefault(row["subject"], []).append(float(row["dice"]))
        if any(set(subjects) != set(found[0]) for subjects in found):
            raise UserError(
                f"{name}: its seeds were evaluated on different subjects; evaluate all on the same split"
            )
        scores[name] = {
            subject: float(np.mean([np.mean(subjects[subject]) for subjects in found]))
            for subject in found[0]
        }
    return scores
