"""Pretrain an encoder, or a whole U-Net, without labels:  python train_ssp.py --method mim --data DIR"""

from collections.abc import Sequence

from cmrssp import data, flags, health, memory, report, training
from cmrssp.data import check, splits, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.device import prepare_torch, resolve_amp, resolve_device
from cmrssp.errors import UserError
from cmrssp.run import Run
from cmrssp.ssp import METHODS
from cmrssp.ssp.method import Method


def parse(argv: Sequence[str] | None):
    """In two stages: --method decides which flags and which defaults there are."""
    first = flags.Parser(prog="train_ssp.py", description=__doc__, add_help=False)
    for parser in (first, full := flags.Parser(prog="train_ssp.py", description=__doc__)):
        parser.add_argument(
            "--method",
            choices=sorted(METHODS),
            required=parser is full,
            help="the pretraining method; with it, --help shows its own flags and defaults",
        )
    known, _ = first.parse_known_args(argv)
    flags.add_data(full, default=data.PHANTOM)
    flags.add_network(full)
    flags.add_optimisation(full)
    flags.add_run(full, training=True)
    if known.method:
        method = METHODS[known.method]
        method.add_flags(full.add_argument_group(known.method))
        flags.set_defaults(full, argv, method)
    args, unknown = full.parse_known_args(argv)
    if unknown:
        full.error(flags.explain_unknown(unknown, args.method, METHODS))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    method_class = METHODS[args.method]
    paths = getattr(args, "data", [data.PHANTOM])
    label_suffix = getattr(args, "label_suffix", data.LABEL_SUFFIX)
    data.announce(paths)
    device = resolve_device(args.device)
    prepare_torch(args.seed, args.deterministic)
    method = method_class.from_flags(args)
    settings = flags.settings(args, resolve_amp(args.amp, device))

    subjects, problems = data.find(paths, args.cache, label_suffix)
    split = splits.choose(
        subjects, split_file=args.split_file, split_seed=args.split_seed, keep_overlap=args.keep_overlap
    )
    cines = store.build(splits.named(subjects, split), args.cache, labels=False, skip_broken=args.skip_broken)
    print(check.summary(cines, problems))
    split = check.without_copies(cines, splits.keep(split, cines.index))
    slices = {part: Slices(cines, split[part]) for part in ("train", "validation")}
    print(splits.describe(split) + f"; {len(slices['train'])} slices to train on, no label is read")
    if not len(slices["train"]):
        raise UserError(
            "there is no training subject; give more cines, or a --split-file with training subjects"
        )
    loaders = {
        part: Batches(cines, s, batch_size=args.batch_size, seed=args.seed, labelled=False, device=device)
        for part, s in slices.items()
        if len(s)
    }

    memory.check(method, loaders["train"], amp=settings.amp, device=device)

    run = Run.create(args.out, f"{args.method}-{data.name(paths)}")
    print(f"run folder: {run.folder}")
    run.start(
        {"kind": "pretraining", **vars(args), "data": paths, "amp": settings.amp, "device": str(device)},
        split,
    )
    config = {
        "channels": args.channels,
        "image_size": args.image_size,
        "spacing_mm": args.spacing,
        "classes": None,
        "norm": args.norm,
    }
    provenance = {
        "method": args.method,
        "data": data.absolute(paths),
        "label_suffix": label_suffix,
        "split": split,
        "split_seed": args.split_seed,
        "seed": args.seed,
        "subjects": split["train"],
        "slices": len(slices["train"]),
        "init": None,
    }

    def validate(method: Method, epoch: int) -> dict[str, float]:
        return health.check(method, loaders["validation"], epoch) if "validation" in loaders else {}

    report.views(method.to(device), loaders["train"], run.folder / "views.png")
    training.train(
        method,
        loaders["train"],
        settings,
        run,
        config=config,
        provenance=provenance,
        validate=validate,
        hint=flags.quick_hint(args, device),
    )
    report.views(method, loaders["train"], run.folder / "views.png")
    report.curves(run.records(), run.folder / "curves.png")
    print(f"done: {run.folder / 'unet.pt'}; next: python finetune.py --init {run.folder}")
    return 0


if __name__ == "__main__":
    flags.end(main)
