"""The flags that the scripts share, each with its default.

Precedence: typed > the run that goes on > checkpoint > --quick > the method's defaults > the flag's default.
"""

import inspect
import json
import re
import sys
from argparse import SUPPRESS, Action, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmrssp.cli.entry import Parser
from cmrssp.data import dataset
from cmrssp.data.batches import Batches
from cmrssp.data.subject import vendor_name
from cmrssp.errors import UserError
from cmrssp.hardware.device import resolve_amp, resolve_compile, resolve_graph
from cmrssp.runs.folder import Run, find
from cmrssp.runs.settings import Settings
from cmrssp.ssp.flag_types import at_least_0, fraction, path, positive
from cmrssp.ssp.method import Method
from cmrssp.unet import NORMS, recompute_activations

PAPER_NETWORK = {"channels": [32, 64, 128, 256, 512, 512, 512], "image_size": 256, "spacing_mm": 1.25}
QUICK_NETWORK = {"channels": [16, 32, 64, 128], "image_size": 64, "spacing_mm": 3.375}
_SCHEDULE = ("epochs", "lr", "schedule", "final_lr", "warmup_epochs")
OPTIMISATION = (*_SCHEDULE, "momentum", "nesterov", "weight_decay")
# of a run that goes on: about the machine, about saving, or without effect on the training
_MAY_CHANGE = {"device", "out", "resume", "cache", "data", "save_every", "max_skipped", "help"}
_MAY_CHANGE |= {"device_cache", "grad_checkpoint", "benchmark"}


def on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ArgumentTypeError(f"expected on or off, got {text}")
    return text == "on"


def absolute_path(text: str) -> Path:
    """So that a run resumed from another folder finds it."""
    return Path(text).expanduser().absolute()


def save_interval(text: str) -> str:
    """Epochs (`5`) or minutes (`2min`)."""
    if not re.fullmatch(r"0*[1-9]\d*|\d*\.?\d+min", text):
        raise ArgumentTypeError(f"expected epochs such as 5, or minutes such as 2min, got {text}")
    return text


class VendorNames(Action):
    """`A`, `Siemens`, `A+B` or `Siemens,Philips` -> their names, sorted, each once."""

    def __call__(self, parser, namespace, values: Sequence[str], option_string: str | None = None) -> None:
        names = {vendor_name(name) for name in re.split("[+,]", "+".join(values)) if name.strip()}
        setattr(namespace, self.dest, sorted(names))


def add_data(parser: Parser, default: str) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    data = f"folders of M&Ms, M&Ms-2, ACDC, DICOM or NIfTI files, or '{dataset.PHANTOM}': synthetic"
    add("--data", nargs="+", type=path, metavar="PATH", default=SUPPRESS, help=f"{data} (default: {default})")
    add_reading(group)
    add("--split-seed", type=at_least_0(int), default=0, help="draws training, validation and test subjects")
    add(
        "--split-file", type=Path, metavar="FILE", help="a run's split.json, or a YAML of the paper's authors"
    )
    overlap = "with M&Ms and M&Ms-2: keep the M&Ms-2 subjects with NOR, HCM or LV, who may also be in M&Ms"
    add("--keep-overlap", action="store_true", help=overlap)
    add("--skip-broken", action="store_true", help="leave out unreadable subjects, and name them")


def add_reading(parser: Parser) -> None:
    add, default = parser.add_argument, f"(default: {dataset.LABEL_SUFFIX}, or the checkpoint's)"
    suffix = f"plain folders: a label file is its cine's name with END before .nii or .nii.gz {default}"
    add("--label-suffix", default=SUPPRESS, metavar="END", help=suffix)
    store = "folder of the slice store and of the phantom"
    add("--cache", type=absolute_path, default=dataset.default_cache(), metavar="DIR", help=store)


def add_output(parser: Parser, default: str) -> Callable[..., Action]:
    """Returns `add_argument` of the group, for further flags."""
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--out", type=path, metavar="DIR", help=f"folder to write to (default: {default})")
    return add


