"""Build the slice store, labels included, and report what was found: python -m cmrssp.data PATH ..."""

from collections.abc import Sequence
from pathlib import Path

from cmrssp.cli import entry, flags
from cmrssp.data import dataset, quality, store
from cmrssp.data.subject import LEFT_OUT
from cmrssp.errors import UserError
from cmrssp.runs import figures

PROG = "python -m cmrssp.data"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if a subject, a file or a table row was left out, else 0. Raises UserError and OSError."""
    parser = entry.Parser(prog=PROG, description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=f"folders, or '{dataset.PHANTOM}'")
    flags.add_reading(parser)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="a slice of each subject and its crop")
    args = parser.parse_args(argv)
    if args.figure and not args.figure.absolute().parent.is_dir():
        raise UserError(f"--figure {args.figure}: there is no folder {args.figure.absolute().parent}")
    _, label_suffix = dataset.source(vars(args))
    subjects, problems = dataset.find(args.paths, args.cache, label_suffix)
    cines = store.build(subjects, args.cache, labels=True, skip_broken=True, quiet=True)
    print(quality.report(cines, problems))
    if args.figure and cines.subjects:
        figures.centre_sheet(cines, args.figure, quality.CROP_MM)
        print(f"written: {args.figure}")
    elif args.figure:
        print("no figure: there is no subject to show")
    return int(any(problem.done == LEFT_OUT for problem in quality.problems(cines, problems)))


if __name__ == "__main__":
    entry.end(main, PROG)
