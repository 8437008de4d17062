"""Train a segmentation network on few labelled cines, from a pretrained checkpoint or from scratch:
python finetune.py --init runs/mim-phantom --n-subjects 15"""

from collections.abc import Collection, Sequence

from cmrssp.cli import entry, flags, resuming
from cmrssp.cli.argument_types import folder, vendor_names
from cmrssp.cli.launch import launch
from cmrssp.data import dataset, splits, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.data.prepare import prepare
from cmrssp.errors import UserError
from cmrssp.evaluation import label_maps
from cmrssp.evaluation.validation import mean_dice, undetected
from cmrssp.hardware import distributed
from cmrssp.hardware.device import prepare_torch, resolve_device
from cmrssp.runs import resume
from cmrssp.segmentation import Segmentation
from cmrssp.ssp import METHODS
from cmrssp.ssp.flag_types import fraction, positive
from cmrssp.ssp.method import Method
from cmrssp.weights import checkpoints
from cmrssp.weights.transfer import PARTS, transfer

_ENOUGH_STEPS = 1800  # of --quick, at least: 900 on 5 synthetic subjects missed the myocardium


def parse(argv: Sequence[str] | None):
    """(args, checkpoint or None, run that goes on or None). Data, split and network come from --init unless
    typed; of a run that goes on, everything comes from it.
    """
    parser = entry.Parser(prog="finetune.py", description=__doc__)
    flags.add_data(parser, default=f"what --init was pretrained on, else {dataset.PHANTOM}")
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--init",
        metavar="PATH",
        help="unet.pt, last.pt or a run folder; without it from scratch with the baseline's --lr. With it, "
        "--lr and --transfer have the defaults of its method: "
        + ", ".join(f"{n} {m.finetuning['lr']} {m.finetuning['transfer']}" for n, m in METHODS.items()),
    )
    group.add_argument(
        "--transfer",
        choices=("all", "encoder"),
        default="all",
        help="which parts of the --init checkpoint to take: all that it has, or the encoder alone",
    )
    group.add_argument(
        "--n-subjects",
        type=int,
        metavar="N",
        help="labelled training subjects, drawn by --seed, nested (default: all)",
    )
    group.add_argument(
        "--labelled",
        type=folder,
        metavar="FILE",
        help="use true labels of the training subjects that this split file names alone",
    )
    group.add_argument(
        "--phases",
        choices=("ed", "es", "both"),
        default="both",
        help="labelled frames to train on: end diastole, end systole, or every labelled frame (paper, table "
        "2)",
    )
    group.add_argument(
        "--vendors",
        type=vendor_names,
        nargs="+",
        metavar="NAME",
        help="train on the subjects of these vendors alone: Siemens, Philips, GE, Canon, or the letters A to "
        "D that M&Ms gives them, also as A+B (paper, table 3; default: all)",
    )
    group.add_argument(
        "--predicted",
        type=folder,
        metavar="DIR",
        help="self-training: also train on label maps that evaluate.py --predict wrote to DIR, of training "
        "subjects without labels in use; frames that its flags doubt are left out",
    )
    group.add_argument(
        "--predicted-weight",
        type=positive(float),
        default=1.0,
        metavar="WEIGHT",
        help="of a slice with predicted labels in the loss; one with true labels counts 1",
    )
    group.add_argument(
        "--predicted-share",
        type=fraction,
        metavar="PART",
        help="of each batch that are slices with predicted labels (default: every slice once an epoch)",
    )
    Segmentation.add_flags(group)
    flags.add_network(parser)
    flags.add_optimisation(parser)
    flags.add_run(parser, training=True)
    flags.add_speed(parser)
    interrupted = resume.find(flags.peek(argv, "--resume"), flags.peek(argv, "--out"), "fine-tuning")
    init = None if interrupted else flags.peek(argv, "--init")
    checkpoint = checkpoints.load(init) if init else None
    flags.set_defaults(parser, argv, Segmentation)
    if checkpoint:
        start = METHODS.get(checkpoint.provenance.method, Method)  # it may be fine-tuned already
        parser.set_defaults(**start.finetuning, **flags.from_checkpoint(checkpoint))
    if interrupted:
        resuming.set_defaults(parser, interrupted)
    args = parser.parse_args(argv)
    args.vendors = flags.flat(args.vendors)
    for flag in ("--predicted-weight", "--predicted-share"):
        if flags.typed(argv, flag) and not args.predicted:
            parser.error(f"{flag} needs --predicted")
    if interrupted:
        resuming.refuse_changes(parser, args, argv, interrupted)
    return args, checkpoint, interrupted


