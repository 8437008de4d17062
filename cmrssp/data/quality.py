"""The data report: what a stored data set looks like, and everything that is odd about it."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cmrssp.data import copies
from cmrssp.data.store import Store
from cmrssp.data.subject import DONE, NOT_MEASURED, USED, Problem

SQUARES_MM = (160.0, 200.0)  # sides of the squares in which whole hearts are looked for
CROP_MM = 320.0  # what the network sees at the paper's settings


def problems(store: Store, found: Sequence[Problem]) -> list[Problem]:
    """All problems, worst first: of the files (`found`), of the stored subjects, and between them."""
    records = [*store.cines, *(store.labels or ())]
    every = [*found, *store.left_out, *(p for record in records for p in record.problems)]
    every += copies.problems(store)
    for subject, record in zip(store.subjects, store.labels or (), strict=False):
        if (reach := record.reach_mm) and reach > SQUARES_MM[-1] / 2:
            where = f"{'beyond' if reach > CROP_MM / 2 else 'near the edge of'} the {CROP_MM:.0f} mm crop"
            what = f"the labelled heart reaches {reach:.0f} mm from the crop centre, {where} of the paper"
            every.append(Problem(subject.key, subject.cine.name, what, USED))
    return sorted(every, key=lambda p: (DONE.index(p.done), p.subject == "", p.subject, p.file, p.what))


def summary(store: Store, found: Sequence[Problem]) -> str:
    """What there is, its sizes, how much is odd; then what is odd about no single subject, and which cines
    cannot be measured.
    """
    every = problems(store, found)
    more = "; python -m cmrssp.data lists them" if every else ""
    lines = [*_overview(store), _counted(every) + more]
    lines += [str(p) for p in every if not p.subject]
    if wrong := [p for p in every if p.done == NOT_MEASURED]:
        number = len({p.subject for p in wrong})
        lines.append(f"cines whose volumes would be wrong: {number}, the first is {wrong[0]}")
    return "\n".join(lines)


def report(store: Store, found: Sequence[Problem]) -> str:
    """What there is, its sizes, labels and crop centres, and all problems, worst first."""
    every, lines = problems(store, found), _overview(store)
    labelled = [record for record in store.labels if record.frames]
    slices = sum(len(record.frames) * record.shape[1] for record in labelled)
    ed, es = (sum(phase in record.phases for record in labelled) for phase in ("ED", "ES"))
    lines.append(f"labels: {len(labelled)} subjects, {slices} slices; ED of {ed}, ES of {es}")
    if labelled:
        middle, far = np.percentile([record.distance_mm for record in labelled], (50, 95))
        whole = {side: sum(record.reach_mm <= side / 2 for record in labelled) for side in SQUARES_MM}
        within = ", ".join(f"{n} of {len(labelled)} within {side:.0f} mm" for side, n in whole.items())
        distance = f"{middle:.0f} mm (median), {far:.0f} mm (95th percentile) from the labelled heart's"
        lines.append(f"crop centre (found without labels): {distance}; whole hearts around it: {within}")
    return "\n".join([*lines, _counted(every), *(f"  {problem}" for problem in every)])


def _overview(store: Store) -> list[str]:
    if not store.subjects:
        return ["cines: none"]
    shapes, geometries = [r.shape for r in store.cines], [r.geometry for r in store.cines]
    sets = _counts(s.dataset for s in store.subjects)
    vendors = _counts(s.vendor or "unknown" for s in store.subjects)
    frames, slices = sum(t for t, *_ in shapes), sum(t * z for t, z, *_ in shapes)
    sizes = [_span(lengths) for lengths in zip(*shapes, strict=True)]
    pixels = _span([spacing for g in geometries for spacing in g.spacing_mm])
    known = sum(g.order_known for g in geometries)
    order = f"slice order from the affine in {known}, taken as base first in {len(shapes) - known}"
    return [
        f"cines: {len(shapes)} subjects ({sets}; vendors: {vendors}), {frames} frames, {slices} slices",
        f"sizes: {sizes[2]} x {sizes[3]} px of {pixels} mm; {sizes[1]} slices, {sizes[0]} frames; "
        f"pitch {_span([g.slice_pitch_mm for g in geometries])} mm; {order}",
    ]


def _counted(every: Sequence[Problem]) -> str:
    counts = Counter(p.done for p in every)
    return "problems: " + (", ".join(f"{counts[d]} {d}" for d in DONE if counts[d]) or "none found")


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(Counter(names).items()))


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}-{high}"
