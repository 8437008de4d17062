"""Losses as pure functions; each computes in float32 whatever autocast says."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

_SMOOTH = 1e-5


def masked_mse(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the masked pixels alone. All (B, 1, H, W); mask: 1 = masked. He et al., arXiv
    2111.06377.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        mask = mask.float()
        return ((prediction.float() - target.float()).square() * mask).sum() / mask.sum().clamp_min(1)


def dice_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """0.5 cross-entropy + 0.5 soft Dice loss. logits (B, C, H, W); labels (B, 1, H, W) integer, 0 =
    background.

    Dice per slice and foreground class, smoothed by 1e-5 in numerator and denominator, then averaged.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = logits.float().log_softmax(dim=1)
        # a mean of its own: the built-in one adds up in any order on a GPU
        cross_entropy = F.nll_loss(log_probabilities, labels[:, 0].long(), reduction="none").mean()
        probabilities = log_probabilities[:, 1:].exp()
        classes = torch.arange(1, logits.shape[1], device=logits.device, dtype=labels.dtype).view(1, -1, 1, 1)
        truth = labels == classes
        overlap = (probabilities * truth).sum((2, 3))
        total = probabilities.sum((2, 3)) + truth.sum((2, 3))
        dice = (2 * overlap + _SMOOTH) / (total + _SMOOTH)
        return 0.5 * cross_entropy + 0.5 * (1 - dice.mean())


def deep_supervision(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    outputs: Sequence[torch.Tensor],
    labels: torch.Tensor,
) -> torch.Tensor:
    """Sum over scales i of 2^-i / sum_j 2^-j times `loss` of output i and the labels at its size (nearest-
    exact).
    """
    weights = [2.0**-i for i in range(len(outputs))]
    total = torch.zeros((), device=labels.device)
    for weight, output in zip(weights, outputs, strict=True):
        scaled = labels
        if output.shape[2:] != labels.shape[2:]:
            scaled = F.interpolate(labels.to(torch.uint8), output.shape[2:], mode="nearest-exact")
        total = total + weight / sum(weights) * loss(output, scaled)
    return total


def nt_xent(embeddings: torch.Tensor, positives: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy, for any number of positives.

    embeddings (N, D), normalised here; positives (N, N) bool, 1 = attracts, diagonal 0. For every row the
    mean over its positives j of -log(exp(s_ij) / sum over k != i of exp(s_ik)), s the cosine over the
    temperature; then the mean over rows. One positive per row: Eq. 1, arXiv 2002.05709; several: Eq. 2, arXiv
    2106.09157.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = F.normalize(embeddings.float(), dim=1)
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        similarity = (unit @ unit.T / temperature).masked_fill(itself, float("-inf"))
        log_share = similarity.log_softmax(dim=1).masked_fill(~positives, 0.0)
        return -(log_share.sum(dim=1) / positives.sum(dim=1)).mean()


def dino_cross_entropy(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    centre: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """Cross-entropy of every student view with every teacher view of another crop, mean over pairs and
    slices.

    student, teacher: one (B, K) output per view; the teacher's views are the first of the student's; centre
    (K,). Eq. 1 and 2, arXiv 2104.14294.
    """
    with torch.autocast(centre.device.type, enabled=False):
        targets = [((t.float() - centre) / teacher_temperature).softmax(dim=1) for t in teacher]
        log_shares = [(s.float() / student_temperature).log_softmax(dim=1) for s in student]
        pairs = [
            -(target * log_share).sum(dim=1).mean()
            for i, target in enumerate(targets)
            for j, log_share in enumerate(log_shares)
            if i != j
        ]
        return torch.stack(pairs).mean()
