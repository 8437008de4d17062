"""The one training loop. It trains every method: those that pretrain, and segmentation."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cmrssp.data.batches import Batch, Batches
from cmrssp.hardware import distributed
from cmrssp.hardware.device import AMP_TYPES, report_graph_fallback, untuned
from cmrssp.runs.folder import Run
from cmrssp.runs.progress import Progress
from cmrssp.runs.requests import Requests
from cmrssp.runs.settings import Settings, learning_rate
from cmrssp.runs.signals import holding
from cmrssp.ssp.method import Method
from cmrssp.weights.provenance import Provenance

_CAPTURED_AFTER = 4  # steps: torch warms up, then captures its graphs
Validation = Callable[[Method, int], dict[str, float]]  # (method, epochs done) -> figures for the log


def step_generator(seed: int, epoch: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so that a resumed run draws the same numbers."""
    state = np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Step:
    """The network on its device, its optimiser and scaler, and one step of them."""

    def __init__(self, method: Method, batches: Batches, settings: Settings) -> None:
        """Moves `method` to the device of the batches and compiles it there if the settings say so."""
        self.method, self.settings, self.device = method, settings, batches.device
        self.steps_per_epoch = len(batches)
        method.to(self.device, memory_format=torch.channels_last).train()
        if settings.compile:
            method.compile_networks("reduce-overhead" if settings.graph else None)
        self.network = distributed.wrap(method, self.device)
        self.optimizer = torch.optim.SGD(
            method.param_groups(settings.weight_decay),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            fused=True,
        )
        # Every momentum starts at 0: the fused kernel would start from uninitialised memory if fp16 leaves
        # out the first step, and it refuses a parameter that gets its first gradient later.
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if settings.momentum else ():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.done = 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take `optimizer` and `scaler` from the content of a last.pt."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty after steps without fp16, as on a CPU
            self.scaler.load_state_dict(state["scaler"])

    def autocast(self) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(self.device.type, AMP_TYPES.get(amp), enabled=amp != "off")

    def __call__(self, batch: Batch, epoch: int, number: int) -> dict[str, torch.Tensor]:
        """Step `number` of an epoch. Returns 0-d tensors that stay on the device: loss, gradient_norm, and
        what the method logs. The host never waits for the device here.
        """
        now = epoch + number / self.steps_per_epoch
        if self.settings.graph:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs may overwrite what the last step left
            self.done += 1
            if self.done == _CAPTURED_AFTER:
                report_graph_fallback()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, now) * group.get("lr_factor", 1.0)
        generator = step_generator(self.settings.seed, epoch, number, distributed.rank())
        views = self.method.views(batch, generator)
        with self.autocast():
            loss, logs = self.network(views, now)
        self.scaler.scale(loss).backward()
        self.method.on_backward_end(now)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.on_step_end(now)
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach().clone(), "gradient_norm": norm, **logs}


def train(
    method: Method,
    batches: Batches,
    settings: Settings,
    run: Run,
    provenance: Provenance,
    validate: Validation,
    state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `method` to the end of its schedule. Returns the content of unet.pt for `run.finish`.

    Leaves last.pt and log.jsonl in the run's folder. `validate(method, epoch)` runs every `validate_every`
    epochs and after the last one; its figures go to the log. With `state`, the content of a last.pt, the
    training goes on as if it had never been interrupted. A signal ends it with `Stopped` after the step under
    way, once that is saved. Under torchrun all ranks call it, each with its part of the batches.
    """
    step, progress = Step(method, batches, settings), Progress(batches, settings)
    first_epoch = first_step = 0
    if state:
        provenance, first_epoch, first_step = _restore(state, method, step, progress)
        run.keep_log(first_epoch)
    with holding() as inbox:
        requests = Requests(inbox, progress, settings.save_every)
        stream = batches.epochs(first_epoch, settings.epochs, first_step)
        for epoch in range(first_epoch, settings.epochs):
            progress.start_epoch(epoch, first_step)
            for number in range(first_step, len(batches)):
                batch = next(stream)
                progress.update(step(batch, epoch, number), batch["subject"])
                request = requests.after_step()
                if request.read:
                    progress.read()
                if request.save:
                    run.save(_state(method, step, progress, provenance, epoch, number + 1))
                    requests.saved(request, run.folder, epoch, number + 1)
            first_step, last = 0, epoch + 1 == settings.epochs
            rate = learning_rate(settings, epoch + (len(batches) - 1) / len(batches))
            record = {"epoch": epoch + 1, "lr": rate, **progress.end_epoch()}
            if last or (epoch + 1) % settings.validate_every == 0:
                figures = _timed(validate, method, epoch + 1, settings)
                record |= figures
                progress.print_epoch(record, figures)
            run.log(record)
            request = requests.after_epoch(epoch + 1, last=last)
            if request.save:
                run.save(_state(method, step, progress, provenance, epoch + 1, 0))
                requests.saved(request, run.folder, epoch + 1, 0)
    progress.close()
    content = transferable(method, replace(provenance, epochs=settings.epochs))
    weights = {key: value.cpu() for key, value in content["state_dict"].items()}  # loads without a GPU
    return {**content, "state_dict": weights}


def transferable(method: Method, provenance: Provenance) -> dict[str, Any]:
    """The content of unet.pt: the weights that transfer, their network's configuration, their origin."""
    return {
        "state_dict": method.pretrained_state(),
        "config": method.config(),
        "provenance": provenance.to_dict(),
    }


def _state(
    method: Method, step: Step, progress: Progress, provenance: Provenance, epochs: int, steps: int
) -> dict[str, Any]:
    """The content of last.pt after so many epochs and, in the next one, steps."""
    progress.read()  # a loss that is not finite ends the run before it is saved
    return {
        **transferable(method, replace(provenance, epochs=epochs)),
        "method": method.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.scaler.state_dict(),
        "progress": progress.state_dict(),
        "epochs_done": epochs,
        "steps_done": steps,
    }


def _restore(
    state: dict[str, Any], method: Method, step: Step, progress: Progress
) -> tuple[Provenance, int, int]:
    """Take everything from the content of a last.pt. Returns its provenance, epochs and steps done."""
    method.load_state_dict(state["method"])
    step.load_state_dict(state)
    epochs, steps = state["epochs_done"], state["steps_done"]
    progress.load_state_dict(state["progress"], epochs * step.steps_per_epoch + steps)
    return Provenance.from_dict(state["provenance"]), epochs, steps


def _timed(validate: Validation, method: Method, epochs_done: int, settings: Settings) -> dict[str, float]:
    began = time.monotonic()
    distributed.broadcast_buffers(method)
    with untuned(settings.compile):
        figures = validate(method, epochs_done)
    return {**figures, "validation_s": round(time.monotonic() - began, 3)}
