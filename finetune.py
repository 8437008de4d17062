"""Train a segmentation network on few labelled cines, from a pretrained checkpoint or from scratch:
python finetune.py --init runs/mim-phantom --n-subjects 15"""

import shlex
from collections.abc import Collection, Sequence

from cmrssp.cli import entry, flags
from cmrssp.cli.launch import find_data, launch, set_up
from cmrssp.data import dataset, splits, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.evaluation import label_maps
from cmrssp.evaluation.validation import mean_dice, undetected
from cmrssp.files import hashed
from cmrssp.hardware import distributed
from cmrssp.segmentation import Segmentation
from cmrssp.ssp import METHODS
from cmrssp.ssp.flag_types import fraction, positive
from cmrssp.ssp.method import Method
from cmrssp.weights import checkpoints
from cmrssp.weights.transfer import PARTS, transfer

_ENOUGH_STEPS = 1800  # of --quick, at least: 900 on 5 synthetic subjects missed the myocardium


def add_flags(parser: entry.Parser) -> None:
    group = parser.add_argument_group("fine-tuning")
    add = group.add_argument
    defaults = ", ".join(f"{n} {m.finetuning['lr']} {m.finetuning['transfer']}" for n, m in METHODS.items())
    init = f"unet.pt, last.pt or a run folder (default: from scratch); sets --lr and --transfer: {defaults}"
    add("--init", metavar="PATH", help=init)
    add("--transfer", choices=("all", "encoder"), default="all", help="parts of --init to take over")
    add("--n-subjects", type=int, metavar="N", help="labelled subjects, drawn by --seed (default: all)")
    listed = "use the true labels only of those training subjects that this split file names"
    add("--labelled", type=flags.absolute_path, metavar="FILE", help=listed)
    phases = "labelled frames to train on: end diastole, end systole, or every one (paper, table 2)"
    add("--phases", choices=("ed", "es", "both"), default="both", help=phases)
    vendors = "train on these vendors alone: Siemens, Philips, GE, Canon, or M&Ms's A to D (paper, table 3)"
    add("--vendors", action=flags.VendorNames, nargs="+", metavar="NAME", help=vendors)
    maps = "self-training: train also on training subjects' label maps that evaluate.py --predict wrote here"
    steps = "without --epochs as many steps as on the true labels alone"
    add("--predicted", type=flags.absolute_path, metavar="DIR", help=f"{maps}; {steps}")
    weight = "of a slice with predicted labels in the loss; one with true labels counts 1"
    add("--predicted-weight", type=positive(float), default=1.0, metavar="WEIGHT", help=weight)
    share = "part of each batch that has predicted labels (default: none, every slice comes once an epoch)"
    add("--predicted-share", type=fraction, metavar="PART", help=share)
    Segmentation.add_flags(group)


def parse(argv: Sequence[str] | None):
    """(args, checkpoint or None, run that goes on or None). Which value wins: see `flags`."""
    parser = entry.Parser(prog="finetune.py", description=__doc__)
    add_flags(parser)
    flags.add_training(parser, data=f"what --init was pretrained on, else {dataset.PHANTOM}")
    run = flags.resumed(argv, "fine-tuning")
    init = flags.peek(argv, "--init")
    checkpoint = checkpoints.load(init) if init and not run else None
    decided = {}
    if checkpoint:
        start = METHODS.get(checkpoint.provenance.method, Method)  # it may be fine-tuned already
        decided = {**start.finetuning, **checkpoint.network}
    flags.set_defaults(parser, argv, Segmentation, run, **decided)
    args = parser.parse_args(argv)
    needed = {"--transfer": "init", "--predicted-weight": "predicted", "--predicted-share": "predicted"}
    for flag, other in needed.items():
        if flags.typed(argv, flag) and not getattr(args, other):
            parser.error(f"{flag} needs --{other}")
    if args.predicted and args.phases != "both":
        parser.error(f"--phases {args.phases}: not with --predicted, whose label maps are of all phases")
    flags.refuse_changes(parser, args, argv, run)
    return args, checkpoint, run


