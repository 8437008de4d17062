"""Score a fine-tuned network in 3D on the original grid of every file, compare runs, or segment new cines:
python evaluate.py --split test --checkpoint runs/finetune-mim-phantom-n15-seed0
python evaluate.py --predict scan.nii.gz --checkpoint runs/finetune-mim-phantom-n15-seed0
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cmrssp import segmentation
from cmrssp.cli import entry, flags
from cmrssp.data import dataset, splits
from cmrssp.data.prepare import prepare
from cmrssp.data.subject import CLASSES
from cmrssp.errors import UserError
from cmrssp.evaluation import label_maps, paper, plots, prediction, scoring, stats, study, text
from cmrssp.files import check_writable, write_csv
from cmrssp.hardware import distributed
from cmrssp.hardware.device import resolve_device
from cmrssp.runs import folder
from cmrssp.weights import checkpoints

_DATA = ("--data", "--label-suffix")
_SCORING = ("--split-file", "--split-seed", "--keep-overlap", "--skip-broken", "--phases", "--vendors",
            "--save-predictions")  # fmt: skip
_PREDICTING = ("--checkpoint", "--flips", "--largest-component")
_UNUSED = {  # the flags that a mode has no use for
    "predict": ("--split", "--data", *_SCORING),
    "compare": ("--out", *_DATA, *_SCORING, *_PREDICTING),
    "tables": ("--split", *_SCORING, *_PREDICTING),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = entry.Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--split", choices=splits.PARTS, default="test", help="which subjects")
    parser.add_argument(
        "--checkpoint", nargs="+", metavar="PATH",
        help="unet.pt, last.pt or a run folder (default: the newest finished fine-tuned run below runs/); "
        "the probabilities of several are averaged",
    )  # fmt: skip
    mode = parser.add_argument_group("instead of scoring a split").add_mutually_exclusive_group()
    mode.add_argument(
        "--predict", nargs="+", metavar="PATH",
        help="segment every frame of these cines: NIfTI files, or folders with NIfTI or DICOM files",
    )  # fmt: skip
    mode.add_argument(
        "--compare", nargs="+", metavar="RUN",
        help="runs evaluated on one split, paired by subject, all against the first; runs that differ in the "
        "seed only are averaged first",
    )  # fmt: skip
    mode.add_argument(
        "--tables", type=Path, metavar="RUNS",
        help="the paper's tables from all evaluated runs below this folder, and the commands of the missing "
        "runs, for the data of --data",
    )  # fmt: skip
    flags.add_data(parser, default="data and split of the evaluated run")
    group = parser.add_argument_group("prediction and scores")
    group.add_argument("--phases", choices=("ed", "es", "both"), default="both", help="frames to score")
    group.add_argument(
        "--vendors",
        action=flags.VendorNames,
        nargs="+",
        metavar="NAME",
        help="score subjects of these vendors only",
    )
    group.add_argument(
        "--flips", action="store_true", help="average over the image and its three mirror images"
    )
    group.add_argument(
        "--largest-component", action="store_true", help="keep only the largest 3D component of each class"
    )
    group.add_argument("--save-predictions", action="store_true", help="also write the label maps of a split")
    flags.add_output(parser, "RUN/evaluation-<split>; predictions for --predict, RUNS/tables for --tables")
    args = parser.parse_args(argv)
    chosen = next((name for name in _UNUSED if getattr(args, name)), None)
    for flag in _UNUSED.get(chosen, ()):
        if flags.typed(argv, flag):
            parser.error(f"{flag} has no meaning for --{chosen}; leave it out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.tables or args.compare:  # work of one process
        if not distributed.is_main():
            return 0
        if args.compare:
            return compare(args.compare, args.split)
        out = Path(args.out) if args.out else args.tables / "tables"
        return write_tables(args.tables, out, getattr(args, "data", ()))
    trained = [checkpoints.load(path) for path in args.checkpoint or [folder.newest_finetuned()]]
    print(f"checkpoint: {', '.join(str(c.path) for c in trained)}")
    device = resolve_device(args.device)
    methods = [segmentation.restore(checkpoint).to(device) for checkpoint in trained]
    options = {"flips": args.flips, "largest_component": args.largest_component}
    if args.predict:
        return predict(args, trained, methods, device, options)
    return score(args, argv, trained, methods, device, options)


def score(args, argv, trained: list[checkpoints.Checkpoint], methods: list, device, options: dict) -> int:
    """Score a split and write the results. Raises UserError at the end if a subject could not be scored."""
    first, part = trained[0], (args.split,)
    paths, label_suffix = dataset.source({**vars(first.provenance), **vars(args)})
    dataset.announce(paths)
    prepared = prepare(
        paths, args.cache, needed=args.split, label_suffix=label_suffix, parts=part, labelled=part,
        split_file=args.split_file, split_seed=args.split_seed,
        inherited=None if flags.typed(argv, "--split-seed") else first.provenance.split,
        keep_overlap=args.keep_overlap, skip_broken=args.skip_broken, vendors=args.vendors,
        checkpoints=trained, held_out=() if args.split == "train" else part,
    )  # fmt: skip
    cines = prepared.cines
    out = Path(args.out) if args.out else first.path.parent / default_folder(args, argv, trained)
    check_writable("--out", out)
    saved = out / "predictions" if args.save_predictions else None
    scores = scoring.score(methods, cines, device, phases=args.phases, save=saved, **options)
    if not scores.rows:
        none = f"none of its {len(cines.subjects)} subjects has a labelled frame that can be scored"
        failures = "".join(f"; {failure}" for failure in scores.failed[:3])
        raise UserError(f"--split {args.split}: {none} (--phases {args.phases}){failures}")
    if distributed.is_main():
        summary = {
            "split": args.split, "data": dataset.absolute(paths),
            "checkpoints": [str(checkpoint.path) for checkpoint in trained],
            "phases": args.phases, "vendors": args.vendors, **options, "arm": scoring.arm(first),
            "settings": scoring.network_settings(first), "recipe": scoring.training_recipe(first),
        }  # fmt: skip
        table = scoring.breakdown(scores)
        cases = partial(scoring.extremes, scores, cines, methods, device, **options)
        names = scoring.write(out, scores, table, summary, cases) + ["predictions/"] * args.save_predictions
        print(
            f"\n{args.split} split, {len(scores.clinical)} subjects, mean ± standard deviation over subjects"
            f"\n{text.dice_table(scores.rows, scores.present)}\n\n{text.breakdown_table(table)}\n\n"
            f"{text.agreement_table(scores.clinical, scoring.AGREEMENT)}\n{text.notes(scores)}"
            f"written: {out}/{', '.join(names)}"
        )
    if scores.failed:
        raise UserError(f"{len(scores.failed)} subjects could not be scored: {'; '.join(scores.failed)}")
    return 0


def default_folder(args, argv: Sequence[str] | None, trained: Sequence[checkpoints.Checkpoint]) -> str:
    """Such as evaluation-test; further words say what differs from the plain evaluation of one run."""
    link = trained[0].provenance
    words = [
        f"evaluation-{args.split}", hasattr(args, "data") and dataset.name(args.data),
        (flags.typed(argv, "--split-file") or flags.typed(argv, "--split-seed")) and "other-split",
        args.phases != "both" and args.phases, *(args.vendors or []), args.flips and "flips",
        args.largest_component and "largest", len(trained) > 1 and f"ensemble{len(trained)}",
        link.unfinished() and f"epoch{link.epochs}",
    ]  # fmt: skip
    return "-".join(filter(None, words))


def predict(args, trained: list[checkpoints.Checkpoint], methods: list, device, options: dict) -> int:
    """Segment new cines and write the results. Raises UserError at the end if anything failed for a cine."""
    out = Path(args.out or "predictions")
    check_writable("--out", out)
    _, label_suffix = dataset.source({"label_suffix": trained[0].provenance.label_suffix, **vars(args)})
    subjects = prediction.find(args.predict, args.cache, label_suffix, out)
    out.mkdir(parents=True, exist_ok=True)
    own = tqdm(distributed.own_items(subjects), "predicting", unit="cine", disable=distributed.hide_bar())
    found = distributed.merge([prediction.predict(s, methods, device, out, **options) for s in own])
    rows = sorted((row for row, _ in found), key=lambda row: (-row["severity"], row["cine"]))
    if distributed.is_main():
        write_csv(out / "clinical.csv", rows)
        if maps := {row["cine"]: entry for row, entry in found if entry}:
            label_maps.write(out, maps, trained, options)
        print(text.prediction_table(rows))
        print(
            f"written: {out}/clinical.csv and, for each cine, label map, contours, volumes and animation; "
            "predictions.json for finetune.py --predicted"
        )
    if failed := [f"{row['cine']}: {row['error']}" for row in rows if row["error"]]:
        raise UserError(f"--predict: errors in {len(failed)} of {len(rows)} cines: {'; '.join(failed)}")
    return 0


def compare(runs: Sequence[str], split: str) -> int:
    groups = study.groups(runs, split)
    shown = []
    for name in ("mean", *CLASSES):
        scores = study.seed_means(groups, CLASSES if name == "mean" else [name])
        if all(scores.values()):  # a class without reference has no scores
            table = text.comparison_table(stats.compare(scores, seed=0), next(iter(scores)))
            shown.append(f"{split} split, 3D Dice, {name}\n{table}")
    print("\n\n".join(shown))
    return 0


def write_tables(runs: Path, out: Path, data: Sequence[str]) -> int:
    found = study.collect(runs)
    tables, commands = paper.tables(found), paper.missing(found, runs, data)
    paper.write(tables, commands, out)
    drawn = plots.learning_curves(paper.learning_curves(found), out / "learning_curves.png")
    if found:
        print("\n\n".join(text.markdown(table) for table in tables) + "\n")
    if commands:
        print("the runs that are missing:\n" + "\n".join(commands) + "\n")
    print(f"written: {out}/*.csv, commands.sh" + (", learning_curves.png" if drawn else ""))
    return 0


if __name__ == "__main__":
    entry.end(main)
