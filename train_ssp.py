"""Pretrain an encoder, or a whole U-Net, without labels:  python train_ssp.py --method mim --data DIR"""

from collections.abc import Sequence

from cmrssp.cli import entry, flags, resuming
from cmrssp.cli.launch import launch
from cmrssp.data import dataset, splits
from cmrssp.data.batches import Batches, Slices
from cmrssp.data.prepare import prepare
from cmrssp.errors import UserError
from cmrssp.hardware.device import prepare_torch, resolve_device
from cmrssp.runs import resume
from cmrssp.ssp import METHODS, health
from cmrssp.ssp.method import Method


def parse(argv: Sequence[str] | None):
    """(args, run that goes on or None), in two stages: --method decides the other flags and the defaults."""
    first = entry.Parser(prog="train_ssp.py", add_help=False)
    full = entry.Parser(prog="train_ssp.py", description=__doc__)
    purposes = "; ".join(f"{name}: {method.purpose}" for name, method in METHODS.items())
    for parser in (first, full):
        what = f"{purposes}. With it, --help shows the method's own flags and defaults"
        parser.add_argument("--method", choices=sorted(METHODS), help=what)
    known, _ = first.parse_known_args(argv)
    interrupted = resume.find(flags.peek(argv, "--resume"), flags.peek(argv, "--out"), "pretraining")
    if interrupted:
        known.method = known.method or interrupted.args["method"]
    flags.add_data(full, default=dataset.PHANTOM)
    flags.add_network(full)
    flags.add_optimisation(full)
    flags.add_run(full, training=True)
    flags.add_speed(full)
    if known.method:
        method = METHODS[known.method]
        method.add_flags(full.add_argument_group(known.method))
        flags.set_defaults(full, argv, method)
    if interrupted:
        resuming.set_defaults(full, interrupted)
    args, unknown = full.parse_known_args(argv)
    if args.method is None:
        names = ", ".join(sorted(METHODS))
        full.error(f"--method is required: motion if the cines have many frames (recommended); all: {names}")
    if unknown:
        full.error(explain_unknown(unknown, args.method))
    if interrupted:
        resuming.refuse_changes(full, args, argv, interrupted)
    return args, interrupted


def explain_unknown(words: Sequence[str], method: str) -> str:
    """For flags that `method` does not have: whose they are."""
    for word in words:
        for name, other in METHODS.items():
            parser = entry.Parser(add_help=False)
            other.add_flags(parser)
            if word.split("=")[0] in parser._option_string_actions:
                return f"{word} belongs to --method {name}, and --method is {method}"
    return f"unrecognized arguments: {' '.join(words)}"


def main(argv: Sequence[str] | None = None) -> int:
    args, interrupted = parse(argv)
    if interrupted and interrupted.finished:
        print(f"already finished: {interrupted.folder / 'unet.pt'}")
        return 0
    args.data, args.label_suffix = dataset.source(vars(args))
    dataset.announce(args.data)
    device = resolve_device(args.device)
    prepare_torch(args.seed, args.deterministic)
    method = flags.build(METHODS[args.method], args)
    settings = flags.settings(args, device)
    inherited, split_file = (interrupted.split, None) if interrupted else (None, args.split_file)
    prepared = prepare(
        args.data, args.cache, needed="train", label_suffix=args.label_suffix,
        split_file=split_file, split_seed=args.split_seed, inherited=inherited,
        keep_overlap=args.keep_overlap, skip_broken=args.skip_broken,
    )  # fmt: skip
    cines, split = prepared.cines, prepared.split
    used = {part: method.usable(cines, split[part]) for part in ("train", "validation")}
    if split["train"] and not used["train"]:
        raise UserError(
            f"--method {args.method} needs cines with more than one frame, got none among the "
            f"{len(split['train'])} training subjects, the first is {split['train'][0]}; use another --method"
        )
    slices = {part: Slices(cines, keys) for part, keys in used.items()}
    print(splits.describe(split) + f"; {len(slices['train'])} slices to train on, no label is read")
    if not len(slices["validation"]):
        print("no validation subject: there will be no validation loss")
    options = {"batch_size": args.batch_size, "seed": args.seed, "device": device}
    options |= {"labelled": False, "motion": method.needs_motion}
    used_slices = {part: each for part, each in slices.items() if len(each) or part == "train"}
    batches = {part: Batches(cines, each, **options) for part, each in used_slices.items()}

    def validate(method: Method, epoch: int) -> dict[str, float]:
        return health.check(method, batches["validation"], epoch) if "validation" in batches else {}

    run = launch(
        args, method, batches["train"], settings, prepared, validate,
        kind="pretraining", name=f"{args.method}-{dataset.name(args.data)}",
        interrupted=interrupted, provenance={"subjects": used["train"]},
    )  # fmt: skip
    if run:
        print(f"done: {run.folder / 'unet.pt'}; next: python finetune.py --init {run.folder}")
    return 0


if __name__ == "__main__":
    entry.end(main)
