"""An epoch's means, the progress bar, the remaining time, and the check that every number is finite."""

import math
import time

import torch
from tqdm import tqdm

from cmrssp.data.batches import Batches
from cmrssp.errors import UserError
from cmrssp.hardware import distributed

_READ_EVERY_S = 1.0  # the host waits for the device's numbers this often, not every step
_LONG_RUN_S = 3600.0


class Meter:
    """The epoch's means, the bar, the time that is left. Reads the device's numbers once a second."""

    def __init__(self, batches: Batches, settings, hint: str) -> None:
        self.steps, self.batch_size, self.keys = len(batches), batches.batch_size, batches.store.index
        self.epochs, self.amp, self.max_skipped = settings.epochs, settings.amp, settings.max_skipped
        self.compiles = settings.compile
        self.hint, self.estimated, self.began, self.count = hint, False, time.monotonic(), 0
        self.total_steps, self.figures, self.in_a_row = self.steps * settings.epochs, {}, 0
        self.saved: dict | None = None
        print(
            f"{settings.epochs} epochs x {self.steps} steps of {self.batch_size} slices = {self.total_steps} "
            "steps",
            flush=True,
        )
        self.bar = tqdm(
            total=self.total_steps * self.batch_size,
            unit="slice",
            disable=distributed.hide_bar(),
            smoothing=0.05,
        )

    def state_dict(self) -> dict:
        """The sums of the epoch that is under way."""
        return {"sums": self.sums, "done": self.done, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict, steps_done: int) -> None:
        self.saved = state
        self.total_steps -= steps_done
        self.bar.update(steps_done * self.batch_size)

    def start_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.epoch, self.sums, self.pending, self.done, self.skipped = epoch, {}, [], 0, 0
        if self.saved:
            self.in_a_row = self.saved["in_a_row"]
            if first_step:
                self.sums = dict(self.saved["sums"])
                self.done, self.skipped = self.saved["done"], self.saved["skipped"]
            self.saved = None
        self.first_step = first_step
        self.epoch_began = self.last_read = time.monotonic()

    def update(self, values: dict[str, torch.Tensor], subjects: torch.Tensor) -> None:
        """`values`: 0-d tensors of a step; `subjects` (B,): whose slices they come from."""
        self.pending.append((values, subjects))
        self.count += 1
        self.bar.update(self.batch_size)
        if not self.estimated:
            self._estimate()

    def due(self) -> bool:
        """Has it been long since the device's numbers were read?"""
        return time.monotonic() - self.last_read > _READ_EVERY_S

    def end_epoch(self) -> dict[str, float]:
        self.read()
        if self.skipped == self.done:
            raise UserError(
                f"epoch {self.epoch + 1}: every loss is NaN or infinite under fp16; try --amp bf16, or a "
                "smaller --lr. What was saved before stays"
            )
        seconds = time.monotonic() - self.epoch_began
        record = {name: total / (self.done - self.skipped) for name, total in self.sums.items()}
        if self.skipped:
            record["non_finite_steps"] = self.skipped
        return {
            **record,
            "slices_per_s": round((self.done - self.first_step) * self.batch_size / seconds, 1),
            "seconds": round(seconds, 3),
        }

    def say(self, record: dict[str, float], figures: dict[str, float]) -> None:
        """One line that stays, and the validation's figures in the bar: nothing stands in the bar alone."""
        self.figures = {name: f"{value:.4g}" for name, value in figures.items()}
        shown = (f"{k} {v:.4g}" for k, v in record.items() if k not in ("epoch", "seconds", "validation_s"))
        self.bar.write(f"epoch {record['epoch']}/{self.epochs} {' '.join(shown)}")

    def close(self) -> None:
        self.bar.close()

    def read(self) -> None:
        """Wait for the device, and check what it has found since the last time. All ranks do it at once, and
        see the same: the mean of what each of them has found. Raises UserError for a loss
        or a gradient that is not finite; under fp16 only for more than `max_skipped` of them in a row.
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
                for name, value in zip(names, row, strict=True):
                    if self.amp != "fp16" or name != "gradient_norm":  # there it is scaled
                        self.sums[name] = self.sums.get(name, 0.0) + value
                continue
            self.skipped += 1  # under fp16 the scaler lowers its scale and leaves the step out
            self.in_a_row += 1
            if self.amp != "fp16" or self.in_a_row > self.max_skipped:
                self._refuse(dict(zip(names, row, strict=True)), subjects)
        self.bar.set_postfix(loss=f"{rows[-1][0]:.4g}", **self.figures, refresh=False)
        self.pending, self.last_read = [], time.monotonic()

    def _refuse(self, row: dict[str, float], subjects: torch.Tensor) -> None:
        keys = list(self.keys)
        names = [keys[i] for i in sorted(set(distributed.gather(subjects).tolist()))]
        odd = ", ".join(f"{name} {value:g}" for name, value in row.items() if not math.isfinite(value))
        raise UserError(
            f"epoch {self.epoch + 1}, step {self.done} of {self.steps}: not finite: {odd}"
            + (f", {self.in_a_row} times in a row (--max-skipped)" if self.amp == "fp16" else "")
            + f"; the batch holds slices of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}. Try a "
            "smaller --lr; what was saved before stays"
        )

    def _estimate(self) -> None:
        """After a few steps (the first is slower and does not count), or the first one that takes half a
        minute, unless it compiled the networks.
        """
        steps, now = self.count, time.monotonic()
        if steps == 1:
            self.first = now
        slow_first = steps == 1 and now - self.began > 30 and not self.compiles
        if not (slow_first or (steps > 1 and now - self.first > 1) or steps == min(20, self.total_steps)):
            return
        self.estimated = True
        each = now - self.began if steps == 1 else (now - self.first) / (steps - 1)
        left = each * (self.total_steps - steps)
        self.bar.write(
            f"estimated time: {duration(left)} ({each:.3g} s a step, validation not counted)"
            + (f"; {self.hint}" if self.hint and left > _LONG_RUN_S else "")
        )


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 05 min, 3 min 10 s, 12 s."""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
