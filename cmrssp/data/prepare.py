"""What every script does first: find, split and store subjects, and refuse splits that leak."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmrssp.data import copies, dataset, quality, splits, store
from cmrssp.data.splits import Split
from cmrssp.data.store import Store
from cmrssp.data.subject import Subject, listed
from cmrssp.errors import UserError
from cmrssp.hardware import distributed


@dataclass(frozen=True)
class Prepared:
    """Stored subjects and who of them trains, validates and tests."""

    cines: Store
    split: Split  # of the wanted parts only what is stored
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
    inherited: Split | None = None,
    everyone: bool = False,
    keep_overlap: bool = False,
    skip_broken: bool = False,
    vendors: Collection[str] | None = None,
    checkpoints: Sequence[Any] = (),  # weights.checkpoints.Checkpoint, which this package does not import
    held_out: Sequence[str] = (),
) -> Prepared:
    """Find the subjects of `paths`, split them, store those of `parts`, and print what was found.

    With `labelled`, `Prepared.cines` holds these parts alone, with labels. The part `needed` must have a
    subject; `vendors` restricts it. With `everyone` it has all labelled subjects; else the split is that of
    `split_file`, else `inherited`, else drawn with `split_seed`. No checkpoint may have seen a subject of the
    parts `held_out`, or its images. Copies of a subject under other names stay in one part alone, test before
    validation before train. Raises UserError, FileNotFoundError for missing data, BrokenSubject unless
    `skip_broken`.
    """
    with distributed.main_first():
        subjects, problems = dataset.find(paths, cache, label_suffix)
    split = splits.choose(
        subjects,
        split_file=split_file,
        split_seed=split_seed,
        inherited=inherited,
        everyone=needed if everyone else None,
        keep_overlap=keep_overlap,
        seen={key for checkpoint in checkpoints for key in checkpoint.seen()},
    )
    if not split[needed]:
        official = sorted(s.key for s in subjects if s.part == "test")
        why = f"; of its data set's own test list are {listed(official)}" if official else ""
        more = f"add other subjects, or give a --split-file with {needed} subjects"
        raise UserError(f"--data: no {needed} subject ({splits.describe(split)}){why}; {more}")
    for checkpoint in checkpoints:
        if not (everyone and checkpoint.digests):  # another hospital can have the same names
            refuse_trained(checkpoint, split, held_out)
    if vendors is not None:
        split = _of_vendors(subjects, split, needed, vendors)

    def stored(found: Sequence[Subject], parts: Collection[str], labels: bool) -> Store:
        keys = {key for part in parts for key in split[part]}
        with distributed.main_first():
            used = [s for s in found if s.key in keys]
            return store.build(used, cache, labels=labels, skip_broken=skip_broken)

    cines = stored(subjects, parts, labels=False)
    held = [key for part in held_out for key in split[part]]
    for checkpoint in checkpoints:
        seen = checkpoint.seen() if held else ()
        copies.refuse_other_images(cines, checkpoint.digests, seen, held, elsewhere=everyone)
    digests = cines.digests()
    split = copies.without_copies(cines, splits.keep(split, cines.index, parts))
    if labelled:
        cines = stored(cines.subjects, labelled, labels=True)
        split = splits.keep(split, cines.index, labelled)
    print(quality.summary(cines, problems))
    return Prepared(cines, split, digests)


def refuse_trained(checkpoint: Any, split: Split, held_out: Sequence[str]) -> None:
    """Raise UserError if the checkpoint was trained on a subject of these parts."""
    seen = checkpoint.seen()
    for part in held_out:
        if leaked := [key for key in split[part] if key in seen]:
            raise UserError(
                f"{checkpoint.path}: has been trained on {len(leaked)} of the {len(split[part])} {part} "
                f"subjects ({seen[leaked[0]]}, the first is {leaked[0]}); use the split that it was trained "
                "with (leave out the flags that choose another), or pretrain again"
            )


def _of_vendors(subjects: Sequence[Subject], split: Split, part: str, vendors: Collection[str]) -> Split:
    """The split with only these vendors' subjects in `part`. Raises UserError if none is left."""
    known = {s.key: s.vendor or "unknown" for s in subjects}
    if kept := [key for key in split[part] if known[key] in vendors]:
        return {**split, part: kept}
    present = listed(sorted({known[key] for key in split[part]}))
    raise UserError(f"--vendors {' '.join(vendors)}: no {part} subject; their vendors are {present}")
