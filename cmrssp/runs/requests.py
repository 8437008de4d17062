"""What a training is asked to do after a step: save, stop, or read the device's numbers."""

import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cmrssp.hardware import distributed
from cmrssp.runs.progress import Progress
from cmrssp.runs.signals import Inbox, Stopped

_WITHIN_EPOCH = 10  # within an epoch, saving waits for this many times the minutes of --save-every


@dataclass(frozen=True)
class Request:
    """The same on all ranks: what one of them is asked to do, all do."""

    stop: int | None = None  # the signal that ends the run
    save: bool = False
    read: bool = False  # the numbers that the steps have left on the device


class Requests:
    """Collects requests from signals and clocks. `save_every`: minutes ("1min") or epochs ("5")."""

    def __init__(self, inbox: Inbox, progress: Progress, save_every: str) -> None:
        self.inbox, self.progress = inbox, progress
        self.last_save, self.never_saved = time.monotonic(), True
        self.minutes = float(save_every.removesuffix("min")) if save_every.endswith("min") else None
        self.epochs = int(save_every) if self.minutes is None else None

    def after_step(self) -> Request:
        late = self.minutes is not None and self._waited() > 60 * self.minutes * _WITHIN_EPOCH
        return self._agree(late, self.progress.due())

    def after_epoch(self, epochs_done: int, *, last: bool) -> Request:
        """Saves after the first epoch, the last, and as `save_every` says. Nothing stops a finished run."""
        due = epochs_done % self.epochs == 0 if self.epochs else self._waited() > 60 * self.minutes
        request = self._agree(last or self.never_saved or due, False)
        return replace(request, stop=None) if last else request

    def saved(self, request: Request, folder: Path, epochs: int, steps: int) -> None:
        """Start the clock again. Raises Stopped if the run was asked to stop."""
        self.last_save, self.never_saved = time.monotonic(), False
        if request.stop:
            name, script = signal.Signals(request.stop).name, Path(sys.argv[0]).name
            what = f"stopped by {name} and saved after epoch {epochs}, step {steps}; go on with: "
            raise Stopped(f"{what}python {script} --resume {shlex.quote(str(folder))}", request.stop)

    def _waited(self) -> float:
        return time.monotonic() - self.last_save

    def _agree(self, save: bool, read: bool) -> Request:
        number, save, read = distributed.maximum(self.inbox.number or 0, save, read)
        return Request(stop=number or None, save=bool(save or number), read=bool(read))
