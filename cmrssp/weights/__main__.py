"""Describe a checkpoint, or export it to nnU-Net v2:
python -m cmrssp.weights show runs/mim
python -m cmrssp.weights export --to nnunet runs/mim/unet.pt mim.pth
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cmrssp.cli import entry
from cmrssp.errors import UserError
from cmrssp.weights import checkpoints, nnunet
from cmrssp.weights.checkpoints import Checkpoint
from cmrssp.weights.transfer import check_keys, transfer

PROG = "python -m cmrssp.weights"
_LANDS = {
    "encoder": "finetune.py --init: encoder.*; nnU-Net: encoder.*, decoder.encoder.*",
    "decoder": "finetune.py --init: decoder.*; nnU-Net: decoder.stages.*, decoder.transpconvs.*",
    "heads": "finetune.py --init and evaluate.py: heads.*, for the same classes; nnU-Net: nowhere",
}
_NO_HEADS = "left out, nnU-Net makes its own segmentation layers"


def main(argv: Sequence[str] | None = None) -> int:
    """Raises UserError, and OSError for what cannot be read."""
    parser = entry.Parser(prog=PROG, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|export")
    what = "what a checkpoint is, which subjects it has seen, what transfers where"
    file = "unet.pt, last.pt, a run folder, or a file exported from one"
    commands.add_parser("show", help=what).add_argument("file", metavar="FILE", help=file)
    export = commands.add_parser("export", help="write the weights for another program")
    to = "nnunet: for nnUNetv2_train -pretrained_weights"
    export.add_argument("--to", choices=("nnunet",), required=True, help=to)
    export.add_argument("checkpoint", metavar="RUN/unet.pt", help="unet.pt, last.pt or a run folder")
    export.add_argument("out", metavar="OUT.pth", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    print(show(args.file) if args.command == "show" else to_nnunet(args.checkpoint, args.out))
    return 0


def show(file: str | Path) -> str:
    """Describe a checkpoint of this package, or an export of one, in lines. Raises UserError."""
    path = checkpoints.locate(file)
    content = checkpoints.read(path)
    exported = {"network_weights", "config", "provenance", "transfer"} <= content.keys()
    what = "weights and training state" if "optimizer" in content else "weights"
    if exported:
        what += " for nnU-Net v2 (nnUNetv2_train -pretrained_weights)"
        checkpoint = checkpoints.parse(path, content, "network_weights")
        parts = dict(content["transfer"])
    else:
        checkpoint = checkpoints.load(path)
        check_keys(checkpoint)
        parts = {part: _part(checkpoint, part, where) for part, where in _LANDS.items()}
    config, state = checkpoint.config, checkpoint.state_dict
    history = list(checkpoint.provenance.history())
    lines = {
        "file": f"{path}, {path.stat().st_size / 1e6:.1f} MB",
        "sha256": _sha256(path),
        "what": f"{what} of a 2D U-Net, {_origin(checkpoint)}",
        "method": " after ".join(link.method for link in history),
        "epochs": " after ".join("unknown" if link.epochs is None else str(link.epochs) for link in history),
        "data": "; ".join(dict.fromkeys(" ".join(link.data) for link in history)),
        "subjects seen": f"{len(checkpoint.seen())}",
        "channels": " ".join(map(str, config["channels"])),
        "norm": checkpoint.norm,
        "image": f"{config['image_size']} px of {config['spacing_mm']:g} mm",
        "keys": f"{len(state)}, such as {next(iter(state))}",
        **parts,
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items())


def _part(checkpoint: Checkpoint, part: str, where: str) -> str:
    found = [value for key, value in checkpoint.state_dict.items() if key.startswith(part + ".")]
    if not found:
        return "not in the file, starts from random weights everywhere"
    return f"{len(found)} tensors, {sum(v.numel() for v in found) / 1e6:.2f} M values -> {where}"


def _origin(checkpoint: Checkpoint) -> str:
    """pretrained by mim; trained to segment LV, MYO, RV, pretrained by mim"""
    methods = [link.method for link in checkpoint.provenance.history()]
    classes = checkpoint.config["classes"]
    before = methods[1:] if classes else methods
    origin = f"pretrained by {' after '.join(before)}" if before else "from scratch"
    return f"trained to segment {', '.join(classes)}, {origin}" if classes else origin


def to_nnunet(file: str | Path, out: Path) -> str:
    """Write `out` for nnU-Net's -pretrained_weights. Returns the transfer report and what nnU-Net needs.

    `network_weights` has every key of PlainConvUNet except for the segmentation layers. What the checkpoint
    lacks gets nnU-Net's initial weights. Raises UserError, also if `out` cannot be written.
    """
    checkpoint = checkpoints.load(file)
    config, norm = checkpoint.config, checkpoint.norm
    unet = nnunet.fresh(config["channels"], norm)
    report = {**transfer(checkpoint, unet), "heads": _NO_HEADS}
    if report["decoder"].startswith("fresh"):
        report["decoder"] += ", initialised as nnU-Net does"
    content = {
        "network_weights": nnunet.network_weights(unet.state_dict()),
        "config": config,
        "provenance": checkpoint.provenance.to_dict(),
        "transfer": report,
    }
    out = out.expanduser()
    if out.is_dir():
        raise UserError(f"{out}: cannot be written: Is a directory")
    if out.exists() and out.samefile(checkpoint.path):
        raise UserError(f"{out}: expected another file to write than the checkpoint itself")
    if out.suffix == ".pt" and (out.parent / "args.json").exists():
        raise UserError(f"{out}: would take the place of a run's own file; expected another, such as *.pth")
    try:
        checkpoints.save(out, content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    plan = nnunet.plan(config["channels"], norm, config["image_size"], config["spacing_mm"])
    trainer, parts = nnunet.TRAINERS[norm], "\n".join(f"{part}: {what}" for part, what in report.items())
    return f"""{checkpoint.path}: 2D U-Net, {_origin(checkpoint)}
{parts}
written: {out}, {len(content["network_weights"])} keys

for "configurations" in nnUNetPlans.json of the data set:
{nnunet.as_text(plan)}

trainer: {trainer}
nnUNetv2_preprocess -d DATASET -c {nnunet.CONFIGURATION}
nnUNetv2_train DATASET {nnunet.CONFIGURATION} FOLD -tr {trainer} -pretrained_weights {out}"""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    entry.end(main, PROG)
