"""The means of an epoch, the progress bar, the remaining time, and the check that every number is finite."""

import math
import time
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm

from cmrssp.data.batches import Batches
from cmrssp.data.subject import listed
from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.runs.settings import Settings

_READ_EVERY_S = 1.0  # the host waits for the device's numbers this often, not in every step


class Progress:
    """Collects what the steps return, and reads it from the device about once a second."""

    def __init__(self, batches: Batches, settings: Settings) -> None:
        self.settings, self.keys = settings, list(batches.store.index)
        self.steps, self.batch_size = len(batches), batches.batch_size
        self.steps_left = self.steps * settings.epochs  # when this process starts
        self.estimated, self.count = False, 0
        self.figures: dict[str, str] = {}
        self.pending: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        self.in_a_row = 0
        each = f"{self.steps} steps of {self.batch_size} slices"
        print(f"{settings.epochs} epochs x {each} = {self.steps_left} steps", flush=True)
        slices, hidden = self.steps_left * self.batch_size, distributed.hide_bar()
        self.bar = tqdm(total=slices, unit="slice", disable=hidden, smoothing=0.05)

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch under way."""
        return {"sums": self.sums, "done": self.done, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any], steps_done: int) -> None:
        """Go on with the sums of `state` after `steps_done` steps of the training."""
        self.sums, self.in_a_row = dict(state["sums"]), state["in_a_row"]
        self.done, self.skipped = state["done"], state["skipped"]
        self.steps_left -= steps_done
        self.bar.update(steps_done * self.batch_size)

    def start_epoch(self, epoch: int, first_step: int = 0) -> None:
        """With a `first_step` above 0 the sums are those of the loaded state."""
        self.epoch, self.first_step = epoch, first_step
        if not first_step:
            self.sums: dict[str, float] = {}
            self.done = self.skipped = 0
        self.epoch_began = self.last_read = time.monotonic()

    def update(self, values: dict[str, torch.Tensor], subjects: torch.Tensor) -> None:
        """`values`: 0-d tensors of a step. `subjects` (B,): indices of the subjects of its slices."""
        self.pending.append((values, subjects))
        self.count += 1
        self.bar.update(self.batch_size)
        if not self.estimated:
            self._estimate()

    def due(self) -> bool:
        """Whether the last reading is long ago."""
        return time.monotonic() - self.last_read > _READ_EVERY_S

    def end_epoch(self) -> dict[str, float]:
        """The means over the epoch's finite steps (absent if there are none: an epoch can have one step), its
        number of non-finite steps, its speed and duration. Raises UserError as `read`.
        """
        self.read()
        seconds = time.monotonic() - self.epoch_began
        record = {name: total / (self.done - self.skipped) for name, total in self.sums.items()}
        if self.skipped:
            record["non_finite_steps"] = self.skipped
        speed = (self.done - self.first_step) * self.batch_size / seconds
        return {**record, "slices_per_s": round(speed, 1), "seconds": round(seconds, 3)}

    def print_epoch(self, record: dict[str, float], figures: dict[str, float]) -> None:
        """Print the record in a line that stays, and show the validation's figures in the bar."""
        self.figures = {name: f"{value:.4g}" for name, value in figures.items() if name != "validation_s"}
        shown = (f"{k} {v:.4g}" for k, v in record.items() if k not in ("epoch", "seconds", "validation_s"))
        self.bar.write(f"epoch {record['epoch']}/{self.settings.epochs} {' '.join(shown)}")

    def close(self) -> None:
        self.bar.close()

    def read(self) -> None:
        """Wait for the device and check its numbers since the last reading. All ranks call it together and
        see the same: the mean over the ranks. Raises UserError for a loss or a gradient that is not finite;
        under fp16 only for more than `max_skipped` of them in a row.
        """
        if not self.pending:
            return
        names = list(self.pending[0][0])
        found = torch.stack([torch.stack([values[n].float() for n in names]) for values, _ in self.pending])
        rows = distributed.mean(found).tolist()
        for row, (_, subjects) in zip(rows, self.pending, strict=True):
            self.done += 1
            if all(map(math.isfinite, row)):
                self.in_a_row = 0
                self.sums = {n: self.sums.get(n, 0.0) + value for n, value in zip(names, row, strict=True)}
                continue
            self.skipped += 1  # under fp16 the scaler lowers its scale and leaves the step out
            self.in_a_row += 1
            if self.settings.amp != "fp16" or self.in_a_row > self.settings.max_skipped:
                self._refuse(dict(zip(names, row, strict=True)), subjects)
        self.bar.set_postfix(loss=f"{rows[-1][0]:.4g}", **self.figures, refresh=False)
        self.pending, self.last_read = [], time.monotonic()

    def _refuse(self, row: dict[str, float], subjects: torch.Tensor) -> None:
        names = [self.keys[i] for i in distributed.gather(subjects).unique().tolist()]
        odd = ", ".join(f"{name} {value:g}" for name, value in row.items() if not math.isfinite(value))
        times = f", {self.in_a_row} times in a row (--max-skipped)" if self.settings.amp == "fp16" else ""
        where = f"epoch {self.epoch + 1}, step {self.done} of {self.steps}"
        how = f"the batch holds slices of {listed(names)}. Try a smaller --lr; earlier checkpoints stay"
        raise UserError(f"{where}: not finite: {odd}{times}; {how}")

    def _estimate(self) -> None:
        """Print the estimated time a second after the first step, which is slower and does not count."""
        if self.count == 1:
            self.first = time.monotonic()
            return
        seconds = time.monotonic() - self.first
        if seconds > 1 or self.count == min(20, self.steps_left):
            self.estimated, each = True, seconds / (self.count - 1)
            left = each * (self.steps_left - self.count)
            hint = self.settings.hint * (left > 3600)
            how = f"{each:.3g} s a step, validation not counted"
            self.bar.write(f"estimated time: {duration(left)} ({how}){hint}")


def duration(seconds: float) -> str:
    """Such as 2:05:00, hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
