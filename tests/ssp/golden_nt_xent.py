"""Makes golden_nt_xent.json with another library's losses:  python tests/golden_nt_xent.py  (run once;
pytorch-metric-learning 2 must be importable, the tests need only the JSON)."""

import json
from pathlib import Path

import torch

GOLDEN = Path(__file__).with_name("golden_nt_xent.json")
TEMPERATURES = (0.1, 0.5)
GROUPS = (
    0,
    0,
    1,
    2,
    2,
    2,
    1,
    0,
    1,
    2,
    0,
    1,
)  # which rows attract each other, for the loss with many positives


def embeddings() -> torch.Tensor:
    """(12, 5): six slices, first views then second ones."""
    return torch.sin(torch.arange(60, dtype=torch.float64) ** 1.3).view(12, 5).float()


def main() -> None:
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

    golden = {}
    for temperature in TEMPERATURES:
        one = NTXentLoss(temperature=temperature)(embeddings(), torch.arange(6).repeat(2))
        many = SupConLoss(temperature=temperature)(embeddings(), torch.tensor(GROUPS))
        golden[str(temperature)] = {"one positive": one.item(), "many positives": many.item()}
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