def main(argv: Sequence[str] | None = None) -> int:
    args, checkpoint, interrupted = parse(argv)
    if interrupted and interrupted.finished:
        print(f"already finished: {interrupted.folder / 'unet.pt'}")
        return 0
    maps = label_maps.read(args.predicted) if args.predicted else None
    sources = [*([checkpoint] if checkpoint else []), *(maps.teachers if maps else [])]
    inherited = sources[0].provenance if sources else None
    known = {"data": inherited.data, "label_suffix": inherited.label_suffix} if inherited else {}
    args.data, args.label_suffix = dataset.source({**known, **vars(args)})
    dataset.announce(args.data)
    device = resolve_device(args.device)
    prepare_torch(args.seed, args.deterministic)
    method = flags.build(Segmentation, args)
    transferred = {}
    if checkpoint:
        parts = ("encoder",) if args.transfer == "encoder" else PARTS
        transferred = transfer(checkpoint, method.unet, parts)
        for part, what in transferred.items():
            print(f"{part}: {what}")
        if inherited.method == "mim" and args.transfer == "all":
            print("note: MIM's decoder can hinder; try --transfer encoder --lr 0.01 (see README)")
    if args.freeze_encoder:
        epochs = min(args.freeze_encoder, args.epochs)
        note = "" if checkpoint else ", with random weights: there is no --init"
        print(f"encoder: frozen for the first {epochs:g} of {args.epochs} epochs{note}")

    own_split = inherited and not interrupted and not flags.typed(argv, "--split-seed")
    if own_split:
        args.split_seed = inherited.split_seed
    prepared = prepare(
        args.data,
        args.cache,
        needed="train",
        label_suffix=args.label_suffix,
        labelled=("train", "validation"),
        split_file=None if interrupted else args.split_file,
        split_seed=args.split_seed,
        inherited=interrupted.split if interrupted else inherited.split if own_split else None,
        keep_overlap=args.keep_overlap,
        skip_broken=args.skip_broken,
        checkpoints=sources,
        held_out=("validation", "test"),
    )
    cines, split = prepared.cines, prepared.split
    labelled = candidates(cines, split["train"], args)
    chosen = splits.subset(labelled, len(labelled) if args.n_subjects is None else args.n_subjects, args.seed)
    slices = Slices(cines, chosen, phases=args.phases)
    print(f"{splits.describe(split)}; {len(chosen)} labelled subjects to train on")
    counted = (f"{n} in {subset}" for subset, n in sizes(cines, labelled, args).items())
    print(f"labelled slices: {len(slices)} to train on; {', '.join(counted)}")
    predicted: dict[str, list[int]] = {}
    if maps:
        others = of_vendors(cines, [key for key in split["train"] if key not in chosen], args.vendors)
        with distributed.main_first():
            cines, predicted = maps.attach(cines, others, args.cache, skip_broken=args.skip_broken)
        slices = Slices(cines, chosen, phases=args.phases, predicted=predicted)
        count = len(slices) - slices.first_predicted
        print(f"predicted labels: {len(predicted)} of {len(others)} other subjects, {count} slices")
    batches = Batches(
        cines,
        slices,
        batch_size=args.batch_size,
        seed=args.seed,
        labelled=True,
        device=device,
        predicted_weight=args.predicted_weight,
        predicted_share=args.predicted_share,
    )
    enough = -(-_ENOUGH_STEPS // len(batches))
    if args.quick and not interrupted and not flags.typed(argv, "--epochs"):
        args.epochs = max(args.epochs, enough)
    settings = flags.settings(args, device)

    held_out = [key for key in split["validation"] if cines.labels[cines.index[key]].frames]
    if not held_out:
        print("no validation subject has labels: there will be no validation Dice")
    elif unlabelled := sorted(set(split["validation"]) - set(held_out)):
        print(f"validation subjects without labels, left out of the Dice: {', '.join(unlabelled)}")

    figures: dict[str, float] = {}

    def validate(method: Segmentation, epoch: int) -> dict[str, float]:
        if held_out:
            figures.update(mean_dice(method, cines, held_out, device))
        return figures

    start = checkpoint.provenance.method if checkpoint else "scratch"
    subjects = f"n{len(chosen)}" + "-self-trained" * bool(maps)
    run = launch(
        args,
        method,
        batches,
        settings,
        prepared,
        validate,
        kind="fine-tuning",
        name=f"finetune-{start}-{dataset.name(args.data)}-{subjects}-seed{args.seed}",
        interrupted=interrupted,
        transferred=transferred,
        provenance={
            "subjects": chosen,
            "labels": cines.digests([*chosen, *predicted, *held_out], labels=True),
            "all_subjects": len(chosen) == len(labelled)
            and not args.labelled
            and not splits.published_subset(split),
            "phases": args.phases,
            "vendors": args.vendors,
            "predicted": list(predicted),
            "teachers": [teacher.provenance for teacher in maps.teachers] if maps else [],
            "init": checkpoint.provenance if checkpoint else None,
        },
    )
    if run:
        if lost := undetected(figures):
            print(
                f"warning: a Dice of 0 for {' and '.join(lost)} on the validation subjects: the training was "
                f"too short or had too few labels; try --epochs {max(4 * args.epochs, enough)}"
            )
        print(
            f"done: {run.folder / 'unet.pt'}; next: python evaluate.py --split test --checkpoint {run.folder}"
        )
    return 0


def candidates(cines: store.Store, keys: Sequence[str], args) -> list[str]:
    """The training subjects with labels of the wanted phases, of the wanted vendors."""
    named = splits.read(args.labelled)["train"] if args.labelled else keys
    labelled = [k for k in keys if k in named and cines.labels[cines.index[k]].frames_of(args.phases)]
    if not labelled:
        raise UserError(
            f"none of the {len(keys)} training subjects has a labelled frame (--phases {args.phases}); "
            "fine-tuning needs label files beside the cines"
        )
    wanted = of_vendors(cines, labelled, args.vendors)
    if not wanted:
        vendors = {cines.subjects[cines.index[key]].vendor or "unknown" for key in labelled}
        raise UserError(
            f"--vendors {' '.join(args.vendors)}: none of the {len(labelled)} labelled training subjects; "
            f"their vendors are {', '.join(sorted(vendors))}"
        )
    return wanted


def of_vendors(cines: store.Store, keys: Sequence[str], vendors: Collection[str] | None) -> list[str]:
    return [key for key in keys if vendors is None or cines.subjects[cines.index[key]].vendor in vendors]


def sizes(cines: store.Store, labelled: Sequence[str], args) -> dict[str, int]:
    """{subset: its labelled slices}, of all subjects and of the paper's subsets of this seed."""
    subsets = {f"all {len(labelled)} subjects": list(labelled)}
    subsets |= {str(n): splits.subset(labelled, n, args.seed) for n in (50, 25, 15, 10) if n < len(labelled)}
    return {name: len(Slices(cines, keys, phases=args.phases)) for name, keys in subsets.items()}


if __name__ == "__main__":
    entry.end(main)
