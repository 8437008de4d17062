"""The one training loop: five objectives, one way to train them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cmrssp.data.batches import Batch, Batches
from cmrssp.hardware import distributed
from cmrssp.hardware.device import AMP_TYPES, untuned
from cmrssp.runs.folder import Run
from cmrssp.runs.progress import Meter
from cmrssp.runs.resume import Saver, Signals
from cmrssp.ssp.method import Method
from cmrssp.weights import checkpoints


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
    save_every: str  # minutes ("1min") or epochs ("1")
    max_skipped: int  # steps in a row that fp16 may leave out
    compile: bool = False  # the networks, by torch.compile


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


class Step:
    """One step of the optimiser, all of it: schedule, views, forward, backward, update.

    The host reads nothing back from the device in it: what a step finds stays there until somebody reads it.
    """

    def __init__(self, method: Method, batches: Batches, settings: Settings) -> None:
        """Takes `method` to the device of the batches, and compiles it there if the settings say so."""
        self.method, self.settings, self.steps, self.device = method, settings, len(batches), batches.device
        method.to(self.device, memory_format=torch.channels_last).train()
        if settings.compile:
            method.compile_networks()
        self.network = distributed.wrap(method, self.device)
        self.optimizer = torch.optim.SGD(
            method.param_groups(settings.weight_decay),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            fused=True,
        )
        self._begin_momentum()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")

    def _begin_momentum(self) -> None:
        """From 0, of every parameter: where fp16 leaves out the first step, the fused kernel would go on from
        whatever the memory held, and it takes no parameter that joins its group later.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def load_state_dict(self, state: dict) -> None:
        """`optimizer` and `scaler` of a last.pt, also of one whose optimiser was not fused."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = True, None
        self._begin_momentum()
        if state["scaler"]:  # empty after steps without fp16, as on a CPU
            self.scaler.load_state_dict(state["scaler"])

    def autocast(self) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(self.device.type, AMP_TYPES.get(amp), enabled=amp != "off")

    def __call__(self, batch: Batch, epoch: int, number: int) -> dict[str, torch.Tensor]:
        """0-d tensors on the device: loss, gradient_norm (under fp16 a scaled one), what the method logs."""
        now = epoch + number / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, now) * group.get("lr_factor", 1.0)
        views = self.method.views(
            batch, step_generator(self.settings.seed, epoch, number, distributed.rank())
        )
        with self.autocast():
            loss, logs = self.network(views, now)
        self.scaler.scale(loss).backward()
        self.method.on_backward_end(now)
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.on_step_end(now)
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "gradient_norm": norm, **logs}


def train(
    method: Method,
    batches: Batches,
    settings: Settings,
    run: Run,
    *,
    config: dict,
    provenance: dict,
    validate: Callable[[Method, int], dict[str, float]],
    draw: Callable[[], None] | None = None,
    hint: str = "",
    state: dict | None = None,
) -> None:
    """Train `method` to the end of its schedule and leave last.pt, unet.pt and log.jsonl in the run's folder.

    `validate(method, epoch)` is called every `validate_every` epochs and after the last; its figures go to
    the log. `draw()` makes the last pictures, on rank 0; only then unet.pt says that the run is finished.
    With `state`, the content of a last.pt, the training goes on after its last step, as if it had never been
    interrupted. A signal ends it with `Stopped`, once the step is done and saved. Under torchrun all ranks
    call it, each with its share of the batches; what one of them is told to do, all do.
    """
    step = Step(method, batches, settings)
    meter = Meter(batches, settings, hint)
    saver = Saver(run, settings.save_every)
    first_epoch, first_step = 0, 0
    if state:
        config, provenance = state["config"], state["provenance"]
        method.load_state_dict(state["method"])
        step.load_state_dict(state)
        first_epoch, first_step = state["epochs_done"], state["steps_done"]
        meter.load_state_dict(state["meter"], first_epoch * len(batches) + first_step)
        run.keep_log(first_epoch)

    def save(epochs: int, steps: int) -> None:
        meter.read()  # a loss that is not finite ends the run before it is saved
        saver.save(
            {
                "state_dict": method.pretrained_state(),
                "config": config,
                "provenance": {**provenance, "epochs": epochs},
                "method": method.state_dict(),
                "optimizer": step.optimizer.state_dict(),
                "scaler": step.scaler.state_dict(),
                "meter": meter.state_dict(),
                "epochs_done": epochs,
                "steps_done": steps,
            }
        )

    with Signals() as signals:
        stream = batches.epochs(first_epoch, settings.epochs, first_step)
        for epoch in range(first_epoch, settings.epochs):
            meter.start_epoch(epoch, first_step)
            for number in range(first_step, len(batches)):
                batch = next(stream)
                meter.update(step(batch, epoch, number), batch["subject"])
                stop, save_now, read_now = signals.share(saver.due(), meter.due())
                if read_now:
                    meter.read()
                if stop or save_now:
                    save(epoch, number + 1)
                    signals.stop_if_received(run.folder, epoch, number + 1)
            first_step = 0
            record = {
                "epoch": epoch + 1,
                "lr": learning_rate(settings, epoch + (len(batches) - 1) / len(batches)),
                **meter.end_epoch(),
            }
            last = epoch + 1 == settings.epochs
            if last or (epoch + 1) % settings.validate_every == 0:
                began = time.monotonic()
                distributed.broadcast_buffers(method)
                with untuned(settings.compile):
                    figures = validate(method, epoch + 1)
                record |= figures
                record["validation_s"] = round(time.monotonic() - began, 3)
                meter.say(record, figures)
            run.log(record)
            stop, save_now = signals.share(saver.due(epoch + 1))
            if last or stop or save_now:
                save(epoch + 1, 0)
            if not last:
                signals.stop_if_received(run.folder, epoch + 1, 0)
    done = {"config": config, "provenance": {**provenance, "epochs": settings.epochs}}
    if distributed.is_main():
        if draw:
            draw()
        checkpoints.save(run.folder / "unet.pt", {"state_dict": method.pretrained_state(), **done})
    (run.folder / "previous.pt").unlink(missing_ok=True)
    meter.close()
