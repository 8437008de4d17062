"""Train a segmentation network on few labelled cines, from a pretrained checkpoint or from scratch:
python finetune.py --init runs/mim-phantom --n-subjects 15"""

from collections.abc import Sequence

import numpy as np

from cmrssp import training
from cmrssp.cli import entry, flags
from cmrssp.cli.argument_types import vendor_names
from cmrssp.data import dataset, quality, splits, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.data.subject import CLASSES
from cmrssp.errors import UserError
from cmrssp.hardware import benchmark, distributed, memory
from cmrssp.hardware.device import prepare_torch, resolve_device
from cmrssp.metrics import dice
from cmrssp.runs import figures, resume
from cmrssp.segmentation import FINETUNING_LR, Segmentation, predict_frames
from cmrssp.unet import recompute_activations
from cmrssp.weights import checkpoints


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
        help="unet.pt, last.pt or a run folder; without it from scratch, "
        f"with the baseline's --lr ({Segmentation.defaults['lr']}, else {FINETUNING_LR})",
    )
    group.add_argument(
        "--n-subjects",
        type=int,
        metavar="N",
        help="labelled training subjects, drawn by --seed, nested (default: all)",
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
        parser.set_defaults(lr=FINETUNING_LR, **flags.from_checkpoint(checkpoint))
    if interrupted:
        resume.set_defaults(parser, interrupted)
    args = parser.parse_args(argv)
    args.vendors = flags.flat(args.vendors)
    if interrupted:
        resume.refuse_changes(parser, args, argv, interrupted)
    return args, checkpoint, interrupted


def main(argv: Sequence[str] | None = None) -> int:
    args, checkpoint, interrupted = parse(argv)
    if interrupted and interrupted.finished:
        print(f"already finished: {interrupted.folder / 'unet.pt'}")
        return 0
    inherited = checkpoint.provenance if checkpoint else {}
    paths, label_suffix = dataset.source({**inherited, **vars(args)})
    dataset.announce(paths)
    device = resolve_device(args.device)
    prepare_torch(args.seed, args.deterministic)
    method = flags.build(Segmentation, args)
    if args.grad_checkpoint:
        recompute_activations(method)
    settings = flags.settings(args, device)
    transferred = checkpoints.transfer(checkpoint, method.unet) if checkpoint else {}
    for part, what in transferred.items():
        print(f"{part}: {what}")
    if args.freeze_encoder:
        print(
            f"encoder: frozen for the first {min(args.freeze_encoder, args.epochs):g} of {args.epochs} epochs"
            + ("" if checkpoint else ", with random weights: there is no --init")
        )

    with distributed.main_first():
        subjects, problems = dataset.find(paths, args.cache, label_suffix)
    anew = flags.typed(argv, "--split-seed")
    split_seed = args.split_seed if anew else inherited.get("split_seed", args.split_seed)
    inherited_split = None if anew else inherited.get("split")
    split = splits.choose(
        subjects,
        split_file=None if interrupted else args.split_file,
        split_seed=split_seed,
        inherited=interrupted.split if interrupted else inherited_split,
        keep_overlap=args.keep_overlap,
    )
    if checkpoint:
        checkpoints.refuse_seen(checkpoint, split, ("validation", "test"))
    with distributed.main_first():
        every = store.build(
            splits.named(subjects, split), args.cache, labels=False, skip_broken=args.skip_broken
        )
    if checkpoint:
        held = (*split["validation"], *split["test"])
        quality.refuse_other_images(every, checkpoint.digests, checkpoint.seen(), held)
    split = quality.without_copies(every, split)
    known = splits.named(every.subjects, split, ("train", "validation"))
    with distributed.main_first():
        cines = store.build(known, args.cache, labels=True, skip_broken=args.skip_broken)
    print(quality.summary(cines, problems))
    split = splits.keep(split, cines.index, parts=("train", "validation"))
    labelled = candidates(cines, split["train"], args)
    number = len(labelled) if args.n_subjects is None else args.n_subjects
    chosen = splits.subset(labelled, number, args.seed)
    slices = Slices(cines, chosen, phases=args.phases)
    print(
        splits.describe(split)
        + f"; {len(chosen)} labelled subjects to train on, {len(slices)} labelled slices"
    )
    print(
        "labelled slices: "
        + ", ".join(f"{n} in {subset}" for subset, n in sizes(cines, labelled, args).items())
    )
    loader = Batches(cines, slices, batch_size=args.batch_size, seed=args.seed, labelled=True, device=device)
    memory.check(method, loader, amp=settings.amp, device=device, device_cache=args.device_cache)
    if args.benchmark:
        benchmark.run(method, loader, settings, args.benchmark)
        return 0

    start = checkpoint.provenance["method"] if checkpoint else "scratch"
    name = f"finetune-{start}-{dataset.name(paths)}-n{len(chosen)}-seed{args.seed}"
    images = quality.digests(every, every.index)
    held_out = [cines.index[key] for key in split["validation"] if cines.labels[cines.index[key]].frames]
    used = [*chosen, *(cines.subjects[i].key for i in held_out)]
    labels = quality.digests(cines, used, labels=True)
    run, state = resume.open_run(interrupted, args, name, images, labels)
    if not state:
        described = {
            "kind": "fine-tuning",
            **vars(args),
            "split_seed": split_seed,
            "data": dataset.absolute(paths),
            "label_suffix": label_suffix,
            "device": str(device),
            "transfer": transferred,
            "subjects": chosen,
        }
        run.start(described, split)
        if transferred:
            run.log({"epoch": 0, "transfer": transferred})
    provenance = {
        "method": method.name,
        "data": dataset.absolute(paths),
        "label_suffix": label_suffix,
        "split": split,
        "split_seed": split_seed,
        "seed": args.seed,
        "subjects": chosen,
        "digests": images,
        "labels": labels,
        "slices": len(slices),
        "all_subjects": len(chosen) == len(labelled) and not splits.published_subset(split),
        "phases": args.phases,
        "vendors": args.vendors,
        "augmentation": "on" if args.augment else "off",
        "recipe": flags.recipe(args, Segmentation, settings, loader.batch_size),
        "init": checkpoint.provenance if checkpoint else None,
    }
    if not held_out:
        print("no validation subject has labels: there will be no validation Dice")
    elif unlabelled := [key for key in split["validation"] if cines.index[key] not in held_out]:
        print(f"validation subjects without labels, left out of the Dice: {', '.join(unlabelled)}")

    def validate(method: Segmentation, epoch: int) -> dict[str, float]:
        return mean_dice(method, cines, held_out, device) if held_out else {}

    if not state and distributed.is_main():
        figures.views(method.to(device), loader, run.folder / "views.png")
    training.train(
        method,
        loader,
        settings,
        run,
        config=method.config(),
        provenance=provenance,
        validate=validate,
        draw=lambda: figures.curves(run.records(), run.folder / "curves.png"),
        hint=flags.quick_hint(args, device),
        state=state,
    )
    print(f"done: {run.folder / 'unet.pt'}; next: python evaluate.py --split test --checkpoint {run.folder}")
    return 0


def candidates(cines: store.Store, keys: Sequence[str], args) -> list[str]:
    """The training subjects with labels of the wanted phases, of the wanted vendors."""
    labelled = [key for key in keys if cines.labels[cines.index[key]].frames_of(args.phases)]
    if not labelled:
        raise UserError(
            f"none of the {len(keys)} training subjects has a labelled frame (--phases {args.phases}); "
            "fine-tuning needs label files beside the cines"
        )
    vendors = {key: cines.subjects[cines.index[key]].vendor for key in labelled}
    wanted = [key for key in labelled if args.vendors is None or vendors[key] in args.vendors]
    if not wanted:
        raise UserError(
            f"--vendors {' '.join(args.vendors)}: none of the {len(labelled)} labelled training subjects; "
            f"their vendors are {', '.join(sorted({v or 'unknown' for v in vendors.values()}))}"
        )
    return wanted


def sizes(cines: store.Store, labelled: Sequence[str], args) -> dict[str, int]:
    """{subset: its labelled slices}, of all subjects and of the paper's subsets of this seed."""
    subsets = {f"all {len(labelled)} subjects": list(labelled)}
    subsets |= {str(n): splits.subset(labelled, n, args.seed) for n in (50, 25, 15, 10) if n < len(labelled)}
    return {name: len(Slices(cines, keys, phases=args.phases)) for name, keys in subsets.items()}


def mean_dice(method: Segmentation, cines: store.Store, subjects: Sequence[int], device) -> dict[str, float]:
    """3D Dice on the original grid, over the ED and ES frames of the subjects: the mean, and that of each
    class. Each rank takes its share of the subjects.
    """
    mine: list[list[dict[str, float]]] = []
    for subject in distributed.own_items(subjects):
        frames = sorted(set(cines.labels[subject].phases.values()))
        predicted = predict_frames([method], cines, subject, frames, device)
        truth = (cines.label_volume(subject, frame) for frame in frames)
        mine.append([dice(*pair) for pair in zip(predicted, truth, strict=True)])
    scores = [score for of_subject in distributed.merge(mine) for score in of_subject]
    means = {f"dice_{name}": float(np.mean([s[name] for s in scores])) for name in CLASSES}
    return {"dice": float(np.mean(list(means.values()))), **means}


if __name__ == "__main__":
    entry.end(main)
