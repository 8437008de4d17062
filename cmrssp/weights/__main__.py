"""Describe a checkpoint, or export it to nnU-Net v2:
python -m cmrssp.weights show runs/mim
python -m cmrssp.weights export --to nnunet runs/mim/unet.pt mim.pth
"""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from cmrssp.cli import entry
from cmrssp.errors import UserError
from cmrssp.weights import checkpoints, nnunet
from cmrssp.weights.checkpoints import Checkpoint
from cmrssp.weights.transfer import transfer

PROG = "python -m cmrssp.weights"
_LANDS = {
    "encoder": "finetune.py --init: encoder.*; nnU-Net: encoder.*, decoder.encoder.*",
    "decoder": "finetune.py --init: decoder.*; nnU-Net: decoder.stages.*, decoder.transpconvs.*",
    "heads": "finetune.py --init and evaluate.py: heads.*, for the same classes; nnU-Net: nowhere",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Raises UserError, and OSError for what cannot be read or written."""
    parser = entry.Parser(prog=PROG, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|export")
    what = "what a checkpoint is, how many subjects it has seen, what transfers where"
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
    exported = content.get("network_weights")
    checkpoint = checkpoints.parse(path, {"state_dict": exported, **content})
    what = "weights and training state" if "optimizer" in content else "weights"
    if exported:
        what += " for nnU-Net v2 (nnUNetv2_train -pretrained_weights)"
    config, state = checkpoint.config, checkpoint.state_dict
    history = checkpoint.provenance.history()
    lines = {
        "file": f"{path}, {path.stat().st_size / 1e6:.1f} MB",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "what": f"{what} of a 2D U-Net, {_origin(checkpoint)}",
        "method": " after ".join(link.method for link in history),
        "epochs": " after ".join("unknown" if link.epochs is None else str(link.epochs) for link in history),
        "data": "; ".join(dict.fromkeys(" ".join(link.data) for link in history)),
        "subjects seen": f"{len(checkpoint.seen())}",
        "channels": " ".join(map(str, config["channels"])),
        "norm": checkpoint.norm,
        "image": f"{config['image_size']} px of {config['spacing_mm']:g} mm",
        "keys": f"{len(state)}, such as {next(iter(state))}",
        **(content["transfer"] if exported else {part: _part(checkpoint, part) for part in _LANDS}),
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items())


def _part(checkpoint: Checkpoint, part: str) -> str:
    sizes = [value.numel() for key, value in checkpoint.state_dict.items() if key.startswith(part + ".")]
    if not sizes:
        return "not in the file, starts from random weights everywhere"
    return f"{len(sizes)} tensors, {sum(sizes) / 1e6:.2f} M values -> {_LANDS[part]}"


def _origin(checkpoint: Checkpoint) -> str:
    """pretrained by mim; trained to segment LV, MYO, RV, pretrained by mim"""
    methods = [link.method for link in checkpoint.provenance.history()]
    classes = checkpoint.config["classes"]
    before = methods[1:] if classes else methods
    origin = f"pretrained by {' after '.join(before)}" if before else "from scratch"
    return f"trained to segment {', '.join(classes)}, {origin}" if classes else origin


def to_nnunet(file: str | Path, out: Path) -> str:
    """Write `out` for nnU-Net's -pretrained_weights: every key of PlainConvUNet except for the segmentation
    layers; what the checkpoint lacks gets nnU-Net's initial weights. Returns the transfer report and what
    nnU-Net needs. Raises UserError, and OSError if `out` cannot be written.
    """
    out = out.expanduser()
    if out.suffix != ".pth":  # .pt are a run's own files
        raise UserError(f"{out}: expected the name of a file to write that ends in .pth")
    checkpoint = checkpoints.load(file)
    config = checkpoint.config
    unet = nnunet.fresh(config["channels"], checkpoint.norm)
    report = {**transfer(checkpoint, unet), "heads": "left out, nnU-Net makes its own segmentation layers"}
    if report["decoder"].startswith("fresh"):
        report["decoder"] += ", initialised as nnU-Net does"
    weights, provenance = nnunet.network_weights(unet.state_dict()), checkpoint.provenance.to_dict()
    content = {"network_weights": weights, "config": config, "provenance": provenance, "transfer": report}
    checkpoints.save(out, content)
    trainer, quoted = nnunet.TRAINERS[checkpoint.norm], shlex.quote(str(out))
    parts = "\n".join(f"{part}: {what}" for part, what in report.items())
    return f"""{checkpoint.path}: 2D U-Net, {_origin(checkpoint)}
{parts}
written: {out}, {len(weights)} keys

for "configurations" in nnUNetPlans.json of the data set:
{nnunet.as_text(nnunet.plan(**checkpoint.network))}

trainer: {trainer}
nnUNetv2_preprocess -d DATASET -c {nnunet.CONFIGURATION}
nnUNetv2_train DATASET {nnunet.CONFIGURATION} FOLD -tr {trainer} -pretrained_weights {quoted}"""


if __name__ == "__main__":
    entry.end(main, PROG)
