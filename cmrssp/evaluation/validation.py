"""The Dice of the validation subjects while a network is fine-tuned."""

from collections.abc import Sequence

import torch

from cmrssp import metrics
from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.hardware import distributed
from cmrssp.segmentation import Segmentation, predict_frames


def mean_dice(
    method: Segmentation, cines: Store, keys: Sequence[str], device: torch.device
) -> dict[str, float]:
    """3D Dice on the original grid over the ED and ES frames of the subjects: of each class that a reference
    has, and their mean. The ranks divide the subjects among themselves.
    """
    mine: list[tuple[list[dict[str, float]], list[str]]] = []
    for subject in (cines.index[key] for key in distributed.own_items(keys)):
        frames = sorted(set(cines.labels[subject].phases.values()))
        references = [cines.label_volume(subject, frame) for frame in frames]
        pairs = zip(predict_frames([method], cines, subject, frames, device), references, strict=True)
        mine.append(([metrics.dice(*pair) for pair in pairs], metrics.present_classes(references)))
    found = distributed.merge(mine)
    present = [name for name in CLASSES if any(name in classes for _, classes in found)]
    return metrics.mean_dice([score for scores, _ in found for score in scores], present)


def undetected(figures: dict[str, float]) -> list[str]:
    """The classes with a Dice of 0 in the figures of `mean_dice`."""
    return [name for name in CLASSES if figures.get(f"dice_{name}") == 0]
