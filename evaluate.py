"""Score a fine-tuned network in 3D on the original grid of every file, compare runs, or segment new cines:
python evaluate.py --split test --checkpoint runs/finetune-mim-phantom-n15-seed0
python evaluate.py --predict scan.nii.gz --checkpoint runs/finetune-mim-phantom-n15-seed0
"""

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cmrssp import segmentation
from cmrssp.cli import entry, flags
from cmrssp.data import dataset, splits
from cmrssp.data.prepare import prepare
from cmrssp.data.subject import CLASSES
from cmrssp.errors import UserError
from cmrssp.evaluation import label_maps, paper, plots, prediction, scoring, study, text
from cmrssp.files import check_writable, hashed, write_csv
from cmrssp.hardware import distributed
from cmrssp.hardware.device import resolve_device
from cmrssp.runs import folder
from cmrssp.ssp.flag_types import path
from cmrssp.weights import checkpoints

_SPLIT = ("--split-file", "--split-seed", "--keep-overlap", "--skip-broken", "--phases", "--vendors")
_NETWORKS = ("--checkpoint", "--flips", "--largest-component", "--save-predictions")
_UNUSED = {  # the flags that a mode has no use for
    "predict": ("--split", "--data", *_SPLIT, "--save-predictions"),
    "compare": ("--out", "--data", "--label-suffix", *_SPLIT, *_NETWORKS),
    "tables": ("--split", *_SPLIT, *_NETWORKS),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = entry.Parser(prog="evaluate.py", description=__doc__)
    subjects = "which subjects; all: every one of --data, also those of another hospital"
    parser.add_argument("--split", choices=(*splits.PARTS, "all"), default="test", help=subjects)
    newest = "unet.pt, last.pt or run folder (default: the newest finished fine-tuning below runs/)"
    averaged = f"{newest}; the probabilities of several are averaged"
    parser.add_argument("--checkpoint", nargs="+", type=path, metavar="PATH", help=averaged)
    mode = parser.add_argument_group("instead of scoring a split").add_mutually_exclusive_group()
    cines = "segment every frame of these cines: NIfTI files, or folders with NIfTI or DICOM files"
    mode.add_argument("--predict", nargs="+", type=path, metavar="PATH", help=cines)
    runs = "evaluated runs, paired by subject, all against the first; seeds of one experiment are averaged"
    mode.add_argument("--compare", nargs="+", type=path, metavar="RUN", help=runs)
    tables = "the paper's tables from the evaluated runs below this folder, and commands for missing runs"
    mode.add_argument("--tables", type=lambda text: Path(path(text)), metavar="RUNS", help=tables)
    flags.add_data(parser, default="data and split of the evaluated run")
    add = parser.add_argument_group("prediction and scores").add_argument
    add("--phases", choices=("ed", "es", "both"), default="both", help="frames to score")
    vendors = "score subjects of these vendors only"
    add("--vendors", action=flags.VendorNames, nargs="+", metavar="NAME", help=vendors)
    add("--flips", action="store_true", help="average over the image and its three mirror images")
    largest = "keep only the largest 3D component of each class"
    add("--largest-component", action="store_true", help=largest)
    add("--save-predictions", action="store_true", help="also write the label maps of a split")
    flags.add_output(parser, "RUN/evaluation-<split>; predictions for --predict, RUNS/tables for --tables")
    args = parser.parse_args(argv)
    chosen = next((name for name in _UNUSED if getattr(args, name)), None)
    for flag in _UNUSED.get(chosen, ()):
        if flags.typed(argv, flag):
            parser.error(f"{flag} has no meaning for --{chosen}; leave it out")
    for flag in ("--split-file", "--split-seed") if args.split == "all" else ():
        if flags.typed(argv, flag):
            parser.error(f"{flag} has no meaning for --split all; leave it out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.tables or args.compare:
        if distributed.is_main():  # work of one process
            compare(args.compare, args.split) if args.compare else write_tables(args)
        return 0
    trained = [checkpoints.load(path) for path in args.checkpoint or [folder.newest_finetuned()]]
    print(f"checkpoint: {', '.join(str(c.path) for c in trained)}")
    device = resolve_device(args.device)
    methods = [segmentation.restore(checkpoint).to(device) for checkpoint in trained]
    options = {"flips": args.flips, "largest_component": args.largest_component}
    networks = (trained, methods, device, options)
    predict(args, *networks) if args.predict else score(args, argv, *networks)
    return 0


def score(args, argv, trained: list[checkpoints.Checkpoint], methods: list, device, options: dict) -> None:
    """Score a split and write the results. Raises UserError at the end if a subject could not be scored."""
    first, everyone = trained[0], args.split == "all"
    part = "test" if everyone else args.split
    paths, label_suffix = dataset.source({**vars(first.provenance), **vars(args)})
    dataset.announce(paths)
    typed = ("split_file", "split_seed", "keep_overlap", "skip_broken", "vendors")
    prepared = prepare(
        paths,
        args.cache,
        needed=part,
        label_suffix=label_suffix,
        parts=(part,),
        labelled=(part,),
        everyone=everyone,
        inherited=None if flags.typed(argv, "--split-seed") else first.provenance.split,
        checkpoints=trained,
        held_out=() if part == "train" else (part,),
        **{name: getattr(args, name) for name in typed},
    )
    cines = prepared.cines
    out = Path(args.out) if args.out else first.path.parent / default_folder(args, argv, trained)
    check_writable("--out", out)
    predict = partial(segmentation.predict_frames, methods, cines, device=device, **options)
    saved = out / "predictions" if args.save_predictions else None
    scores = scoring.score(predict, cines, phases=args.phases, save=saved)
    if not scores.rows:
        none = f"none of its {len(cines.subjects)} subjects has a labelled frame that can be scored"
        failures = "".join(f"; {failure}" for failure in scores.failed[:3])
        raise UserError(f"--split {args.split}: {none} (--phases {args.phases}){failures}")
    if distributed.is_main():
        summary = {
            "split": args.split,
            "data": dataset.absolute(paths),
            "checkpoints": [str(checkpoint.path) for checkpoint in trained],
            "phases": args.phases,
            "vendors": args.vendors,
            **options,
            **scoring.origin(first),
        }
        table = scoring.breakdown(scores)
        names = scoring.write(out, scores, table, summary, predict, cines)
        names += ["predictions/"] * args.save_predictions
        who = "every subject" if everyone else f"{part} split"
        print(
            f"\n{who}, {len(scores.clinical)} subjects, mean ± standard deviation over subjects\n"
            f"{text.dice_table(table)}\n\n{text.breakdown_table(table)}\n\n"
            f"{text.agreement_table(scoring.agreement_pairs(scores.clinical))}\n{text.notes(scores)}"
            f"written: {out}/{', '.join(names)}"
        )
    distributed.barrier()  # torchrun ends all processes when one fails
    if scores.failed:
        raise UserError(f"{len(scores.failed)} subjects could not be scored: {'; '.join(scores.failed)}")


def default_folder(args, argv: Sequence[str] | None, trained: Sequence[checkpoints.Checkpoint]) -> str:
    """Such as evaluation-test; further words say what differs from the plain evaluation of one run."""
    link = trained[0].provenance
    words = [f"evaluation-{args.split}"]
    words += [dataset.name(args.data), _short(dataset.absolute(args.data))] if hasattr(args, "data") else []
    words += ["other-split"] * any(flags.typed(argv, flag) for flag in ("--split-file", "--split-seed"))
    words += [args.phases] * (args.phases != "both") + (args.vendors or [])
    words += ["flips"] * args.flips + ["largest"] * args.largest_component
    if len(trained) > 1:
        words.append(f"ensemble{len(trained)}-{_short(str(c.path.resolve()) for c in trained)}")
    words += [f"epoch{link.epochs}"] if link.unfinished() else []
    return "-".join(words)


def _short(paths: Iterable[str]) -> str:
    """What tells folders of one name apart."""
    return hashed("\n".join(sorted(paths)))[:6]


def predict(args, trained: list[checkpoints.Checkpoint], methods: list, device, options: dict) -> None:
    """Segment new cines and write the results. Raises UserError at the end if anything failed for a cine."""
    out = Path(args.out or "predictions")
    check_writable("--out", out)
    label_suffix = getattr(args, "label_suffix", trained[0].provenance.label_suffix)
    subjects = prediction.find(args.predict, args.cache, label_suffix, out)
    out.mkdir(parents=True, exist_ok=True)
    label_maps.forget(out)
    own = tqdm(distributed.own_items(subjects), "predicting", unit="cine", disable=distributed.hide_bar())
    found = distributed.merge([prediction.predict(s, methods, device, out, **options) for s in own])
    rows = sorted((row for row, _ in found), key=lambda row: (-row["severity"], row["cine"]))
    if distributed.is_main():
        write_csv(out / "clinical.csv", rows)
        if maps := {row["cine"]: entry for row, entry in found if entry}:
            label_maps.write(out, maps, trained, options)
        print(text.prediction_table(rows))
        print(
            f"written: {out}/clinical.csv"
            + "; for each cine label map, contours, volumes and animation; predictions.json for finetune.py "
            "--predicted" * bool(maps)
        )
    distributed.barrier()
    if failed := [f"{row['cine']}: {row['error']}" for row in rows if row["error"]]:
        raise UserError(f"--predict: errors in {len(failed)} of {len(rows)} cines: {'; '.join(failed)}")


def compare(runs: Sequence[str], split: str) -> None:
    groups, shown = study.groups(runs, split), []
    for name in ("mean", *CLASSES):
        scores = study.seed_means(groups, CLASSES if name == "mean" else [name])
        if all(scores.values()):  # a class without reference has no scores
            shown.append(f"{split} split, 3D Dice, {name}\n{text.comparison_table(scores)}")
    print("\n\n".join(shown))


def write_tables(args: argparse.Namespace) -> None:
    runs, out = study.collect(args.tables), Path(args.out or args.tables / "tables")
    given = {name: getattr(args, name) for name in ("data", "label_suffix") if hasattr(args, name)}
    tables, commands = paper.tables(runs), paper.missing(runs, args.tables, **given)
    paper.write(tables, commands, out)
    curves = paper.learning_curves(runs)
    if curves:
        plots.learning_curves(curves, out / "learning_curves.png")
    if runs:
        print(f"{len(runs[0].subjects)} test subjects\n")
        print("\n\n".join(table.markdown() for table in tables) + "\n")
    if commands:
        print("the paper's runs that are missing:\n" + "\n".join(commands) + "\n")
    print(f"written: {out}/*.csv, commands.sh" + ", learning_curves.png" * bool(curves))


if __name__ == "__main__":
    entry.end(main)
