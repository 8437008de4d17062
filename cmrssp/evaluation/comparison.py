"""Evaluated runs side by side, paired by subject; the seeds of one experiment are averaged first."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmrssp.errors import UserError
from cmrssp.evaluation import study
from cmrssp.evaluation.study import Evaluated


def arms(runs: Sequence[str], split: str) -> dict[str, list[Evaluated]]:
    """{name: runs}: runs that differ in the seed alone are one group, named after the path of its first run
    as typed and the number of further seeds. Raises UserError for what is no evaluated run, for one that is
    named twice, and for runs with scores of different subjects or phases.
    """
    groups: dict[str, list[Evaluated]] = {}
    seen: set[Path] = set()
    for run in runs:
        folder = Path(run) if (Path(run) / "summary.json").is_file() else Path(run) / f"evaluation-{split}"
        try:
            found = study.read(folder / "summary.json", split)
        except study.UNREADABLE as error:
            raise UserError(
                f"{run}: no whole scores of the {split} split ({str(error)[:80]}); run python evaluate.py "
                f"--split {split} --checkpoint {run} first"
            ) from None
        if found is None:
            raise UserError(f"{folder}: expected scores of the {split} split (--split), got those of another")
        if folder.resolve() in seen:
            raise UserError(f"--compare: {run} is named twice")
        seen.add(folder.resolve())
        for seeds in groups.values():
            if _but_seed(seeds[0]) == _but_seed(found) and found.seed not in {each.seed for each in seeds}:
                seeds.append(found)
                break
        else:
            groups[run] = [found]
    first, *others = (run for seeds in groups.values() for run in seeds)
    for other in others:
        study.refuse_other_subjects(first, other)
    return {
        name + (f" and {len(seeds) - 1} more seeds" if len(seeds) > 1 else ""): seeds
        for name, seeds in groups.items()
    }


def _but_seed(run: Evaluated) -> tuple:
    return run.arm, run.settings, run.recipe


def arm_scores(arms: dict[str, list[Evaluated]], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """{arm: {subject: Dice}}: the mean over a subject's phases and classes, then over the seeds."""
    scores = {}
    for name, seeds in arms.items():
        found = [run.by_subject(classes=classes) for run in seeds]
        scores[name] = {subject: float(np.mean([each[subject] for each in found])) for subject in found[0]}
    return scores
