"""Train a segmentation network on few labelled cines, from a pretrained checkpoint or from scratch:
python finetune.py --init runs/mim-phantom --n-subjects 15"""

from collections.abc import Sequence

import numpy as np

from cmrssp import data, flags, memory, report, training, weights
from cmrssp.data import splits, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.data.subject import CLASSES
from cmrssp.errors import UserError
from cmrssp.metrics import dice
from cmrssp.run import Run
from cmrssp.segmentation import FINETUNING_LR, Segmentation, predict_frames


def parse(argv: Sequence[str] | None):
    """(args, checkpoint or None). Data, split and network come from --init unless typed."""
    parser = flags.Parser(prog="finetune.py", description=__doc__)
    flags.add_data(parser, default=f"what --init was pretrained on, else {data.PHANTOM}")
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
    flags.add_network(parser)
    flags.add_optimisation(parser)
    flags.add_run(parser, training=True)
    init = flags.peek(argv, "--init")
    checkpoint = weights.load(init) if init else None
    flags.set_defaults(parser, argv, Segmentation)
    if checkpoint:
        parser.set_defaults(lr=FINETUNING_LR, **flags.from_config(checkpoint.config))
    return parser.parse_args(argv), checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    args, checkpoint = parse(argv)
    inherited = checkpoint.provenance if checkpoint else {}
    paths = getattr(args, "data", inherited.get("data", [data.PHANTOM]))
    data.announce(paths)
    device = flags.resolve_device(args.device)
    flags.prepare_torch(args.seed, args.deterministic)
    method = Segmentation.from_flags(args)
    settings = flags.settings(args, flags.resolve_amp(args.amp, device))
    transferred = weights.transfer(checkpoint, method.unet) if checkpoint else {}
    for part, what in transferred.items():
        print(f"{part}: {what}")

    subjects = data.find(paths, args.cache)
    anew = flags.typed(argv, "--split-seed")
    split_seed = args.split_seed if anew else inherited.get("split_seed", args.split_seed)
    split = splits.choose(
        subjects,
        split_file=args.split_file,
        split_seed=split_seed,
        inherited=None if anew else inherited.get("split"),
    )
    if checkpoint:
        weights.refuse_seen(checkpoint, split, ("validation", "test"))
    wanted = {*split["train"], *split["validation"]}
    cines = store.build(
        [s for s in subjects if s.key in wanted], args.cache, labels=True, skip_broken=args.skip_broken
    )
    split = splits.keep(split, cines.index, parts=("train", "validation"))
    labelled = [key for key in split["train"] if cines.labels[cines.index[key]].frames]
    if not labelled:
        raise UserError(
            "none of the training subjects has a labelled frame; fine-tuning needs label files "
            "beside the cines"
        )
    number = len(labelled) if args.n_subjects is None else args.n_subjects
    chosen = splits.subset(labelled, number, args.seed)
    slices = Slices(cines, chosen, labelled=True)
    print(
        splits.describe(split)
        + f"; {len(chosen)} labelled subjects to train on, {len(slices)} labelled slices"
    )
    loader = Batches(cines, slices, batch_size=args.batch_size, seed=args.seed, labelled=True, device=device)
    memory.check(method, loader, amp=settings.amp, device=device)

    start = checkpoint.provenance["method"] if checkpoint else "scratch"
    run = Run.create(args.out, f"finetune-{start}-{data.name(paths)}-n{len(chosen)}-seed{args.seed}")
    print(f"run folder: {run.folder}")
    run.start(
        {
            "kind": "fine-tuning",
            **vars(args),
            "split_seed": split_seed,
            "data": paths,
            "amp": settings.amp,
            "device": str(device),
            "transfer": transferred,
            "subjects": chosen,
        },
        split,
    )
    config = {
        "channels": args.channels,
        "image_size": args.image_size,
        "spacing_mm": args.spacing,
        "classes": list(CLASSES),
    }
    provenance = {
        "method": method.name,
        "data": data.absolute(paths),
        "split": split,
        "split_seed": split_seed,
        "seed": args.seed,
        "subjects": chosen,
        "slices": len(slices),
        "init": checkpoint.provenance if checkpoint else None,
    }
    held_out = [cines.index[key] for key in split["validation"] if cines.labels[cines.index[key]].frames]
    if not held_out:
        print("no validation subject has labels: there will be no validation Dice")

    def validate(method: Segmentation, epoch: int) -> dict[str, float]:
        return mean_dice(method, cines, held_out, device) if held_out else {}

    report.views(method.to(device), loader, run.folder / "views.png")
    training.train(
        method,
        loader,
        settings,
        run,
        config=config,
        provenance=provenance,
        validate=validate,
        hint=flags.quick_hint(args, device),
    )
    report.curves(run.records(), run.folder / "curves.png")
    print(f"done: {run.folder / 'unet.pt'}; next: python evaluate.py --split test --checkpoint {run.folder}")
    return 0


def mean_dice(method: Segmentation, cines: store.Store, subjects: Sequence[int], device) -> dict[str, float]:
    """3D Dice on the original grid, over the ED and ES frames of the subjects: the mean, and that of each
    class.
    """
    scores = []
    for subject in subjects:
        record = cines.labels[subject]
        frames = sorted({record.ed, record.es} - {None})
        for frame, labels in zip(frames, predict_frames(method, cines, subject, frames, device), strict=True):
            scores.append(dice(labels, cines.label_volume(subject, frame)))
    means = {f"dice_{name}": float(np.mean([s[name] for s in scores])) for name in CLASSES}
    return {"dice": float(np.mean(list(means.values()))), **means}


if __name__ == "__main__":
    flags.end(main)
