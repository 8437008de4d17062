"""What a training is asked to do after a step: save, stop, or read the device's numbers."""

import math
import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cmrssp.hardware import distributed
from cmrssp.runs.progress import Progress
from cmrssp.runs.signals import Stopped

_WITHIN_EPOCH = 10  # within an epoch, saving waits for this many times the minutes of --save-every


@dataclass(frozen=True)
class Request:
    """The same on all ranks: what one of them is asked to do, all do."""

    stop: int  # the signal that ends the run, or 0
    save: bool
    read: bool  # the numbers that the steps have left on the device


class Requests:
    """Collects requests from signals and clocks. `save_every`: minutes ("1min") or epochs ("5")."""

    def __init__(self, signals: list[int], progress: Progress, save_every: str) -> None:
        self.signals, self.progress = signals, progress
        self.last_save, self.never_saved = time.monotonic(), True
        number, by_time = save_every.removesuffix("min"), save_every.endswith("min")
        self.seconds, self.epochs = (60 * float(number), math.inf) if by_time else (math.inf, int(number))

    def after_step(self) -> Request:
        return self._agree(self._waited() > _WITHIN_EPOCH * self.seconds, self.progress.due())

    def after_epoch(self, epochs_done: int, *, last: bool) -> Request:
        """Saves after the first epoch, the last, and as `save_every` says. Nothing stops a finished run."""
        due = epochs_done % self.epochs == 0 or self._waited() > self.seconds
        request = self._agree(last or self.never_saved or due, False)
        return replace(request, stop=0) if last else request

    def saved(self, request: Request, folder: Path, epochs: int, steps: int) -> None:
        """Start the clock again. Raises Stopped if the run was asked to stop."""
        self.last_save, self.never_saved = time.monotonic(), False
        if request.stop:
            name, script = signal.Signals(request.stop).name, Path(sys.argv[0]).name
            processes = distributed.local_world_size()
            start = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}"
            what = f"stopped by {name} and saved after epoch {epochs}, step {steps}; go on with: {start}"
            raise Stopped(f"{what} {script} --resume {shlex.quote(str(folder))}", request.stop)

    def _waited(self) -> float:
        return time.monotonic() - self.last_save

    def _agree(self, save: bool, read: bool) -> Request:
        first = self.signals[0] if self.signals else 0
        stop, save, read = distributed.maximum(first, save, read)
        return Request(stop, bool(save or stop), bool(read))
