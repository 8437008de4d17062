"""Losses as pure functions, computed in float32 also under autocast."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SMOOTH = 1e-5


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked pixels. All (B, 1, H, W); mask: 1 = masked. arXiv 2111.06377."""
    with torch.autocast(prediction.device.type, enabled=False):
        mask = mask.float()
        return ((prediction.float() - target.float()).square() * mask).sum() / mask.sum().clamp_min(1)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all pixels. Both (B, 1, H, W)."""
    with torch.autocast(prediction.device.type, enabled=False):
        return F.mse_loss(prediction.float(), target.float())


def dice_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """0.5 cross-entropy + 0.5 (1 - soft Dice), the mean over slices. logits (B, C, H, W); labels (B, 1, H, W)
    integer, 0 = background; weight (B,): a factor of each slice's loss. Dice is the mean over the foreground
    classes, with 1e-5 added to numerator and denominator.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = logits.float().log_softmax(dim=1)
        # the reduction of nll_loss itself is not deterministic on a GPU
        cross_entropy = F.nll_loss(log_probabilities, labels[:, 0].long(), reduction="none")
        probabilities = log_probabilities[:, 1:].exp()
        classes = torch.arange(1, logits.shape[1], device=logits.device, dtype=labels.dtype).view(1, -1, 1, 1)
        reference = labels == classes
        overlap = (probabilities * reference).sum((2, 3))
        total = probabilities.sum((2, 3)) + reference.sum((2, 3))
        dice = (2 * overlap + _SMOOTH) / (total + _SMOOTH)
        if weight is None:
            return 0.5 * cross_entropy.mean() + 0.5 * (1 - dice.mean())
        return (weight * (0.5 * cross_entropy.mean((1, 2)) + 0.5 * (1 - dice.mean(1)))).mean()


def deep_supervision(loss: Callable, outputs: Sequence[Tensor], target: Tensor, **options) -> Tensor:
    """The mean of `loss(output, target, **options)` over the scales i, weighted by 2^-i. outputs: (B, C, H /
    2^i, W / 2^i) for each i; target (B, 1, H, W), for a coarser scale averaged if it is float, else resized
    by nearest-exact, as labels must be.
    """
    weights = [2.0**-i for i in range(len(outputs))]
    total = torch.zeros((), device=target.device)
    for weight, output in zip(weights, outputs, strict=True):
        size, scaled = output.shape[2:], target
        if size != target.shape[2:] and target.is_floating_point():
            scaled = F.adaptive_avg_pool2d(target, size)
        elif size != target.shape[2:]:
            scaled = F.interpolate(target.to(torch.uint8), size, mode="nearest-exact")
        total = total + weight / sum(weights) * loss(output, scaled, **options)
    return total


def nt_xent(embeddings: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy with one or more positives per row. embeddings (N, D),
    normalised here; positives (N, N) bool, 1 = attracts, diagonal 0. For row i the mean over its positives j
    of -log(exp(s_ij) / sum over k != i of exp(s_ik)), where s is the cosine divided by the temperature; then
    the mean over the rows. Eq. 1, arXiv 2002.05709 (one positive); Eq. 2, arXiv 2106.09157 (several).
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = F.normalize(embeddings.float(), dim=1)
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        similarity = (unit @ unit.T / temperature).masked_fill(itself, float("-inf"))
        log_probability = similarity.log_softmax(dim=1).masked_fill(~positives, 0.0)
        return -(log_probability.sum(dim=1) / positives.sum(dim=1)).mean()


def dino_cross_entropy(
    student: Sequence[Tensor], teacher: Sequence[Tensor], centre: Tensor, temperatures: tuple[float, float]
) -> Tensor:
    """Cross-entropy between each teacher output and each student output of another crop; mean over pairs and
    slices. Eq. 1 and 2, arXiv 2104.14294. student, teacher: one (B, K) per crop, the teacher's crops first in
    both; centre (K,), subtracted from the teacher's outputs; temperatures: the student's, the teacher's.
    """
    with torch.autocast(centre.device.type, enabled=False):
        targets = [((t.float() - centre) / temperatures[1]).softmax(dim=1) for t in teacher]
        predictions = [(s.float() / temperatures[0]).log_softmax(dim=1) for s in student]
        pairs = [
            -(target * prediction).sum(dim=1).mean()
            for i, target in enumerate(targets)
            for j, prediction in enumerate(predictions)
            if i != j
        ]
        return torch.stack(pairs).mean()
