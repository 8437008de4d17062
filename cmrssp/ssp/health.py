"""Does a pretraining go well? Figures of the frozen features, without labels."""

import math

import torch
from tqdm import tqdm

from cmrssp.data.batches import Batches
from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.ssp.method import Method
from cmrssp.training import step_generator

NUM_SLICES = 512  # at most so many slices of the validation subjects, drawn once
COLLAPSED = 3.0  # effective rank; features that are all alike have 1, healthy ones 15 or more


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of features (N, D), from 1 (collapsed) to D. Roy
    and Vetterli 2007; used for pretraining as RankMe, arXiv 2210.02885.
    """
    values = torch.linalg.svdvals(features.double())
    return float(torch.special.entr(values / values.sum().clamp_min(1e-300)).sum().exp())


def position_probe(features: torch.Tensor, position: torch.Tensor, subject: torch.Tensor) -> float:
    """Held-out R2 of a ridge regression from features (N, D) to slice positions (N,). Every second subject
    (N,) forms one half; each half predicts the other, and R2 is taken over both. Features are scaled by the
    half that fits; the penalty is 1 per sample. NaN positions are left out. NaN with fewer than two subjects.
    """
    known = ~position.isnan()
    x, y, subject = features[known].double(), position[known].double(), subject[known]
    first = torch.isin(subject, subject.unique()[::2])
    if first.all():
        return math.nan
    residual = total = 0.0
    for fit, held in ((first, ~first), (~first, first)):
        mean = x[fit].mean(dim=0)
        scale = x[fit].std(dim=0, correction=0).square().mean().sqrt().clamp_min(1e-12)
        a, b = (x[fit] - mean) / scale, (x[held] - mean) / scale
        gram = a.T @ a + len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        weights = torch.linalg.solve(gram, a.T @ (y[fit] - y[fit].mean()))
        residual += (y[held] - y[fit].mean() - b @ weights).square().sum()
        total += (y[held] - y[held].mean()).square().sum()
    return float(1 - residual / total)


@torch.inference_mode()
def check(method: Method, loader: Batches, epoch: int) -> dict[str, float]:
    """Loss and logs on fixed augmented views; effective rank and position probe of plain crops' features. The
    slices are the same in each epoch. All ranks call it, and get the figures over the slices of all.
    """
    method.eval()
    logged, features, positions, subjects = [], [], [], []
    for i, batch in enumerate(loader.in_order(NUM_SLICES, split_over_ranks=True)):
        views = method.views(batch, step_generator(0, 0, i, distributed.rank()))
        if i == 0 or len(batch["image"]) == loader.per_rank:  # contrast is easier in a smaller batch
            loss, logs = method(views, float(epoch))
            logged.append({"loss": loss.item(), **{name: value.item() for name, value in logs.items()}})
        features.append(method.encoder.pooled(method.crop(batch, None)["image"]).float().cpu())
        positions.append(batch["position"].cpu())
        subjects.append(batch["subject"].cpu())
    method.train()
    distributed.barrier()
    pooled, position, subject = (distributed.gather(torch.cat(x)) for x in (features, positions, subjects))
    means = distributed.mean(torch.tensor([[*each.values()] for each in logged], dtype=torch.float64).mean(0))
    if not (pooled.isfinite().all() and means.isfinite().all()):
        what = "loss or features are NaN or infinite on the validation slices"
        raise UserError(f"epoch {epoch}: {what}; try a smaller --lr. The last saved state is kept")
    figures = {f"validation_{name}": mean for name, mean in zip(logged[0], means.tolist(), strict=True)}
    figures["effective_rank"] = rank = effective_rank(pooled)
    if rank < COLLAPSED:
        what = f"effective rank {rank:.2f} of {pooled.shape[1]} after epoch {epoch}"
        tqdm.write(f"warning: the features collapse: {what}; check views.png, or try a smaller --lr")
    r2 = position_probe(pooled, position, subject)
    return figures if math.isnan(r2) else {**figures, "position_r2": r2}
