"""Pretrain an encoder, or a whole U-Net, without labels:  python train_ssp.py --method mim --data DIR"""

import shlex
from collections.abc import Sequence

from cmrssp.cli import entry, flags
from cmrssp.cli.launch import find_data, launch, set_up
from cmrssp.data import dataset, splits
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.ssp import METHODS, health
from cmrssp.ssp.method import Method


def parse(argv: Sequence[str] | None):
    """(args, run that goes on or None). --method decides the other flags and the defaults."""
    parser = entry.Parser(prog="train_ssp.py", description=__doc__)
    purposes = "; ".join(f"{name}: {method.purpose}" for name, method in METHODS.items())
    what = f"{purposes}. With it, --help shows the method's own flags and defaults"
    parser.add_argument("--method", choices=sorted(METHODS), help=what)
    flags.add_training(parser, data=dataset.PHANTOM)
    run = flags.resumed(argv, "pretraining")
    method = METHODS.get(flags.peek(argv, "--method") or (run.args["method"] if run else ""))
    if method:
        method.add_flags(parser.add_argument_group(method.name))
        flags.set_defaults(parser, argv, method, run)
    args, unknown = parser.parse_known_args(argv)
    if not method:
        names = ", ".join(sorted(METHODS))
        parser.error(
            f"--method is required: motion if the cines have many frames (recommended); all: {names}"
        )
    if unknown:
        parser.error(explain_unknown(unknown, args.method))
    flags.refuse_changes(parser, args, argv, run)
    return args, run


def explain_unknown(words: Sequence[str], method: str) -> str:
    """For flags that `method` does not have: whose they are."""
    for name, other in METHODS.items():
        parser = entry.Parser(add_help=False)
        other.add_flags(parser)
        for word in words:
            if word.split("=")[0] in parser._option_string_actions:
                return f"{word} belongs to --method {name}, and --method is {method}"
    return f"unrecognized arguments: {' '.join(words)}"


def main(argv: Sequence[str] | None = None) -> int:
    args, run = parse(argv)
    if run and run.finished:
        print(f"already finished: {run.folder / 'unet.pt'}")
        return 0
    method, device = set_up(args, METHODS[args.method], known={})
    prepared = find_data(args, run)
    cines, split = prepared.cines, prepared.split
    used = {part: method.usable(cines, split[part]) for part in ("train", "validation")}
    if split["train"] and not used["train"]:
        raise UserError(
            f"--method {args.method} needs cines with more than one frame, got none among the "
            f"{len(split['train'])} training subjects, the first is {split['train'][0]}; use another --method"
        )
    options = {"batch_size": args.batch_size, "seed": args.seed, "device": device}
    options |= {"labelled": False, "motion": method.needs_motion}
    parts = [part for part, keys in used.items() if keys or part == "train"]
    batches = {part: Batches(cines, Slices(cines, used[part]), **options) for part in parts}
    print(f"{splits.describe(split)}; {len(batches['train'].slices)} slices to train on, no label is read")
    if "validation" not in batches:
        print("no validation subject: there will be no validation loss")

    def validate(method: Method, epoch: int) -> dict[str, float]:
        return health.check(method, batches["validation"], epoch) if "validation" in batches else {}

    name = f"{args.method}-{dataset.name(args.data)}"
    run = launch(args, run, method, batches["train"], prepared, validate, name, subjects=used["train"])
    if run:
        then = f"python finetune.py --init {shlex.quote(str(run.folder))}"
        then += " --data FOLDER_WITH_LABELS" * (not any(subject.labels for subject in cines.subjects))
        print(f"done: {run.folder / 'unet.pt'}; next: {then}")
    return 0


if __name__ == "__main__":
    entry.end(main)
