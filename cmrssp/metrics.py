"""Figures of merit on label maps."""

import numpy as np

from cmrssp.data.subject import CLASSES


def dice(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice of each class of two label maps of one shape (any number of axes): 2 |A and B| / (|A| + |B|).

    A structure that is in neither map scores 1, in one of them 0.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"dice: expected label maps of one shape, got {prediction.shape} and {truth.shape}")
    scores = {}
    for id, name in enumerate(CLASSES, start=1):
        ours, theirs = prediction == id, truth == id
        total = int(ours.sum()) + int(theirs.sum())
        scores[name] = 2 * int((ours & theirs).sum()) / total if total else 1.0
    return scores
