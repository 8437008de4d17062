"""What a stored data set looks like, and everything that is odd about it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from cmrssp.data.store import Store
from cmrssp.data.subject import DONE, LEFT_OUT, USED, Problem
from cmrssp.errors import UserError

SQUARES_MM = (160.0, 200.0)  # what whole hearts are looked for in
CROP_MM = 320.0  # what the network sees at the paper's settings


def problems(store: Store, found: Sequence[Problem]) -> list[Problem]:
    """All problems, worst first: of the files (`found`), of the stored subjects, and between them."""
    records = [*store.cines, *(store.labels or ())]
    every = [*found, *store.left_out, *(p for record in records for p in record.problems)]
    every += _copies(store) + _far_hearts(store)
    return sorted(every, key=lambda p: (DONE.index(p.done), p.subject == "", p.subject, p.file, p.what))


def _copies(store: Store) -> list[Problem]:
    """The same image content under two names."""
    same = defaultdict(list)
    for subject, record in zip(store.subjects, store.cines, strict=True):
        same[record.digest, record.shape].append(subject)
    return [
        Problem(
            copy.key,
            copy.cine.name,
            f"the same images as {first.key}: one of them may test what the other trained",
            USED,
        )
        for first, *copies in same.values()
        for copy in copies
    ]


def without_copies(store: Store, split: dict[str, list[str]]) -> dict[str, list[str]]:
    """The split without those training subjects whose images are also a validation or test subject's, and
    without validation subjects that copy a test subject; each is named.
    """
    images = digests(store, store.index)
    held: dict[str, str] = {}  # images: the subject of a later part that has them
    kept: dict[str, list[str]] = {}
    for part in ("test", "validation", "train"):
        copies = {key: held[images[key]] for key in split[part] if images.get(key) in held}
        for key, other in copies.items():
            print(f"not used: {key} ({part}), the same images as {other}")
        kept[part] = [key for key in split[part] if key not in copies]
        held |= {images[key]: f"{key} ({part})" for key in kept[part] if key in images}
    return {part: kept[part] for part in split}


def refuse_other_images(
    store: Store, recorded: dict[str, str], trained: Iterable[str], held: Iterable[str]
) -> None:
    """Raise UserError where a subject's images are not those that a checkpoint recorded for its key, or where
    a `held` subject has the images of a subject with another key that the checkpoint was `trained` on.
    recorded: {subject key: `digests`}.
    """
    now = digests(store, store.index)
    other = sorted(key for key, image in now.items() if recorded.get(key, image) != image)
    if other:
        raise UserError(
            f"--data: {len(other)} of {len(now)} subjects have the names but not the images of those that "
            f"the checkpoint knows, the first is {other[0]}; is it another data set with the same file names?"
        )
    seen = {recorded[key]: key for key in trained if key in recorded}
    held = sorted(key for key in held if key in now)
    copies = [key for key in held if seen.get(now[key], key) != key]
    if copies:
        raise UserError(
            f"--data: {len(copies)} of {len(held)} validation or test subjects have the images of subjects "
            f"that the checkpoint has been trained on, the first is {copies[0]}, as {seen[now[copies[0]]]}; "
            "leave them out with --split-file"
        )


def digests(store: Store, keys: Iterable[str], *, labels: bool = False) -> dict[str, str]:
    """{subject key: first 16 digits of the digest of its images or labels}, as checkpoints keep them."""
    records = store.labels if labels else store.cines
    return {key: records[store.index[key]].digest[:16] for key in keys}


def reaches(store: Store) -> np.ndarray:
    """(N, 2) in mm, of every labelled subject: the distance between the found crop centre and the centroid of
    the labels, and how far from the crop centre, along rows or columns, the labels reach.
    """
    found = []
    for cine, labels in zip(store.cines, store.labels or (), strict=bool(store.labels)):
        if labels.heart is None:
            continue
        spacing, centre = np.array(cine.geometry.spacing_mm), np.array(cine.centre)
        box = np.array(labels.heart.box).reshape(2, 2)  # rows, columns
        off = (np.array(labels.heart.centre) - centre) * spacing
        reach = np.abs(box - centre[:, None]).max(axis=1) * spacing
        found.append((np.hypot(*off), reach.max()))
    return np.array(found).reshape(-1, 2)


def _far_hearts(store: Store) -> list[Problem]:
    labelled = [s for s, r in zip(store.subjects, store.labels or (), strict=bool(store.labels)) if r.heart]
    odd = []
    for subject, (_, reach) in zip(labelled, reaches(store), strict=True):
        if reach > SQUARES_MM[-1] / 2:
            where = "beyond" if reach > CROP_MM / 2 else "near the edge of"
            what = (
                f"the labelled heart reaches {reach:.0f} mm from the found crop centre, {where} the "
                f"{CROP_MM:.0f} mm crop of the paper's settings"
            )
            odd.append(Problem(subject.key, subject.cine.name, what, USED))
    return odd


def summary(store: Store, found: Sequence[Problem]) -> str:
    """Three lines: what there is, in which sizes, and how much of it is odd; and a line on each group of
    files that was left out.
    """
    if not store.subjects:
        return "cines: none"
    shapes, geometries = [r.shape for r in store.cines], [r.geometry for r in store.cines]
    sets = _counts(s.dataset for s in store.subjects)
    vendors = _counts(s.vendor or "unknown" for s in store.subjects)
    frames, slices = sum(t for t, *_ in shapes), sum(t * z for t, z, *_ in shapes)
    sizes = [_span([s[i] for s in shapes]) for i in range(4)]
    pixels = _span([spacing for g in geometries for spacing in g.spacing_mm])
    ordered = sum(g.order_known for g in geometries)
    every = problems(store, found)
    counts = Counter(p.done for p in every)
    said = ", ".join(f"{counts[done]} {done}" for done in DONE if counts[done]) or "none found"
    return "\n".join(
        (
            f"cines: {len(shapes)} subjects ({sets}; vendors: {vendors}), {frames} frames, {slices} slices",
            f"sizes: {sizes[2]} x {sizes[3]} px of {pixels} mm; {sizes[1]} slices, {sizes[0]} frames; pitch "
            f"{_span([g.slice_pitch_mm for g in geometries])} mm; slice order from the affine in {ordered}, "
            f"taken as base first in {len(shapes) - ordered}",
            f"problems: {said}" + ("; python -m cmrssp.data lists them" if every else ""),
            *(str(p) for p in every if p.done == LEFT_OUT and not p.subject),
        )
    )


def report(store: Store, found: Sequence[Problem]) -> str:
    """The summary, the labels, how well the label-free crop centre fits, and all problems, worst first."""
    lines = summary(store, found).splitlines()[:3]
    lines[-1] = lines[-1].partition(";")[0]
    labelled = [record for record in store.labels if record.frames]
    slices = sum(len(r.frames) * r.shape[1] for r in labelled)
    phases = Counter(phase for record in labelled for phase in record.phases)
    lines.insert(
        2, f"labels: {len(labelled)} subjects, {slices} slices; ED of {phases['ED']}, ES of {phases['ES']}"
    )
    measured = reaches(store)
    if len(measured):
        share = [f"{np.count_nonzero(measured[:, 1] <= side / 2)} of {len(measured)} within {side:.0f} mm"
                 for side in SQUARES_MM]  # fmt: skip
        lines.insert(3, f"crop centre (found without labels): {np.median(measured[:, 0]):.0f} mm (median), "
                     f"{np.percentile(measured[:, 0], 95):.0f} mm (95th percentile) from the labelled "
                     f"heart's; whole hearts in a square around it: {', '.join(share)}")  # fmt: skip
    return "\n".join([*lines, *(f"  {problem}" for problem in problems(store, found))])


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(Counter(names).items()))


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}-{high:.4g}"
