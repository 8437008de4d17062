"""The flags that the scripts share, each with its one default.

Precedence: typed > checkpoint > --quick > the method's defaults, by `set_defaults` in the reverse order.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cmrssp.cli.argument_types import at_least_0, folder, not_empty, positive, save_interval, share
from cmrssp.cli.entry import Parser
from cmrssp.data.dataset import LABEL_SUFFIX, PHANTOM, default_cache
from cmrssp.errors import UserError
from cmrssp.hardware.device import resolve_amp, resolve_compile
from cmrssp.ssp.method import Method
from cmrssp.training import Settings
from cmrssp.unet import NORMS

PAPER_NETWORK = {"channels": [32, 64, 128, 256, 512, 512, 512], "image_size": 256, "spacing": 1.25}
_RECIPE = ("epochs", "lr", "schedule", "final_lr", "warmup_epochs", "momentum", "nesterov", "weight_decay",
           "augmentation", "image_size", "spacing")  # fmt: skip
QUICK_NETWORK = {"channels": [16, 32, 64, 128], "image_size": 64, "spacing": 3.375}


def set_defaults(parser: Parser, argv: Sequence[str] | None, method: type[Method]) -> None:
    """The method's defaults, and over them what --quick changes."""
    parser.set_defaults(**method.defaults)
    if typed(argv, "--quick"):
        parser.set_defaults(**QUICK_NETWORK, **method.quick)


def from_config(config: dict) -> dict:
    """What a checkpoint's configuration says of the flags."""
    return {
        "channels": config["channels"],
        "image_size": config["image_size"],
        "spacing": config["spacing_mm"],
        "norm": config.get("norm", "batch"),
    }


def recipe(args: argparse.Namespace, method: type[Method], settings: Settings, batch_size: int) -> dict:
    """What a checkpoint remembers of how it was trained: optimisation, views, and the method's own flags; the
    mixed precision and the batch size that were used, which can be less than was asked for.
    """
    own = Parser(add_help=False)
    method.add_flags(own)
    found = {name: getattr(args, name) for name in (*_RECIPE, *(a.dest for a in own._actions))}
    return {**found, "amp": settings.amp, "batch_size": batch_size}


def flat(vendors: list | None) -> list[str] | None:
    """What --vendors names, each once; from a run that goes on it is flat already."""
    if vendors is None:
        return None
    return sorted({name for names in vendors for name in ([names] if isinstance(names, str) else names)})


def typed(argv: Sequence[str] | None, flag: str) -> bool:
    words = sys.argv[1:] if argv is None else argv
    return any(word == flag or word.startswith(flag + "=") for word in words)


def peek(argv: Sequence[str] | None, flag: str) -> str | None:
    """The value of one flag, before the defaults of the others are known."""
    parser = Parser(add_help=False)
    parser.add_argument(flag)
    value = vars(parser.parse_known_args(argv)[0])[flag.lstrip("-").replace("-", "_")]
    if value == "":
        raise UserError(f"{flag}: expected a path, got nothing")
    return value


def add_data(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="folders with cines, as downloaded: M&Ms, M&Ms-2, ACDC, or any tree of .nii / .nii.gz files; or "
        f"'{PHANTOM}', a synthetic set (default: {default})",
    )
    add_reading(group)
    group.add_argument(
        "--split-seed", type=at_least_0(int), default=0, help="draws training, validation and test subjects"
    )
    group.add_argument(
        "--split-file",
        type=Path,
        metavar="FILE",
        help="instead of drawing: a run's split.json, or a YAML of the paper's authors",
    )
    group.add_argument(
        "--keep-overlap",
        action="store_true",
        help="with M&Ms and M&Ms-2 together: draw from all M&Ms-2 subjects, also from those with NOR, HCM or "
        "LV, which may repeat M&Ms subjects",
    )
    group.add_argument(
        "--skip-broken", action="store_true", help="leave unreadable subjects out, and name them"
    )


