"""The flags of a resumed run: taken from the run, and refused if they say something else."""

import argparse
import json
import sys
from collections.abc import Sequence

from cmrssp.data import dataset
from cmrssp.errors import UserError
from cmrssp.runs.resume import Interrupted

# about the machine, about saving, or without effect on the training
_MAY_CHANGE = {"device", "out", "resume", "cache", "data", "save_every", "max_skipped", "help",
               "device_cache", "grad_checkpoint", "benchmark"}  # fmt: skip


def set_defaults(parser: argparse.ArgumentParser, run: Interrupted) -> None:
    """Give the flags the values that the run was started with, except for the device."""
    known = {action.dest for action in parser._actions} - {"device", "resume", "out"}
    parser.set_defaults(**{name: value for name, value in run.args.items() if name in known})


def refuse_changes(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None, run: Interrupted
) -> None:
    """Raise UserError for a typed flag that differs from what the run was started with."""
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for action in parser._actions:
        if action.dest in _MAY_CHANGE or not words & set(action.option_strings):
            continue
        value = json.loads(json.dumps(getattr(args, action.dest), default=str))
        if value != run.args.get(action.dest):
            what = f"was started with {run.args.get(action.dest)}, got {value}"
            why = "; the schedule depends on it" if action.dest == "epochs" else ""
            how = f"a resumed run must keep it{why}: leave the flag out, or start again in another --out"
            raise UserError(f"{action.option_strings[0]}: the run in {run.folder} {what}; {how}")
    if run.finished and "--data" in words and dataset.name(args.data) != dataset.name(run.args["data"]):
        what = f"the run in {run.folder} has finished, with {', '.join(run.args['data'])}"
        raise UserError(f"--data: {what}; start with other data in another --out")
