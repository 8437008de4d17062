"""How a method is trained: optimisation, precision, saving."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a method is trained. Every value but `hint` comes from the flag of its name."""

    epochs: int
    lr: float
    schedule: str  # "cosine" or "poly"
    final_lr: float  # at the end of the cosine
    warmup_epochs: float
    momentum: float
    nesterov: bool
    weight_decay: float
    amp: str  # "fp16", "bf16" or "off"
    seed: int
    validate_every: int  # epochs
    save_every: str  # minutes ("1min") or epochs ("5")
    max_skipped: int  # steps in a row that fp16 may leave out
    compile: bool = False  # the networks, by torch.compile
    graph: bool = False  # replay the compiled networks as CUDA graphs
    hint: str = ""  # what to try if the run turns out to take more than an hour


def learning_rate(settings: Settings, epoch: float) -> float:
    """At a fractional epoch: linear warm-up from 0, then cosine to `final_lr` or poly (power 0.9) to 0."""
    warmup = min(settings.warmup_epochs, settings.epochs)
    if epoch < warmup:
        return settings.lr * epoch / warmup
    progress = (epoch - warmup) / max(settings.epochs - warmup, 1e-12)
    if settings.schedule == "poly":
        return settings.lr * (1 - progress) ** 0.9
    return settings.final_lr + 0.5 * (settings.lr - settings.final_lr) * (1 + math.cos(math.pi * progress))