def add_training(parser: Parser, data: str) -> None:
    """Every flag that trainings share. `data`: the default of --data, in words."""
    add_data(parser, data)
    add = parser.add_argument_group("network and images").add_argument
    add("--channels", type=positive(int), nargs="+", metavar="N", help="of each stage, two stages or more")
    add("--image-size", type=positive(int), metavar="PX", help="of the input, a multiple of 2^(stages - 1)")
    add("--spacing", type=positive(float), dest="spacing_mm", metavar="MM", help="pixel size of the input")
    add("--norm", choices=tuple(NORMS), default="batch", help="batch as in the paper, instance as in nnU-Net")
    off = "off: the plain centred crop (paper, section 2.6)"
    add("--augmentation", type=on_off, dest="augment", metavar="on|off", default="on", help=off)
    parser.set_defaults(**PAPER_NETWORK)

    add = parser.add_argument_group("optimisation", "defaults: supplement A of the paper").add_argument
    add("--epochs", type=positive(int), default=100, metavar="N", help="passes over the training slices")
    add("--batch-size", type=positive(int), metavar="N", help="slices per step")
    add("--lr", type=positive(float), help="highest learning rate")
    add("--schedule", choices=("cosine", "poly"), default="cosine", help="cosine to --final-lr, poly to 0")
    add("--final-lr", type=at_least_0(float), default=0.0, help="learning rate at the end of the cosine")
    add("--warmup-epochs", type=at_least_0(float), default=0.0, metavar="N", help="linear warm-up from 0")
    add("--momentum", type=fraction, default=0.9, help="of SGD")
    add("--nesterov", action=BooleanOptionalAction, default=False, help="Nesterov momentum")
    add("--weight-decay", type=at_least_0(float), default=1e-4, help="L2 penalty of SGD")
    precision = "mixed precision; fp16 needs a GPU (paper: off for PCL and fine-tuning)"
    add("--amp", choices=("fp16", "bf16", "off"), help=precision)
    add("--validate-every", type=positive(int), metavar="N", help="epochs (default: at most 20 times a run)")

    add = add_output(parser, "runs/<method and data>")
    add("--quick", action="store_true", help="small network, small images, few epochs: minutes on a CPU")
    add("--resume", metavar="auto|RUN", help="continue this run exactly; auto: that in --out, or start it")
    save = "save last.pt every N epochs, or at an epoch's end after N minutes (within an epoch: after 10 N)"
    add("--save-every", type=save_interval, default="1min", metavar="N|Nmin", help=save)
    skipped = "steps in a row that fp16 may leave out because a gradient overflows"
    add("--max-skipped", type=at_least_0(int), default=25, metavar="N", help=skipped)
    drawn = "draws initial weights, the order of slices, augmentation, and the subjects of --n-subjects"
    add("--seed", type=at_least_0(int), default=0, help=drawn)
    add("--deterministic", action="store_true", help="torch's deterministic algorithms: slower on a GPU")

    add = parser.add_argument_group("speed and memory").add_argument
    choices = {"choices": ("auto", "on", "off"), "default": "auto"}
    add("--compile", nargs="?", const="on", **choices, help="torch.compile; auto: long trainings on a GPU")
    add("--graph", choices=("auto", "off"), default="auto", help="replay compiled networks as CUDA graphs")
    add("--device-cache", **choices, help="keep all slices in device memory; auto: on a GPU, if they fit")
    half = "compute activations again in the backward pass: half the memory, a third more work, same losses"
    add("--grad-checkpoint", action=BooleanOptionalAction, default=False, help=half)
    measure = "measure at least N steps, their parts and the device's limits, then exit without a run folder"
    add("--benchmark", type=positive(int), metavar="N", help=measure)


def typed(argv: Sequence[str] | None, flag: str) -> bool:
    words = sys.argv[1:] if argv is None else argv
    return any(word == flag or word.startswith(flag + "=") for word in words)


def peek(argv: Sequence[str] | None, flag: str) -> str | None:
    """The value of one flag, read before the defaults of the others are known."""
    parser = Parser(add_help=False)
    parser.add_argument(flag, dest="value", type=path)
    return parser.parse_known_args(argv)[0].value


def resumed(argv: Sequence[str] | None, kind: str) -> Run | None:
    """The run that --resume and --out name. Raises UserError if it is no `kind`."""
    return find(peek(argv, "--resume"), peek(argv, "--out"), kind)


def set_defaults(
    parser: Parser, argv: Sequence[str] | None, method: type[Method], run: Run | None = None, **others: Any
) -> None:
    """Give the flags their defaults in order of precedence; `others`: those that a checkpoint decides."""
    parser.set_defaults(**method.defaults)
    if typed(argv, "--quick"):
        parser.set_defaults(**QUICK_NETWORK, **method.quick)
    parser.set_defaults(**others)
    if run:
        known = {action.dest for action in parser._actions} - {"device", "resume", "out"}
        parser.set_defaults(**{name: value for name, value in run.args.items() if name in known})


def refuse_changes(parser: Parser, args: Namespace, argv: Sequence[str] | None, run: Run | None) -> None:
    """Raise UserError for a typed flag that differs from what the run that goes on was started with."""
    for action in parser._actions if run else ():
        flag, before = action.option_strings[0], run.args.get(action.dest)
        now = json.loads(json.dumps(getattr(args, action.dest, None), default=str))
        same = action.dest in _MAY_CHANGE or now == before
        if run.finished and action.dest == "data":
            same = dataset.name(args.data) == dataset.name(before)
        if not same and any(typed(argv, name) for name in action.option_strings):
            what = f"the run in {run.folder} was started with {before}, got {now}"
            raise UserError(f"{flag}: {what}; leave the flag out, or start again in another --out")


def build(method: type[Method], args: Namespace) -> Method:
    """The method, each argument of its constructor taken from the flag of that name."""
    built = method(**{name: getattr(args, name) for name in parameters(method)})
    if args.grad_checkpoint:
        recompute_activations(built)
    return built


def parameters(method: type[Method]) -> list[str]:
    """The arguments of its constructor, and of those above it."""
    constructors = [each.__init__ for each in method.__mro__ if issubclass(each, Method)]
    found = [p for each in constructors for p in inspect.signature(each).parameters.values()]
    return list(dict.fromkeys(p.name for p in found if p.kind is p.KEYWORD_ONLY))


def settings(args: Namespace, batches: Batches) -> Settings:
    """How to train on these batches; prints what `auto` and fp16 mean on their device."""
    device, slices = batches.device, args.epochs * len(batches) * batches.batch_size
    if args.grad_checkpoint and args.compile == "on":
        print("compile: off, with --grad-checkpoint")
    choice = "off" if args.grad_checkpoint else args.compile
    compile = resolve_compile(choice, device, norm=args.norm, num_slices=slices)
    args.nesterov = args.nesterov and args.momentum > 0  # torch refuses one without the other
    return Settings(
        **{name: getattr(args, name) for name in (*OPTIMISATION, "seed", "save_every", "max_skipped")},
        amp=resolve_amp(args.amp, device),
        validate_every=args.validate_every or max(1, -(-args.epochs // 20)),
        compile=compile,
        graph=resolve_graph(args.graph, device, compiled=compile),
        hint="; add --quick to finish in minutes" * (device.type == "cpu" and not args.quick),
    )
