"""The same images under two names, and other images under one name: found by the digests of the images."""

from collections.abc import Iterable

from cmrssp.data.store import Store
from cmrssp.data.subject import USED, Problem
from cmrssp.errors import UserError


def problems(store: Store) -> list[Problem]:
    """One for each subject that has the images of an earlier one."""
    first: dict[str, str] = {}
    found = []
    for subject, record in zip(store.subjects, store.cines, strict=True):
        if (other := first.setdefault(record.digest, subject.key)) != subject.key:
            what = f"the same images as {other}: one of them may test what the other trained"
            found.append(Problem(subject.key, subject.cine.name, what, USED))
    return found


def without_copies(store: Store, split: dict[str, list[str]]) -> dict[str, list[str]]:
    """Drop, and print, training copies of validation or test and validation copies of test subjects."""
    images = store.digests()
    held_out: dict[str, str] = {}  # {digest: the subject of a later part that has these images}
    kept = dict(split)
    for part in ("test", "validation", "train"):
        copies = {key: held_out[images[key]] for key in split[part] if images.get(key) in held_out}
        for key, other in copies.items():
            print(f"not used: {key} ({part}), the same images as {other}")
        kept[part] = [key for key in split[part] if key not in copies]
        held_out |= {images[key]: f"{key} ({part})" for key in kept[part] if key in images}
    return kept


def refuse_other_images(
    store: Store,
    recorded: dict[str, str],
    trained: Iterable[str],
    held_out: Iterable[str],
    *,
    elsewhere: bool = False,
) -> None:
    """Raise UserError for a subject with other images than `recorded` by a checkpoint ({subject key:
    digest}), and for a `held_out` one with the images of another that it was `trained` on. `elsewhere`: the
    subjects are of another hospital, where the same name means nothing and the same images are refused.
    """
    now = store.digests()
    if not elsewhere and (
        other := sorted(key for key, image in now.items() if recorded.get(key, image) != image)
    ):
        raise UserError(
            f"--data: {len(other)} of {len(now)} subjects have other images than those that the checkpoint "
            f"knows by their names, the first is {other[0]}; if it is another data set, rename its files"
        )
    seen = {recorded[key]: key for key in trained if key in recorded}
    present = sorted(key for key in held_out if key in now)
    if copies := [k for k in present if now[k] in seen and (elsewhere or seen[now[k]] != k)]:
        how = "remove them from --data" if elsewhere else "leave them out with --split-file"
        first = f"the first is {copies[0]}, as {seen[now[copies[0]]]}; {how}"
        what = f"{len(copies)} of {len(present)} validation or test subjects have the images of subjects"
        raise UserError(f"--data: {what} that the checkpoint has been trained on, {first}")
