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
    for each class that a reference has, over the phases in which one has it, and dice, their mean. Empty if
    there is none. The ranks share the subjects.
    """
    method.eval()
    mine = []
    for subject in (cines.index[key] for key in distributed.own_items(keys)):
        phases = cines.labels[subject].phases
        predicted = predict_frames([method], cines, subject, list(phases.values()), device)
        references = [cines.label_volume(subject, frame) for frame in phases.values()]
        pairs = zip(predicted, references, strict=True)
        volumes = [(metrics.dice(*pair), np.unique(pair[1])) for pair in pairs]
        mine.append([(phase, *volume) for phase, volume in zip(phases, volumes, strict=True)])
    method.train()
    found = [volume for subject in distributed.merge(mine) for volume in subject]
    drawn = {(phase, id) for phase, _, ids in found for id in ids}
    means = {
        f"dice_{name}": float(np.mean([dice[name] for phase, dice, _ in found if (phase, id) in drawn]))
        for id, name in enumerate(CLASSES, start=1)
        if drawn & {("ED", id), ("ES", id)}
    }
    return {"dice": float(np.mean(list(means.values()))), **means} if means else {}


def undetected(figures: dict[str, float]) -> list[str]:
    """The classes with a Dice of 0 in the figures of `mean_dice`."""
    return [name for name in CLASSES if figures.get(f"dice_{name}") == 0]
