"""What tests need to run the training loop by hand."""

from pathlib import Path

from cmrssp.runs.folder import Run
from cmrssp.runs.settings import Settings
from cmrssp.segmentation import Segmentation
from cmrssp.training import train
from cmrssp.weights.provenance import Provenance

ORIGIN = Provenance(method="by hand", data=[], split={}, split_seed=0, seed=0, subjects=[])
_SETTINGS = {"epochs": 3, "lr": 0.05, "schedule": "poly", "final_lr": 0.0, "warmup_epochs": 0.0,
             "momentum": 0.9,
             "nesterov": True, "weight_decay": 0.01, "amp": "off", "seed": 4, "validate_every": 1,
             "save_every": "1min", "max_skipped": 25, "compile": False}  # fmt: skip


def segmentation(**changes) -> Segmentation:
    """A tiny one of new weights, without augmentation."""
    network = {"channels": (4, 8), "norm": "batch", "image_size": 64, "spacing_mm": 1.5, "augment": False}
    return Segmentation(**{**network, "freeze_encoder": 0.0, "encoder_lr_factor": 1.0, **changes})


def settings(**changes) -> Settings:
    return Settings(**{**_SETTINGS, **changes})


def run_training(
    method, batches, folder: Path, *, validate=lambda method, epoch: {}, state=None, **changes
) -> Run:
    """Train in a new folder, or with `state` in the one that holds the run, to the end and leave unet.pt."""
    run = Run(folder) if state else Run.create(str(folder), "")
    run.finish(train(method, batches, settings(**changes), run, ORIGIN, validate, state))
    return run
