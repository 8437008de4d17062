"""The data report: what a stored data set looks like, and everything that is odd about it."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cmrssp.data import copies
from cmrssp.data.store import Store
from cmrssp.data.subject import DONE, LEFT_OUT, NOT_MEASURED, USED, Problem

SQUARES_MM = (160.0, 200.0)  # sides of the squares in which whole hearts are looked for
CROP_MM = 320.0  # what the network sees at the paper's settings


def problems(store: Store, found: Sequence[Problem]) -> list[Problem]:
    """All problems, worst first: of the files (`found`), of the stored subjects, and between them."""
    records = [*store.cines, *(store.labels or ())]
    every = [*found, *store.left_out, *(p for record in records for p in record.problems)]
    every += copies.problems(store) + _far_hearts(store)
    return sorted(every, key=lambda p: (DONE.index(p.done), p.subject == "", p.subject, p.file, p.what))


def heart_distances(store: Store) -> np.ndarray:
    """(N, 2) in mm, of every labelled subject: the distance between the crop centre and the centroid of the
    labels, and how far from the crop centre, along rows or columns, the labels reach.
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
    for subject, (_, reach) in zip(labelled, heart_distances(store), strict=True):
        if reach > SQUARES_MM[-1] / 2:
            where = "beyond" if reach > CROP_MM / 2 else "near the edge of"
            what = (
                f"the labelled heart reaches {reach:.0f} mm from the crop centre, {where} the {CROP_MM:.0f} "
                "mm crop of the paper's settings"
            )
            odd.append(Problem(subject.key, subject.cine.name, what, USED))
    return odd


def summary(store: Store, found: Sequence[Problem]) -> str:
    """Three lines (what there is, in which sizes, how much of it is odd), one on each group of files that was
    left out, and one on the cines that cannot be measured.
    """
    if not store.subjects:
        return "cines: none"
    every = problems(store, found)
    more = "; python -m cmrssp.data lists them" if every else ""
    lines = [*_overview(store), _counted(every) + more]
    lines += [str(p) for p in every if p.done == LEFT_OUT and not p.subject]
    if wrong := [p for p in every if p.done == NOT_MEASURED]:
        number = len({p.subject for p in wrong})
        lines.append(f"cines whose volumes would be wrong: {number}, the first is {wrong[0]}")
    return "\n".join(lines)


def report(store: Store, found: Sequence[Problem]) -> str:
    """The summary's lines, those on the labels and on the crop centre, and all problems, worst first."""
    every = problems(store, found)
    lines = _overview(store) if store.subjects else ["cines: none"]
    labelled = [record for record in store.labels if record.frames]
    slices = sum(len(r.frames) * r.shape[1] for r in labelled)
    phases = Counter(phase for record in labelled for phase in record.phases)
    if store.subjects:
        lines.append(
            f"labels: {len(labelled)} subjects, {slices} slices; ED of {phases['ED']}, ES of {phases['ES']}"
        )
    measured = heart_distances(store)
    if len(measured):
        within = [f"{np.count_nonzero(measured[:, 1] <= side / 2)} of {len(measured)} within {side:.0f} mm"
                  for side in SQUARES_MM]  # fmt: skip
        lines.append(f"crop centre (found without labels): {np.median(measured[:, 0]):.0f} mm (median), "
                     f"{np.percentile(measured[:, 0], 95):.0f} mm (95th percentile) from the labelled "
                     f"heart's; whole hearts in a square around it: {', '.join(within)}")  # fmt: skip
    return "\n".join([*lines, _counted(every), *(f"  {problem}" for problem in every)])


def _overview(store: Store) -> list[str]:
    shapes, geometries = [r.shape for r in store.cines], [r.geometry for r in store.cines]
    sets = _counts(s.dataset for s in store.subjects)
    vendors = _counts(s.vendor or "unknown" for s in store.subjects)
    frames, slices = sum(t for t, *_ in shapes), sum(t * z for t, z, *_ in shapes)
    sizes = [_span([s[i] for s in shapes]) for i in range(4)]
    pixels = _span([spacing for g in geometries for spacing in g.spacing_mm])
    pitches = _span([g.slice_pitch_mm for g in geometries])
    ordered = sum(g.order_known for g in geometries)
    return [
        f"cines: {len(shapes)} subjects ({sets}; vendors: {vendors}), {frames} frames, {slices} slices",
        f"sizes: {sizes[2]} x {sizes[3]} px of {pixels} mm; {sizes[1]} slices, {sizes[0]} frames; pitch "
        f"{pitches} mm; slice order from the affine in {ordered}, taken as base first in "
        f"{len(shapes) - ordered}",
    ]


def _counted(every: Sequence[Problem]) -> str:
    counts = Counter(p.done for p in every)
    return "problems: " + (", ".join(f"{counts[d]} {d}" for d in DONE if counts[d]) or "none found")


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(Counter(names).items()))


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}-{high:.4g}"
