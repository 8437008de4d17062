"""python -m cmrssp.data PATH ...: build the slice store, labels included, and report what was found."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from cmrssp import data, flags
from cmrssp.data import store
from cmrssp.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(prog="python -m cmrssp.data", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help=f"as for --data: folders, or '{data.PHANTOM}'"
    )
    flags.add_cache(parser)
    args: argparse.Namespace = parser.parse_args(argv)
    try:
        subjects = data.find(args.paths, args.cache)
        cines = store.build(subjects, args.cache, labels=True, skip_broken=True)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    shapes = [record.shape for record in cines.cines]
    labelled = [record for record in cines.labels if record.frames]
    vendors = Counter(s.vendor or "unknown" for s in cines.subjects)
    slices = sum(t * z for t, z, _, _ in shapes)
    labelled_slices = sum(len(r.frames) * r.shape[1] for r in labelled)
    print(f"{len(shapes)} subjects, {slices} slices")
    print(f"{len(labelled)} subjects with labels, {labelled_slices} labelled slices")
    print(f"vendors: {', '.join(f'{name} {count}' for name, count in sorted(vendors.items()))}")
    sizes = (
        f"{name} {span(s[i] for s in shapes)}"
        for i, name in enumerate(("frames", "slices", "rows", "columns"))
    )
    print(", ".join(sizes))
    geometries = [record.geometry for record in cines.cines]
    pixels, pitch = span(g.spacing_mm[0] for g in geometries), span(g.slice_pitch_mm for g in geometries)
    print(f"pixels {pixels} mm, slice pitch {pitch} mm")
    for subject, record in zip(cines.subjects, cines.labels, strict=True):
        for problem in record.problems:
            print(f"{subject.key}: {problem}; the labels were believed")
    return 0 if len(cines.subjects) == len(subjects) else 1


def span(values) -> str:
    values = sorted(values)
    return f"{values[0]:.4g}" if values[0] == values[-1] else f"{values[0]:.4g}-{values[-1]:.4g}"


if __name__ == "__main__":
    sys.exit(main())
