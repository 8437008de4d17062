"""Score a fine-tuned network in 3D on the original grid of every file:
python evaluate.py --split test --checkpoint runs/finetune-mim-phantom-n15-seed0"""

import csv
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cmrssp import data, flags, report, run, segmentation, training, weights
from cmrssp.data import check, splits, store
from cmrssp.data.subject import CLASSES
from cmrssp.device import resolve_device
from cmrssp.errors import UserError
from cmrssp.files import atomic
from cmrssp.metrics import dice


def parse(argv: Sequence[str] | None):
    parser = flags.Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--split", choices=splits.PARTS, default="test", help="which subjects")
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="unet.pt, last.pt or a run folder (default: the newest finished fine-tuned run below runs/)",
    )
    flags.add_data(parser, default="data and split of the evaluated run")
    flags.add_run(parser, training=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    checkpoint = weights.load(args.checkpoint or run.newest_finished("fine-tuning"))
    print(f"checkpoint: {checkpoint.path}")
    method = segmentation.restore(checkpoint)
    paths = getattr(args, "data", checkpoint.provenance["data"])
    data.announce(paths)
    device = resolve_device(args.device)
    method.to(device)

    label_suffix = getattr(args, "label_suffix", checkpoint.provenance.get("label_suffix", data.LABEL_SUFFIX))
    subjects, problems = data.find(paths, args.cache, label_suffix)
    inherited = None if flags.typed(argv, "--split-seed") else checkpoint.provenance["split"]
    split = splits.choose(
        subjects,
        split_file=args.split_file,
        split_seed=args.split_seed,
        inherited=inherited,
        keep_overlap=args.keep_overlap,
    )
    if args.split != "train":
        weights.refuse_seen(checkpoint, split, (args.split,))
    wanted = splits.named(subjects, split, (args.split,))
    if not wanted:
        raise UserError(
            f"--split {args.split}: the split has no subject there; "
            + ", ".join(f"{part} {len(keys)}" for part, keys in split.items())
        )
    cines = store.build(wanted, args.cache, labels=True, skip_broken=args.skip_broken)
    print(check.summary(cines, problems))
    out = Path(args.out) if args.out else checkpoint.path.parent / f"evaluation-{args.split}"
    out.mkdir(parents=True, exist_ok=True)
    rows, unlabelled = score(method, cines, device)
    if unlabelled:
        print(f"left out, without labels: {', '.join(unlabelled)}")
    if not rows:
        raise UserError(
            f"--split {args.split}: none of its {len(wanted)} subjects has a labelled ED or ES frame"
        )

    table = report.dice_table(rows)
    print(
        f"\n{args.split} split, {len(report.per_subject(rows, 'both', CLASSES))} subjects, "
        f"mean ± standard deviation over subjects\n{table}"
    )
    write(out, rows, unlabelled, checkpoint, args.split)
    report.contour_sheet(cases(rows, cines, method, device), out / "contours.png")
    print(f"written: {out}/metrics.csv, summary.json, contours.png")
    return 0


def score(method: segmentation.Segmentation, cines: store.Store, device) -> tuple[list[dict], list[str]]:
    """(one row a subject and phase, with the Dice of each class; keys of the subjects without labels)."""
    rows, unlabelled = [], []
    slices = sum(len(r.phases) * r.shape[1] for r in cines.labels)
    print(f"{len(cines.subjects)} subjects, {slices} slices to predict", flush=True)
    bar = tqdm(cines.subjects, "predicting", unit="subject", disable=None)
    for i, subject in enumerate(bar):
        began = time.monotonic()
        phases = cines.labels[i].phases
        if not phases:
            unlabelled.append(subject.key)
        predictions = segmentation.predict_frames(method, cines, i, list(phases.values()), device)
        for (phase, frame), labels in zip(phases.items(), predictions, strict=True):
            rows.append(
                {
                    "subject": subject.key,
                    "phase": phase,
                    "frame": frame,
                    "vendor": subject.vendor,
                    "pathology": subject.pathology,
                    **dice(labels, cines.label_volume(i, frame)),
                }
            )
        if i == 0 and len(cines.subjects) > 1:
            left = (time.monotonic() - began) * (len(cines.subjects) - 1)
            bar.write(f"estimated time: {training.duration(left)}")
    return rows, unlabelled


def write(
    out: Path, rows: list[dict], unlabelled: list[str], checkpoint: weights.Checkpoint, split: str
) -> None:
    """metrics.csv: one line a subject, phase and class. summary.json: the table's numbers."""
    text = io.StringIO()
    columns = ["subject", "vendor", "pathology", "phase", "frame", "class", "dice"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "class": name, "dice": f"{row[name]:.6f}"} for row in rows for name in CLASSES)
    with atomic(out / "metrics.csv") as file:
        file.write(text.getvalue().encode())
    groups = {"LV": ["LV"], "MYO": ["MYO"], "RV": ["RV"], "mean": CLASSES}
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    for phase in ("ED", "ES", "both"):
        figures = {
            n: report.spread(report.per_subject(rows, phase, classes)) for n, classes in groups.items()
        }
        scores[phase] = {
            name: {"mean": finite_or_none(mean), "std": finite_or_none(std)}
            for name, (mean, std) in figures.items()
        }
    run.Run(out).write_json(
        "summary.json",
        {
            "split": split,
            "checkpoint": str(checkpoint.path),
            "subjects": sorted({row["subject"] for row in rows}),
            "without_labels": unlabelled,
            "dice": scores,
            "method": checkpoint.history[-1]["method"],
            "trained_on": len(checkpoint.provenance["subjects"]),
            "seed": checkpoint.provenance["seed"],
        },
    )


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def cases(rows: list[dict], cines: store.Store, method, device) -> list[dict]:
    """Worst, median and best subject by mean Dice, ED and ES of each."""
    ranked = sorted(report.per_subject(rows, "both", CLASSES).items(), key=lambda item: item[1])
    chosen = {ranked[i][0]: name for name, i in (("median", len(ranked) // 2), ("best", -1), ("worst", 0))}
    sheet = []
    for key, name in sorted(chosen.items(), key=lambda item: ("worst", "median", "best").index(item[1])):
        i = cines.index[key]
        for row in (row for row in rows if row["subject"] == key):
            mean = np.mean([row[c] for c in CLASSES])
            prediction = next(segmentation.predict_frames(method, cines, i, [row["frame"]], device))
            sheet.append(
                {
                    "title": f"{name}: {key}, {row['phase']}, Dice {mean:.3f}",
                    "image": cines.volume(i, row["frame"]),
                    "truth": cines.label_volume(i, row["frame"]),
                    "prediction": prediction,
                    "spacing_mm": cines.cines[i].geometry.spacing_mm,
                    "centre": cines.cines[i].centre,
                }
            )
    return sheet


if __name__ == "__main__":
    flags.end(main)
