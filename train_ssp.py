"""Pretrain an encoder, or a whole U-Net, without labels:  python train_ssp.py --method mim --data DIR"""

from collections.abc import Sequence

from cmrssp import training
from cmrssp.cli import entry, flags
from cmrssp.data import dataset, quality, splits, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.hardware import benchmark, distributed, memory
from cmrssp.hardware.device import prepare_torch, resolve_device
from cmrssp.runs import figures, resume
from cmrssp.ssp import METHODS, health
from cmrssp.ssp.method import Method
from cmrssp.unet import recompute_activations


def parse(argv: Sequence[str] | None):
    """(args, run that goes on or None), in two stages: --method decides which flags and which defaults there
    are.
    """
    first = entry.Parser(prog="train_ssp.py", add_help=False)
    full = entry.Parser(prog="train_ssp.py", description=__doc__)
    for parser in (first, full):
        parser.add_argument(
            "--method",
            choices=sorted(METHODS),
            help=f"{flags.purposes(METHODS)}. With it, --help shows the method's own flags and defaults",
        )
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
        resume.set_defaults(full, interrupted)
    args, unknown = full.parse_known_args(argv)
    if args.method is None:
        full.error(f"--method is required; {flags.purposes(METHODS)}")
    if unknown:
        full.error(explain_unknown(unknown, args.method, METHODS))
    if interrupted:
        resume.refuse_changes(full, args, argv, interrupted)
    return args, interrupted


def explain_unknown(words: Sequence[str], method: str, methods: dict[str, type[Method]]) -> str:
    """For flags that `method` does not have: whose they are."""
    for word in words:
        for name, other in methods.items():
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
    method_class = METHODS[args.method]
    paths, label_suffix = dataset.source(vars(args))
    dataset.announce(paths)
    device = resolve_device(args.device)
    prepare_torch(args.seed, args.deterministic)
    method = flags.build(method_class, args)
    if args.grad_checkpoint:
        recompute_activations(method)
    settings = flags.settings(args, device)

    with distributed.main_first():
        subjects, problems = dataset.find(paths, args.cache, label_suffix)
    split = splits.choose(
        subjects,
        split_file=None if interrupted else args.split_file,
        split_seed=args.split_seed,
        inherited=interrupted.split if interrupted else None,
        keep_overlap=args.keep_overlap,
    )
    with distributed.main_first():
        cines = store.build(
            splits.named(subjects, split), args.cache, labels=False, skip_broken=args.skip_broken
        )
    print(quality.summary(cines, problems))
    split = quality.without_copies(cines, splits.keep(split, cines.index))
    slices = {part: Slices(cines, split[part]) for part in ("train", "validation")}
    print(splits.describe(split) + f"; {len(slices['train'])} slices to train on, no label is read")
    if not len(slices["train"]):
        raise UserError(
            "there is no training subject; give more cines, or a --split-file with training subjects"
        )
    if not len(slices["validation"]):
        print("no validation subject: there will be no validation loss")
    loaders = {
        part: Batches(cines, s, batch_size=args.batch_size, seed=args.seed, labelled=False, device=device)
        for part, s in slices.items()
        if len(s)
    }

    memory.check(method, loaders["train"], amp=settings.amp, device=device, device_cache=args.device_cache)
    if args.benchmark:
        benchmark.run(method, loaders["train"], settings, args.benchmark)
        return 0

    images = quality.digests(cines, cines.index)
    run, state = resume.open_run(interrupted, args, f"{args.method}-{dataset.name(paths)}", images, {})
    if not state:
        run.start(
            {
                "kind": "pretraining",
                **vars(args),
                "data": dataset.absolute(paths),
                "label_suffix": label_suffix,
                "device": str(device),
            },
            split,
        )
    provenance = {
        "method": args.method,
        "data": dataset.absolute(paths),
        "label_suffix": label_suffix,
        "split": split,
        "split_seed": args.split_seed,
        "seed": args.seed,
        "subjects": split["train"],
        "digests": images,
        "slices": len(slices["train"]),
        "recipe": flags.recipe(args, method_class, settings, loaders["train"].batch_size),
        "init": None,
    }

    def validate(method: Method, epoch: int) -> dict[str, float]:
        return health.check(method, loaders["validation"], epoch) if "validation" in loaders else {}

    def draw() -> None:
        figures.views(method, loaders["train"], run.folder / "views.png")
        figures.curves(run.records(), run.folder / "curves.png")

    if not state and distributed.is_main():
        figures.views(method.to(device), loaders["train"], run.folder / "views.png")
    training.train(
        method,
        loaders["train"],
        settings,
        run,
        config=method.config(),
        provenance=provenance,
        validate=validate,
        draw=draw,
        hint=flags.quick_hint(args, device),
        state=state,
    )
    print(f"done: {run.folder / 'unet.pt'}; next: python finetune.py --init {run.folder}")
    return 0


if __name__ == "__main__":
    entry.end(main)
