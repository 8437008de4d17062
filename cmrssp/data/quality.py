"""The data report: what a stored data set looks like, and everything that is odd about it."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cmrssp.data import copies
from cmrssp.data.labels import Heart
from cmrssp.data.store import CineRecord, Store
from cmrssp.data.subject import DONE, LEFT_OUT, NOT_MEASURED, USED, Problem, Subject

SQUARES_MM = (160.0, 200.0)  # sides of the squares in which whole hearts are looked for
CROP_MM = 320.0  # what the network sees at the paper's settings


def problems(store: Store, found: Sequence[Problem]) -> list[Problem]:
    """All problems, worst first: of the files (`found`), of the stored subjects, and between them."""
    records = [*store.cines, *(store.labels or ())]
    every = [*found, *store.left_out, *(p for record in records for p in record.problems)]
    every += copies.problems(store) + _far_hearts(store)
    return sorted(every, key=lambda p: (DONE.index(p.done), p.subject == "", p.subject, p.file, p.what))


def heart_distances(store: Store) -> np.ndarray:
    """(N, 2) in mm, one row per labelled subject: the distance from the crop centre to the labels' centroid,
    and how far the labels reach from the crop centre along rows or columns.
    """
    found = []
    for _, cine, heart in _hearts(store):
        spacing, centre = np.array(cine.geometry.spacing_mm), np.array(cine.centre)
        box = np.array(heart.box).reshape(2, 2)  # rows, columns
        reach = np.abs(box - centre[:, None]).max(axis=1) * spacing
        found.append((np.hypot(*(heart.centre - centre) * spacing), reach.max()))
    return np.array(found).reshape(-1, 2)


def _hearts(store: Store) -> list[tuple[Subject, CineRecord, Heart]]:
    each = zip(store.subjects, store.cines, store.labels or (), strict=bool(store.labels))
    return [(subject, cine, labels.heart) for subject, cine, labels in each if labels.heart]


def _far_hearts(store: Store) -> list[Problem]:
    odd = []
    for (subject, *_), (_, reach) in zip(_hearts(store), heart_distances(store), strict=True):
        if reach > SQUARES_MM[-1] / 2:
            where = f"{'beyond' if reach > CROP_MM / 2 else 'near the edge of'} the {CROP_MM:.0f} mm crop"
            what = f"the labelled heart reaches {reach:.0f} mm from the crop centre, {where} of the paper"
            odd.append(Problem(subject.key, subject.cine.name, what, USED))
    return odd


def summary(store: Store, found: Sequence[Problem]) -> str:
    """What there is, its sizes, how much is odd; then files left out and cines that cannot be measured."""
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
    """What there is, its sizes, labels and crop centres, and all problems, worst first."""
    every = problems(store, found)
    lines = ["cines: none"]
    if store.subjects:
        labelled = [record for record in store.labels if record.frames]
        slices = sum(len(r.frames) * r.shape[1] for r in labelled)
        ed, es = (sum(phase in record.phases for record in labelled) for phase in ("ED", "ES"))
        lines = [
            *_overview(store),
            f"labels: {len(labelled)} subjects, {slices} slices; ED of {ed}, ES of {es}",
        ]
    if len(measured := heart_distances(store)):
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
    known = sum(g.order_known for g in geometries)
    order = f"slice order from the affine in {known}, taken as base first in {len(shapes) - known}"
    return [
        f"cines: {len(shapes)} subjects ({sets}; vendors: {vendors}), {frames} frames, {slices} slices",
        f"sizes: {sizes[2]} x {sizes[3]} px of {pixels} mm; {sizes[1]} slices, {sizes[0]} frames; "
        f"pitch {pitches} mm; {order}",
    ]


def _counted(every: Sequence[Problem]) -> str:
    counts = Counter(p.done for p in every)
    return "problems: " + (", ".join(f"{counts[d]} {d}" for d in DONE if counts[d]) or "none found")


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(Counter(names).items()))


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}-{high:.4g}"
