"""Score a fine-tuned network in 3D on the original grid of every file, compare runs, or segment new cines:
python evaluate.py --split test --checkpoint runs/finetune-mim-phantom-n15-seed0
python evaluate.py --predict scan.nii.gz --checkpoint runs/finetune-mim-phantom-n15-seed0
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cmrssp import segmentation
from cmrssp.cli import entry, flags
from cmrssp.cli.argument_types import vendor_names
from cmrssp.data import dataset, quality, splits, store
from cmrssp.data.subject import CLASSES, BrokenSubject
from cmrssp.errors import UserError
from cmrssp.evaluation import comparison, plots, prediction, report, scoring, stats, study, tables
from cmrssp.files import check_writable, write_csv
from cmrssp.hardware import distributed
from cmrssp.hardware.device import resolve_device
from cmrssp.runs import folder
from cmrssp.weights import checkpoints
from cmrssp.weights.provenance import Provenance
from cmrssp.weights.transfer import refuse_seen

# flags that only the scoring of a split uses, and flags that only a prediction uses
_SCORING = ("--data", "--split-file", "--split-seed", "--keep-overlap", "--skip-broken", "--phases",
            "--vendors", "--save-predictions")  # fmt: skip
_PREDICTING = ("--checkpoint", "--flips", "--largest-component", "--label-suffix")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = entry.Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--split", choices=splits.PARTS, default="test", help="which subjects")
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="PATH",
        help="unet.pt, last.pt or a run folder (default: the newest finished fine-tuned run below runs/); of "
        "several the probabilities are averaged",
    )
    what = parser.add_argument_group("instead of scoring a split").add_mutually_exclusive_group()
    what.add_argument(
        "--predict",
        nargs="+",
        metavar="PATH",
        help="segment every frame of these cines: NIfTI files or folders",
    )
    what.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN",
        help="runs evaluated on one split, paired by subject, all against the first; runs that differ in the "
        "seed alone are averaged first",
    )
    what.add_argument(
        "--tables",
        type=Path,
        metavar="RUNS",
        help="the paper's tables from all evaluated runs below this folder",
    )
    flags.add_data(parser, default="data and split of the evaluated run")
    group = parser.add_argument_group("prediction and scores")
    group.add_argument("--phases", choices=("ed", "es", "both"), default="both", help="frames to score")
    group.add_argument(
        "--vendors",
        type=vendor_names,
        nargs="+",
        metavar="NAME",
        help="score the subjects of these vendors alone",
    )
    group.add_argument(
        "--flips", action="store_true", help="average over the image and its three mirror images"
    )
    group.add_argument(
        "--largest-component", action="store_true", help="keep the largest 3D component of each class alone"
    )
    group.add_argument("--save-predictions", action="store_true", help="write the label maps of a split, too")
    flags.add_run(parser, training=False)
    args = parser.parse_args(argv)
    args.vendors = flags.flat(args.vendors)
    mode = next((name for name in ("predict", "compare", "tables") if getattr(args, name)), None)
    others = {
        "predict": ("--split", *_SCORING),
        "compare": ("--out", *_SCORING, *_PREDICTING),
        "tables": ("--split", *_SCORING, *_PREDICTING),
    }
    for flag in others.get(mode, ()):
        if flags.typed(argv, flag):
            parser.error(f"{flag} says nothing to --{mode}; leave it out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.tables or args.compare:  # nothing to share
        if not distributed.is_main():
            return 0
        if args.tables:
            return print_tables(args.tables, Path(args.out) if args.out else args.tables / "tables")
        return compare(args.compare, args.split)
    trained = [checkpoints.load(path) for path in args.checkpoint or [folder.newest_finetuned()]]
    print(f"checkpoint: {', '.join(str(c.path) for c in trained)}")
    methods = [segmentation.restore(checkpoint) for checkpoint in trained]
    if args.predict:
        return predict(args, methods, trained[0].provenance)
    return score(args, argv, trained, methods)


def score(args, argv, trained: list[checkpoints.Checkpoint], methods: list[segmentation.Segmentation]) -> int:
    first = trained[0]
    paths, label_suffix = dataset.source(
        {"data": first.provenance.data, "label_suffix": first.provenance.label_suffix, **vars(args)}
    )
    dataset.announce(paths)
    device = resolve_device(args.device)
    methods = [method.to(device) for method in methods]

    with distributed.main_first():
        subjects, problems = dataset.find(paths, args.cache, label_suffix)
    inherited = None if flags.typed(argv, "--split-seed") else first.provenance.split
    split = splits.choose(
        subjects,
        split_file=args.split_file,
        split_seed=args.split_seed,
        inherited=inherited,
        keep_overlap=args.keep_overlap,
    )
    if args.split != "train":
        for checkpoint in trained:
            refuse_seen(checkpoint, split, (args.split,))
    wanted = splits.named(subjects, split, (args.split,))
    if not wanted:
        counts = ", ".join(f"{part} {len(keys)}" for part, keys in split.items())
        raise UserError(f"--split {args.split}: the split has no subject there; {counts}")
    vendors = sorted({s.vendor or "unknown" for s in wanted})
    wanted = [s for s in wanted if args.vendors is None or s.vendor in args.vendors]
    if not wanted:
        raise UserError(f"--split {args.split}: its subjects have other --vendors: {', '.join(vendors)}")
    with distributed.main_first():
        cines = store.build(wanted, args.cache, labels=True, skip_broken=args.skip_broken)
    print(quality.summary(cines, problems))
    for checkpoint in trained:
        seen = checkpoint.seen() if args.split != "train" else ()
        quality.refuse_other_images(cines, checkpoint.digests, seen, cines.index)
    out = Path(args.out) if args.out else first.path.parent / default_folder(args, argv, trained)
    check_writable("--out", out)
    saved = out / "predictions" if args.save_predictions else None
    scores = scoring.score(methods, cines, device, phases=args.phases, save=saved, **options(args))
    if scores.unlabelled:
        print(f"left out, without labels: {', '.join(scores.unlabelled)}")
    if not scores.rows:
        raise UserError(
            f"--split {args.split}: none of its {len(wanted)} subjects has a labelled frame (--phases "
            f"{args.phases})"
        )
    if not distributed.is_main():
        return 0
    table = scoring.breakdown(scores)
    print(
        f"\n{args.split} split, {len(scores.clinical)} subjects, mean ± standard deviation over subjects\n"
        f"{report.dice_table(scores.rows)}\n\n{report.breakdown_table(table)}\n\n"
        f"{report.agreement_table(scores.clinical, scoring.AGREEMENT)}"
    )
    lost = {name: count for name, count in scoring.missed(scores.rows).items() if count}
    if lost:
        print("missed (in one of the two label maps alone, no distance): "
              + ", ".join(f"{name} in {count} volumes" for name, count in lost.items()))  # fmt: skip
    summary = {
        "split": args.split,
        "data": dataset.absolute(paths),
        "checkpoints": [str(c.path) for c in trained],
        "phases": args.phases,
        "vendors": args.vendors,
        **options(args),
        "arm": scoring.arm(first),
        "settings": scoring.settings(first),
        "recipe": scoring.recipe(first),
    }
    out.mkdir(parents=True, exist_ok=True)
    sheet = scoring.cases(scores, cines, methods, device, **options(args))
    report.contour_sheet(sheet, out / "contours.png")
    names = scoring.write(out, scores, table, summary)
    print(f"written: {out}/" + ", ".join([*names, "contours.png", *(["predictions/"] if saved else [])]))
    return 0


def options(args) -> dict[str, bool]:
    return {"flips": args.flips, "largest_component": args.largest_component}


def default_folder(args, argv: Sequence[str] | None, checkpoints: Sequence) -> str:
    """Beside the run; what was changed from the plain evaluation of one run is in the name."""
    changed = [
        *([dataset.name(args.data)] if hasattr(args, "data") else []),
        *(
            ["other-split"]
            if any(flags.typed(argv, flag) for flag in ("--split-file", "--split-seed"))
            else []
        ),
        *([args.phases] if args.phases != "both" else []),
        *(args.vendors or []),
        *(["flips"] if args.flips else []),
        *(["largest"] if args.largest_component else []),
        *([f"ensemble{len(checkpoints)}"] if len(checkpoints) > 1 else []),
        *([f"epoch{checkpoints[0].provenance.epochs}"] if checkpoints[0].provenance.unfinished() else []),
    ]
    return "-".join([f"evaluation-{args.split}", *changed])


def predict(args, methods: list[segmentation.Segmentation], provenance: Provenance) -> int:
    """0, or 2 where a cine could not be read; the others are predicted all the same."""
    device = resolve_device(args.device)
    methods = [method.to(device) for method in methods]
    out = Path(args.out or "predictions")
    check_writable("--out", out)
    _, label_suffix = dataset.source({"label_suffix": provenance.label_suffix, **vars(args)})
    subjects = prediction.find(args.predict, args.cache, label_suffix, out)
    out.mkdir(parents=True, exist_ok=True)
    found: list[dict | str] = []
    share = distributed.own_items(subjects)
    for subject in tqdm(share, "predicting", unit="cine", disable=distributed.hide_bar()):
        try:
            found.append(prediction.predict(subject, methods, device, out, **options(args)))
        except BrokenSubject as error:
            found.append(str(error).partition(":\n")[2].strip() or str(error))
    found = distributed.merge(found)
    rows, broken = ([x for x in found if isinstance(x, kind)] for kind in (dict, str))
    rows.sort(key=lambda row: (-row["severity"], row["cine"]))
    if rows and distributed.is_main():
        write_csv(out / "clinical.csv", rows)
        print(report.prediction_table(rows))
        print(f"written: {out}/clinical.csv and, for each cine, label map, contours, volumes and animation")
    elif distributed.is_main() and not any(out.iterdir()):
        out.rmdir()
    if broken:
        raise UserError(
            f"--predict: {len(broken)} of {len(subjects)} cines cannot be used: {'; '.join(broken)}"
        )
    return 0


def compare(runs: Sequence[str], split: str) -> int:
    arms = comparison.arms(runs, split)
    shown = []
    for group in ("mean", *CLASSES):
        scores = comparison.arm_scores(arms, CLASSES if group == "mean" else [group])
        found = stats.compare(scores, seed=0)
        shown.append(f"{split} split, 3D Dice, {group}\n{report.comparison_table(found, next(iter(scores)))}")
    print("\n\n".join(shown))
    return 0


def print_tables(runs: Path, out: Path) -> int:
    found = study.collect(runs)
    made = tables.tables(found)
    print("\n\n".join(tables.markdown(table) for table in made))
    missing = study.missing(found, runs)
    if missing:
        print("\nto fill the empty cells:\n" + "\n".join(missing))
    out.mkdir(parents=True, exist_ok=True)
    tables.write_csv(made, out)
    drawn = plots.learning_curves(tables.learning_curves(found), out / "learning_curves.png")
    print(f"\nwritten: {out}/*.csv" + (", learning_curves.png" if drawn else ""))
    return 0


if __name__ == "__main__":
    entry.end(main)
