"""What pretraining, fine-tuning and evaluation do alike before their first batch: find the subjects, split
them, store them, and refuse a split whose held-out subjects a checkpoint has been trained on.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cmrssp.data import copies, dataset, quality, splits, store
from cmrssp.data.store import Store
from cmrssp.data.subject import Subject
from cmrssp.errors import UserError
from cmrssp.hardware import distributed


class Trained(Protocol):
    """What a checkpoint remembers of its trainings (`weights.checkpoints.Checkpoint` does)."""

    path: Path
    digests: dict[str, str]  # {subject key: digest of its images}

    def seen(self) -> dict[str, str]:
        """{subject key: method that trained on it}."""


@dataclass(frozen=True)
class Prepared:
    """Stored subjects and who of them trains, validates and tests."""

    cines: Store
    split: dict[str, list[str]]  # {part: subject keys}; of the wanted parts only what is stored
    digests: dict[str, str]  # {subject key: digest of its images}, of every stored subject


def prepare(
    paths: Sequence[str],
    cache: Path,
    *,
    needed: str,
    label_suffix: str = dataset.LABEL_SUFFIX,
    parts: Sequence[str] = splits.PARTS,
    labelled: Collection[str] = (),
    split_file: Path | None = None,
    split_seed: int = 0,
    inherited: dict[str, list[str]] | None = None,
    keep_overlap: bool = False,
    skip_broken: bool = False,
    vendors: Collection[str] | None = None,
    checkpoints: Sequence[Trained] = (),
    held_out: Sequence[str] = (),
) -> Prepared:
    """Find the subjects of `paths`, split them, store those of `parts`, and print what was found.

    Labels are read for the parts `labelled` alone; then `Prepared.cines` holds these parts alone. `needed` is
    the part that must not be empty; `vendors` keeps the subjects of these vendors alone in it. The split is
    that of `split_file`, else `inherited`, else drawn with `split_seed`. No subject of the parts `held_out`
    may have been seen by one of the `checkpoints`. A training subject with the images of a held-out one is
    dropped. Under torchrun rank 0 writes and the others wait for it.

    Raises UserError, FileNotFoundError for data that is not there, BrokenSubject for cines that cannot be
    read (unless `skip_broken`).
    """
    with distributed.main_first():
        subjects, problems = dataset.find(paths, cache, label_suffix)
    split = splits.choose(
        subjects, split_file=split_file, split_seed=split_seed, inherited=inherited, keep_overlap=keep_overlap
    )
    _refuse_empty(subjects, split, needed)
    for checkpoint in checkpoints:
        refuse_trained(checkpoint, split, held_out)
    if vendors is not None:
        split = _of_vendors(subjects, split, needed, vendors)
    with distributed.main_first():
        cines = store.build(
            splits.named(subjects, split, parts), cache, labels=False, skip_broken=skip_broken
        )
    held = [key for part in held_out for key in split[part]]
    for checkpoint in checkpoints:
        copies.refuse_other_images(cines, checkpoint.digests, checkpoint.seen() if held else (), held)
    digests = cines.digests()
    split = copies.without_copies(cines, splits.keep(split, cines.index, parts))
    if labelled:
        with distributed.main_first():
            cines = store.build(
                splits.named(cines.subjects, split, labelled), cache, labels=True, skip_broken=skip_broken
            )
        split = splits.keep(split, cines.index, tuple(labelled))
    print(quality.summary(cines, problems))
    return Prepared(cines, split, digests)


def _refuse_empty(subjects: Sequence[Subject], split: dict[str, list[str]], needed: str) -> None:
    """Raise UserError where the part is empty; names the official test subjects that fill the others."""
    if split[needed]:
        return
    counts = ", ".join(f"{len(keys)} {part}" for part, keys in split.items())
    official = [s for s in subjects if s.part == "test"]
    why = (
        f"; {len(official)} of them are test subjects by their data set's own list, the first is "
        f"{min(s.key for s in official)}"
        if official
        else ""
    )
    raise UserError(
        f"--data: no {needed} subject among {len(subjects)} ({counts}){why}; add the data set's other "
        f"subjects, or give a --split-file with {needed} subjects"
    )


def refuse_trained(checkpoint: Trained, split: dict[str, list[str]], held_out: Iterable[str]) -> None:
    """Raise UserError where the checkpoint has been trained on a subject of these parts."""
    seen = checkpoint.seen()
    for part in held_out:
        leaked = [key for key in split[part] if key in seen]
        if leaked:
            raise UserError(
                f"{checkpoint.path}: has been trained on {len(leaked)} of the {len(split[part])} {part} "
                f"subjects ({seen[leaked[0]]}, the first is {leaked[0]}); use the split that it was trained "
                "with (leave out --split-seed and --split-file), or pretrain again"
            )


def _of_vendors(
    subjects: Sequence[Subject], split: dict[str, list[str]], part: str, vendors: Collection[str]
) -> dict[str, list[str]]:
    """The split with the subjects of these vendors alone in `part`. Raises UserError where none is left."""
    known = {s.key: s.vendor or "unknown" for s in subjects}
    kept = [key for key in split[part] if known[key] in vendors]
    if not kept:
        present = ", ".join(sorted({known[key] for key in split[part]}))
        raise UserError(
            f"--vendors {' '.join(vendors)}: none of the {len(split[part])} {part} subjects; their vendors "
            f"are {present}"
        )
    return {**split, part: kept}