def main(argv: Sequence[str] | None = None) -> int:
    args, checkpoint, run = parse(argv)
    if run and run.finished:
        print(f"already finished: {run.folder / 'unet.pt'}")
        return 0
    maps = label_maps.read(args.predicted) if args.predicted else None
    sources = [*([checkpoint] if checkpoint else []), *(maps.teachers if maps else [])]
    inherited = sources[0].provenance if sources else None
    method, device = set_up(args, Segmentation, known=vars(inherited) if inherited else {})
    transferred = {}
    if checkpoint:
        transferred = transfer(checkpoint, method.unet, PARTS if args.transfer == "all" else ("encoder",))
        print("\n".join(f"{part}: {what}" for part, what in transferred.items()))
        papers = args.lr == Method.finetuning["lr"] or transferred["decoder"].startswith("transferred")
        if inherited.method in METHODS and papers:
            print("note: short trainings did better with --transfer encoder --lr 0.01 (see README)")

    own_split = {}
    if inherited and not run and not flags.typed(argv, "--split-seed"):
        args.split_seed, own_split = inherited.split_seed, {"inherited": inherited.split}
    used, held_out = ("train", "validation"), ("validation", "test")
    prepared = find_data(args, run, labelled=used, checkpoints=sources, held_out=held_out, **own_split)
    cines, split = prepared.cines, prepared.split
    labelled = candidates(cines, split["train"], args)
    chosen = splits.subset(labelled, len(labelled) if args.n_subjects is None else args.n_subjects, args.seed)
    predicted: dict[str, list[int]] = {}
    if maps:
        images = cines.digests()
        true = {images[key] for key in chosen}
        others = of_vendors(cines, [key for key in split["train"] if images[key] not in true], args.vendors)
        with distributed.main_first():
            cines, predicted = maps.attach(cines, others, args.cache, skip_broken=args.skip_broken)
        print(f"predicted labels: of {len(predicted)} of {len(others)} other training subjects")
    slices = Slices(cines, chosen, phases=args.phases, predicted=predicted)
    print(f"{splits.describe(split)}; {len(chosen)} labelled subjects to train on")
    count = slices.first_predicted
    print(f"slices to train on: {count} labelled" + f", {len(slices) - count} predicted" * bool(maps))
    mixing = {"predicted_weight": args.predicted_weight, "predicted_share": args.predicted_share}
    common = {"batch_size": args.batch_size, "seed": args.seed, "labelled": True, "device": device}
    batches = Batches(cines, slices, **common, **mixing)
    enough = -(-_ENOUGH_STEPS // len(batches))
    if not run and not flags.typed(argv, "--epochs"):
        alone = count // min(args.batch_size, count)  # steps of an epoch on the true labels alone
        args.epochs = -(-args.epochs * alone // len(batches))
        args.epochs = max(args.epochs, enough) if args.quick else args.epochs

    part = split["validation"]
    validated = [key for key in part if cines.labels[cines.index[key]].frames]
    if not validated or len(validated) < len(part):
        print(f"validation Dice: from {len(validated)} of {len(part)} subjects, the others have no labels")
    figures: dict[str, float] = {}

    def validate(method: Segmentation, epoch: int) -> dict[str, float]:
        if validated:
            figures.update(mean_dice(method, cines, validated, device))
        return figures

    start = checkpoint.provenance.method if checkpoint else "scratch"
    subjects = f"n{len(chosen)}" + "-self-trained" * bool(maps)
    name = f"finetune-{start}-{dataset.name(args.data)}-{subjects}-seed{args.seed}"
    provenance = {"subjects": chosen, "phases": args.phases, "vendors": args.vendors}
    own_list = args.labelled or splits.published_subset(split)
    provenance["all_subjects"] = len(chosen) == len(labelled) and not own_list
    labels = cines.digests([*chosen, *predicted, *validated], labels=True)
    provenance["labels"] = labels | {key: hashed(labels[key] + str(predicted[key])) for key in predicted}
    provenance["predicted"] = list(predicted)
    provenance["teachers"] = [teacher.provenance for teacher in maps.teachers] if maps else []
    provenance["predicting"] = maps.options if maps else {}
    provenance["init"] = checkpoint.provenance if checkpoint else None
    args.transferred, args.subjects = transferred, chosen  # for args.json
    run = launch(args, run, method, batches, prepared, validate, name, **provenance)
    if not run:
        return 0
    if lost := undetected(figures):
        print(
            f"warning: a Dice of 0 for {' and '.join(lost)} on the validation subjects: the training was too "
            f"short or had too few labels; try --epochs {max(4 * args.epochs, enough)}"
        )
    then = f"python evaluate.py --split test --checkpoint {shlex.quote(str(run.folder))}"
    print(f"done: {run.folder / 'unet.pt'}; next: {then}")
    return 0


def candidates(cines: store.Store, keys: Sequence[str], args) -> list[str]:
    """The training subjects `keys` of the wanted vendors with labels of the wanted phases."""
    named = splits.read(args.labelled, "--labelled")["train"] if args.labelled else keys
    lost = len(set(named) - set(keys))
    found = f"{len(named) - lost} of the {len(named)} subjects in its train list"
    if lost == len(named):
        expected = f"expected keys such as {keys[0]}"
        raise UserError(f"--labelled {args.labelled}: {found} are training subjects; {expected}")
    if lost:
        print(f"--labelled: {found} are training subjects")
    kept = [key for key in of_vendors(cines, keys, args.vendors) if key in named]
    labelled = [key for key in kept if cines.labels[cines.index[key]].frames_of(args.phases)]
    if not labelled:
        vendors = sorted({cines.subjects[cines.index[key]].vendor or "unknown" for key in keys})
        wanted = ["--phases", args.phases, *(["--vendors", *args.vendors] if args.vendors else [])]
        raise UserError(
            f"none of the {len(keys)} training subjects can be used ({' '.join(wanted)}): expected label "
            f"files beside their cines; their vendors are {', '.join(vendors)}"
        )
    return labelled


def of_vendors(cines: store.Store, keys: Sequence[str], vendors: Collection[str] | None) -> list[str]:
    return [key for key in keys if vendors is None or cines.subjects[cines.index[key]].vendor in vendors]


if __name__ == "__main__":
    entry.end(main)
