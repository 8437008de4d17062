"""The Dice of the validation subjects while a network is fine-tuned."""

from collections.abc import Sequence

import numpy as np
import torch

from cmrssp import metrics
from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.hardware import distributed
from cmrssp.segmentation import Segmentation, predict_frames


def mean_dice(
    method: Segmentation, cines: Store, keys: Sequence[str], device: torch.device
) -> dict[str, float]:
    """3D Dice on the original grid, averaged over the ED and ES frames of the subjects `keys`: dice_<class>
    for each class that a reference has, and dice, their mean. Empty if there is none. The ranks share the
    subjects.
    """
    method.eval()
    mine = []
    for subject in (cines.index[key] for key in distributed.own_items(keys)):
        frames = sorted(set(cines.labels[subject].phases.values()))
        references = [cines.label_volume(subject, frame) for frame in frames]
        pairs = zip(predict_frames([method], cines, subject, frames, device), references, strict=True)
        mine.append([(metrics.dice(*pair), np.unique(pair[1])) for pair in pairs])
    method.train()
    found = [volume for subject in distributed.merge(mine) for volume in subject]
    means = {
        f"dice_{name}": float(np.mean([dice[name] for dice, _ in found]))
        for id, name in enumerate(CLASSES, start=1)
        if any(id in ids for _, ids in found)
    }
    return {"dice": float(np.mean(list(means.values()))), **means} if means else {}


def undetected(figures: dict[str, float]) -> list[str]:
    """The classes with a Dice of 0 in the figures of `mean_dice`."""
    return [name for name in CLASSES if figures.get(f"dice_{name}") == 0]
