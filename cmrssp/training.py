"""The one training loop: five objectives, one way to train them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from cmrssp import weights
from cmrssp.data.batches import Batches
from cmrssp.errors import UserError
from cmrssp.run import Run
from cmrssp.ssp.method import Method

_READ_EVERY_S = 1.0  # the host waits for the device's numbers this often, not every step
_SAVE_EVERY_S = 60.0
_LONG_RUN_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    epochs: int
    lr: float
    schedule: str  # "cosine" or "poly"
    final_lr: float  # of the cosine
    warmup_epochs: float
    momentum: float
    nesterov: bool
    weight_decay: float
    amp: str  # "fp16", "bf16" or "off"
    seed: int
    validate_every: int  # epochs


def learning_rate(settings: Settings, epoch: float) -> float:
    """At a fractional epoch: linear warm-up from 0, then cosine to `final_lr` or poly (power 0.9) to 0."""
    warmup = min(settings.warmup_epochs, settings.epochs)
    if epoch < warmup:
        return settings.lr * epoch / warmup
    progress = (epoch - warmup) / max(settings.epochs - warmup, 1e-12)
    if settings.schedule == "poly":
        return settings.lr * (1 - progress) ** 0.9
    return settings.final_lr + 0.5 * (settings.lr - settings.final_lr) * (1 + math.cos(math.pi * progress))


def step_generator(seed: int, epoch: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator that depends on its arguments alone: a resumed run draws what an unbroken one would
    have.
    """
    state = np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def train(
    method: Method,
    batches: Batches,
    settings: Settings,
    run: Run,
    *,
    config: dict,
    provenance: dict,
    validate: Callable[[Method, int], dict[str, float]],
    hint: str = "",
) -> None:
    """Train `method` to the end of its schedule and leave last.pt, unet.pt and log.jsonl in the run's folder.

    `validate(method, epoch)` is called every `validate_every` epochs and after the last; its figures go to
    the log.
    """
    device = batches.device
    method.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        method.param_groups(settings.weight_decay),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    amp_type = torch.bfloat16 if settings.amp == "bf16" else torch.float16
    meter = Meter(len(batches), batches.batch_size, settings, hint)
    saved = -math.inf
    for epoch in range(settings.epochs):
        meter.start_epoch(epoch)
        for step, batch in enumerate(batches.epoch(epoch)):
            now = epoch + step / len(batches)
            lr = learning_rate(settings, now)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_factor", 1.0)
            views = method.views(batch, step_generator(settings.seed, epoch, step))
            with torch.autocast(device.type, amp_type, enabled=settings.amp != "off"):
                loss, logs = method(views, now)
            scaler.scale(loss).backward()
            method.on_backward_end(now)
            scaler.step(optimizer)
            scaler.update()
            method.on_step_end(now)
            optimizer.zero_grad(set_to_none=True)
            meter.update({"loss": loss.detach(), **logs})
        record = {"epoch": epoch + 1, "lr": lr, **meter.end_epoch()}
        last = epoch + 1 == settings.epochs
        if last or (epoch + 1) % settings.validate_every == 0:
            began = time.monotonic()
            figures = validate(method, epoch + 1)
            record |= figures
            record["validation_s"] = round(time.monotonic() - began, 3)
            meter.say(record, figures)
        run.log(record)
        if last or time.monotonic() - saved > _SAVE_EVERY_S:
            content = {
                "state_dict": method.pretrained_state(),
                "config": config,
                "provenance": {**provenance, "epochs": epoch + 1},
            }
            weights.save(
                run.folder / "last.pt",
                {
                    **content,
                    "method": method.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "epochs_done": epoch + 1,
                },
            )
            if last:
                weights.save(run.folder / "unet.pt", content)
            saved = time.monotonic()
    meter.close()


class Meter:
    """The epoch's means, the bar, the time that is left. Reads the device's numbers once a second."""

    def __init__(self, steps: int, batch_size: int, settings: Settings, hint: str) -> None:
        self.steps, self.batch_size, self.epochs, self.amp = steps, batch_size, settings.epochs, settings.amp
        self.hint, self.estimated, self.began, self.count = hint, False, time.monotonic(), 0
        self.total_steps, self.figures = steps * settings.epochs, {}
        print(
            f"{settings.epochs} epochs x {steps} steps of {batch_size} slices = {self.total_steps} steps",
            flush=True,
        )
        self.bar = tqdm(total=self.total_steps * batch_size, unit="slice", disable=None, smoothing=0.05)

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.sums, self.pending, self.done, self.skipped = epoch, {}, [], 0, 0
        self.epoch_began = self.last_read = time.monotonic()

    def update(self, values: dict[str, torch.Tensor]) -> None:
        self.pending.append(values)
        self.count += 1
        self.bar.update(self.batch_size)
        if not self.estimated:
            self._estimate()
        if time.monotonic() - self.last_read > _READ_EVERY_S:
            self._read()

    def end_epoch(self) -> dict[str, float]:
        self._read()
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
            "slices_per_s": round(self.done * self.batch_size / seconds, 1),
            "seconds": round(seconds, 3),
        }

    def say(self, record: dict[str, float], figures: dict[str, float]) -> None:
        """One line that stays, and the validation's figures in the bar: nothing stands in the bar alone."""
        self.figures = {name: f"{value:.4g}" for name, value in figures.items()}
        figures = " ".join(
            f"{k} {v:.4g}" for k, v in record.items() if k not in ("epoch", "seconds", "validation_s")
        )
        self.bar.write(f"epoch {record['epoch']}/{self.epochs} {figures}")

    def close(self) -> None:
        self.bar.close()

    def _read(self) -> None:
        if not self.pending:
            return
        names = list(self.pending[0])
        rows = torch.stack(
            [torch.stack([values[n].float() for n in names]) for values in self.pending]
        ).tolist()
        for row in rows:
            self.done += 1
            if all(map(math.isfinite, row)):
                for name, value in zip(names, row, strict=True):
                    self.sums[name] = self.sums.get(name, 0.0) + value
            elif self.amp == "fp16":
                self.skipped += 1  # the scaler lowers its scale and leaves the step out
            else:
                raise UserError(
                    f"epoch {self.epoch + 1}, step {self.done} of {self.steps}: the loss is {row[0]}; try "
                    "a smaller --lr. What was saved before stays"
                )
        self.bar.set_postfix(loss=f"{rows[-1][0]:.4g}", **self.figures, refresh=False)
        self.pending, self.last_read = [], time.monotonic()

    def _estimate(self) -> None:
        """After a few steps (the first is slower and does not count), or the first one that takes half a
        minute.
        """
        steps, now = self.count, time.monotonic()
        if steps == 1:
            self.first = now
        slow_first = steps == 1 and now - self.began > 30
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
