"""Runs that were stopped go on: saving, signals, and the flags of a run that is taken up again."""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmrssp.data import dataset
from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.runs.folder import Run
from cmrssp.weights import checkpoints

_WITHIN_EPOCH = 10  # within an epoch the minutes between two saves are so many times longer
_ECHO_S = 1.0  # torchrun forwards a signal that a process may already have: within this time it is the same
_MAY_CHANGE = {
    "device",
    "out",
    "resume",
    "cache",
    "data",
    "save_every",
    "max_skipped",
    "help",
    "device_cache",
    "grad_checkpoint",
    "benchmark",
}
_STATES = ("next.pt", "last.pt", "previous.pt")  # the newest first, where saving was broken off


class Stopped(Exception):
    """A signal has ended the training; everything is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """Within it, the first SIGTERM, SIGINT or SIGUSR1 is noted, so that the step can end; the second does
    what it always does.
    """

    _WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self) -> "Signals":
        self.received: int | None = None
        self.agreed: int | None = None  # what any rank has received
        self.before = {}
        for number in self._WATCHED:
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are somebody else's business
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self.noted = number, time.monotonic()
            if distributed.world_size() == 1:
                self.__exit__()
        elif time.monotonic() - self.noted > _ECHO_S:
            self.__exit__()
            os.kill(os.getpid(), number)

    def share(self, *wishes: bool) -> list[int]:
        """[signal or 0, *wishes] that any rank has: all ranks then do the same after the same step."""
        number, *wishes = distributed.maximum(self.received or 0, *wishes)
        self.agreed = number or None
        return [number, *wishes]

    def stop_if_received(self, folder: Path, epochs: int, steps: int) -> None:
        if self.agreed is not None:
            raise Stopped(
                f"stopped by {signal.Signals(self.agreed).name} and saved after epoch {epochs}, step "
                f"{steps}; go on with: python {Path(sys.argv[0]).name} --resume {shlex.quote(str(folder))}",
                self.agreed,
            )


class Saver:
    """When to save last.pt, and how: the one before it stays as previous.pt until the next is whole."""

    def __init__(self, run: Run, every: str) -> None:
        self.folder, self.saved, self.first = run.folder, time.monotonic(), True
        self.minutes = float(every.removesuffix("min")) if every.endswith("min") else None
        self.epochs = int(every) if self.minutes is None else None

    def due(self, epochs_done: int | None = None) -> bool:
        """After the first epoch, then whenever so many epochs or minutes have passed; within an epoch
        (`epochs_done` None) after ten times as many minutes.
        """
        waited = time.monotonic() - self.saved
        if epochs_done is None:
            return self.minutes is not None and waited > 60 * self.minutes * _WITHIN_EPOCH
        if self.first:
            return True
        return epochs_done % self.epochs == 0 if self.epochs else waited > 60 * self.minutes

    def save(self, content: dict[str, Any]) -> None:
        """Rank 0 writes, the others wait for it."""
        with distributed.main_first():
            if distributed.is_main():
                self._write(content)
        self.saved, self.first = time.monotonic(), False

    def _write(self, content: dict[str, Any]) -> None:
        last, following = self.folder / "last.pt", self.folder / "next.pt"
        checkpoints.save(following, content)
        if last.exists():
            os.replace(last, self.folder / "previous.pt")
        os.replace(following, last)


@dataclass(frozen=True)
class Interrupted:
    """A run that --resume names, and how it was started."""

    folder: Path
    args: dict[str, Any]

    @property
    def finished(self) -> bool:
        return (self.folder / "unet.pt").is_file()

    @property
    def split(self) -> dict[str, list[str]]:
        return json.loads((self.folder / "split.json").read_text())

    def state(self) -> dict[str, Any]:
        """The content of last.pt, or of the one before it where that is damaged. Raises UserError."""
        damaged: list[Path] = []
        for name in _STATES:
            path = self.folder / name
            if path.is_file():
                try:
                    state = checkpoints.read(path)
                    if {"optimizer", "meter", "epochs_done", "steps_done"} <= state.keys():
                        if damaged:
                            print(f"{damaged[0]}: damaged; going on from {path}")
                        return state
                except UserError:
                    pass
                damaged.append(path)
        why = f"{' and '.join(map(str, damaged))} cannot be read" if damaged else "it was never saved"
        raise UserError(f"{self.folder}: nothing to go on from, {why}; start it again in another --out")


def find(auto_or_folder: str | None, out: str | None, kind: str) -> Interrupted | None:
    """The run that --resume names; None without one: `auto` starts anew then. Raises UserError."""
    if auto_or_folder is None:
        return None
    auto = auto_or_folder == "auto"
    if auto and out is None:
        raise UserError("--resume auto: needs --out, the folder of the run")
    folder = Path(out if auto else auto_or_folder).expanduser()
    if not (folder / "args.json").is_file() or not (folder / "split.json").is_file():
        if auto:
            return None
        raise UserError(
            f"--resume {folder}: expected the folder of a run, with args.json and split.json in it"
        )
    try:
        run = Interrupted(folder, dict(json.loads((folder / "args.json").read_text())))
        if not run.split.keys() >= {"train", "validation", "test"}:
            raise ValueError("split.json names no subjects")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its args.json or split.json is damaged ({error})") from None
    if run.args.get("kind") != kind:
        raise UserError(f"--resume {folder}: expected a {kind}, got a {run.args.get('kind')}")
    if not auto and out is not None and Path(out).expanduser().resolve() != folder.resolve():
        raise UserError(f"--out {out}: a run that goes on stays in its folder, {folder}; leave --out out")
    return None if auto and not _saved(folder) else run


def _saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*_STATES, "unet.pt"))


def set_defaults(parser: argparse.ArgumentParser, run: Interrupted) -> None:
    """What the run was started with, the device apart."""
    known = {action.dest for action in parser._actions} - {"device", "resume", "out"}
    parser.set_defaults(**{name: value for name, value in run.args.items() if name in known})


def refuse_changes(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None, run: Interrupted
) -> None:
    """Raise UserError for a typed flag that says something else than the run was started with."""
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for action in parser._actions:
        if action.dest in _MAY_CHANGE or not words & set(action.option_strings):
            continue
        value = json.loads(json.dumps(getattr(args, action.dest), default=str))
        if value != run.args.get(action.dest):
            why = "; the schedule depends on it" if action.dest == "epochs" else ""
            raise UserError(
                f"{action.option_strings[0]}: the run in {run.folder} was started with "
                f"{run.args.get(action.dest)}, got {value}; a run that goes on must keep it{why}: leave the "
                "flag out, or start anew in another --out"
            )
    if run.finished and "--data" in words and dataset.name(args.data) != dataset.name(run.args["data"]):
        raise UserError(
            f"--data: the run in {run.folder} has finished, with {', '.join(run.args['data'])}; start with "
            "other data in another --out"
        )


def open_run(
    interrupted: Interrupted | None,
    args: argparse.Namespace,
    default_name: str,
    images: dict[str, str],
    labels: dict[str, str],
) -> tuple[Run, dict | None]:
    """(the locked run folder, the state to go on from, None for a new run). Raises UserError where another
    process trains in the folder or has done so meanwhile, or the images of a training or validation subject,
    or the labels that are used, are no longer those that the run began with (both `check.digests`).
    """
    if interrupted is None:
        again = args.resume == "auto"
        run = Run(
            Path(distributed.from_main(lambda: str(Run.create(args.out, default_name, again=again).folder)))
        )
        run.lock()
        if distributed.is_main() and _saved(run.folder):
            raise UserError(f"--out {run.folder}: another process has trained in it meanwhile")
        print(f"run folder: {run.folder}")
        return run, None
    run = Run(interrupted.folder)
    run.lock()
    state = interrupted.state()
    recorded, split = (state["provenance"][name] for name in ("digests", "split"))
    if state["provenance"].get("labels", labels) != labels:
        raise UserError(
            f"--resume {run.folder}: its labels have changed since, or some are gone; bring them back, or "
            "start anew in another --out"
        )
    if any(images.get(key) != recorded[key] for key in (*split["train"], *split["validation"])):
        raise UserError(
            f"--resume {run.folder}: its training or validation cines have changed since, or some are gone; "
            "bring them back, or start anew in another --out"
        )
    done = f"after epoch {state['epochs_done']}" + (
        f", step {state['steps_done']}" if state["steps_done"] else ""
    )
    print(f"run folder: {run.folder}, going on {done}")
    before, now = interrupted.args.get("processes", 1), distributed.world_size()
    if before != now:
        print(f"started with {before} processes, going on with {now}: the augmentation draws will be others")
    return run, state