def add_reading(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--label-suffix",
        type=not_empty,
        default=argparse.SUPPRESS,
        metavar="END",
        help="in a plain folder: what the names of label files have before .nii or .nii.gz, after that of "
        f"their cine (default: {LABEL_SUFFIX}, or as the checkpoint was trained with)",
    )
    parser.add_argument(
        "--cache",
        type=folder,
        default=default_cache(),
        metavar="DIR",
        help="where the slice store and the phantom are written",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network and views")
    group.add_argument(
        "--channels",
        type=positive(int),
        nargs="+",
        default=PAPER_NETWORK["channels"],
        metavar="N",
        help="channels of each stage of the U-Net, at least two stages",
    )
    group.add_argument(
        "--image-size",
        type=positive(int),
        default=PAPER_NETWORK["image_size"],
        metavar="PX",
        help="side of the square that the network sees, a multiple of 2^(stages - 1)",
    )
    group.add_argument(
        "--spacing",
        type=positive(float),
        default=PAPER_NETWORK["spacing"],
        metavar="MM",
        help="pixel size that the network sees",
    )
    group.add_argument(
        "--norm",
        choices=tuple(NORMS),
        default="batch",
        help="of every convolution: batch is the paper's, instance what nnU-Net has by default",
    )
    group.add_argument(
        "--augmentation",
        choices=("on", "off"),
        default="on",
        help="off: the plain centred crop (paper, section 2.6)",
    )


def add_optimisation(parser: argparse.ArgumentParser) -> None:
    """Defaults come from the method (supplement A of the paper)."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive(int), metavar="N", help="passes over the training slices")
    group.add_argument("--batch-size", type=positive(int), metavar="N", help="slices in a step")
    group.add_argument("--lr", type=positive(float), help="highest learning rate of the schedule")
    group.add_argument("--schedule", choices=("cosine", "poly"), help="cosine, or poly: power 0.9, to 0")
    group.add_argument("--final-lr", type=at_least_0(float), default=0.0, help="where the cosine ends")
    group.add_argument(
        "--warmup-epochs", type=at_least_0(float), default=0.0, metavar="N", help="linear warm-up from 0"
    )
    group.add_argument("--momentum", type=share, help="of SGD")
    group.add_argument("--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov momentum")
    group.add_argument("--weight-decay", type=at_least_0(float), help="L2 penalty of SGD")
    group.add_argument("--amp", choices=("fp16", "bf16", "off"), help="mixed precision; fp16 needs a GPU")
    group.add_argument(
        "--validate-every",
        type=positive(int),
        metavar="N",
        help="epochs between validations (default: so that a run has 11 to 20, or one an epoch)",
    )


def add_run(parser: argparse.ArgumentParser, *, training: bool) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--out",
        type=not_empty,
        metavar="DIR",
        help="folder for everything that is written "
        + (
            "(default: runs/<what it is>)"
            if training
            else "(default: RUN/evaluation-<split>; predictions for --predict, RUNS/tables for --tables)"
        ),
    )
    if training:
        group.add_argument(
            "--resume",
            metavar="auto|RUN",
            help="go on with a run that was stopped, exactly where it was: its folder (no other flag is "
            "needed), or auto: with the run in --out where there is one, else start it",
        )
        group.add_argument(
            "--save-every",
            type=save_interval,
            default="1min",
            metavar="N|Nmin",
            help="save last.pt every N epochs, or at an epoch's end when N minutes have passed (within an "
            "epoch: ten times as many)",
        )
        group.add_argument(
            "--max-skipped",
            type=at_least_0(int),
            default=25,
            metavar="N",
            help="steps in a row that fp16 may leave out because a gradient overflows",
        )
        group.add_argument(
            "--seed",
            type=at_least_0(int),
            default=0,
            help="initial weights, order of slices, augmentation; which subjects --n-subjects takes",
        )
        group.add_argument(
            "--deterministic",
            action="store_true",
            help="torch's deterministic algorithms on a GPU, slower (a CPU needs no flag)",
        )
    group.add_argument(
        "--quick",
        action="store_true",
        help="a small network, small images and few epochs: minutes on a laptop CPU"
        if training
        else "for a run made with --quick; changes nothing, the network is that of the run",
    )


def add_speed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the networks, for long runs on a GPU: the first steps take minutes",
    )
    group.add_argument(
        "--device-cache",
        choices=("auto", "on", "off"),
        default="auto",
        help="keep all slices in the device's memory; auto: on a GPU, where they fit beside the training",
    )
    group.add_argument(
        "--grad-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute activations a second time in the backward pass: about half the memory, a third more "
        "work, the same losses",
    )
    group.add_argument(
        "--benchmark",
        type=positive(int),
        metavar="N",
        help="measure N steps or more, what they are made of and what the device could do, and exit; no run "
        "folder is made",
    )


def settings(args: argparse.Namespace, device: torch.device) -> Settings:
    if args.nesterov and not args.momentum:
        raise UserError("--momentum 0: Nesterov momentum needs one above 0; add --no-nesterov")
    if args.schedule == "cosine" and args.final_lr > args.lr:
        raise UserError(f"--final-lr {args.final_lr:g}: expected at most --lr, {args.lr:g}")
    if args.compile and args.grad_checkpoint:
        raise UserError("--grad-checkpoint: not together with --compile; leave one of them out")
    return Settings(
        epochs=args.epochs,
        lr=args.lr,
        schedule=args.schedule,
        final_lr=args.final_lr,
        warmup_epochs=args.warmup_epochs,
        momentum=args.momentum,
        nesterov=args.nesterov,
        weight_decay=args.weight_decay,
        amp=resolve_amp(args.amp, device),
        seed=args.seed,
        save_every=args.save_every,
        max_skipped=args.max_skipped,
        compile=resolve_compile(args.compile, device, args.norm),
        validate_every=args.validate_every or max(1, -(-args.epochs // 20)),
    )


def quick_hint(args: argparse.Namespace, device: torch.device) -> str:
    """What to try when the run turns out long."""
    return "" if args.quick or device.type != "cpu" else "for minutes instead, on this CPU, add --quick"
