"""SimCLR: two views of a slice attract each other, all others of the batch repel (arXiv 2002.05709). Encoder,
global average pool, MLP 512-512-512; NT-Xent at temperature 0.1 (paper, section 2.4).
"""

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from cmrssp.augmentation import augment
from cmrssp.data.batches import Batch
from cmrssp.hardware import distributed
from cmrssp.losses import nt_xent
from cmrssp.ssp.flag_types import positive
from cmrssp.ssp.method import Method, Views
from cmrssp.unet import Encoder


class SimCLR(Method):
    name = "simclr"
    purpose = "two views of a slice attract each other, all other slices repel (encoder)"
    defaults = {"batch_size": 224, "lr": 0.1, "amp": "fp16"}
    quick = {"epochs": 3, "batch_size": 64}
    fewest_slices = 2  # the loss of a single slice is 0

    def __init__(
        self, *, channels: Sequence[int], norm: str, temperature: float, projection: int, **options
    ) -> None:
        super().__init__(channels=channels, norm=norm, **options)
        self.temperature = temperature
        self.encoder = Encoder(channels, norm)
        first, last = nn.Linear(channels[-1], projection), nn.Linear(projection, projection)
        self.projector = nn.Sequential(first, nn.ReLU(inplace=True), last)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--temperature", type=positive(float), default=0.1, help="lower: hard negatives count more")
        add("--projection", type=positive(int), default=512, metavar="N", help="width of MLP and output")

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """image (2B, 1, S, S): the first views of all slices, then the second ones; position (2B,)."""
        image = augment(batch, [self.ranges] * 2, generator, **self.grid)["image"]
        return {"image": image, "position": batch["position"].repeat(2)}

    def view_sizes(self) -> list[tuple[int, int]]:
        return [(self.image_size, 2)]

    def outputs(self, views: Views) -> list[torch.Tensor]:
        """The embeddings (2B, D)."""
        return [self.projector(self.encoder.pooled(views["image"]))]

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss over the slices of all ranks, the same on each rank."""
        (embeddings,) = self.outputs(views)
        positives = self.positives(_of_all_ranks(views["position"]))
        return nt_xent(_of_all_ranks(embeddings.float()), positives, self.temperature), {}

    def positives(self, position: torch.Tensor) -> torch.Tensor:
        """Positions (2B,) -> (2B, 2B) bool, 1 = attracts: the other view of the same slice."""
        count = len(position)
        return torch.eye(count, dtype=torch.bool, device=position.device).roll(count // 2, dims=1)

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        first, second = views["image"].chunk(2)
        return {"first view": first, "second view": second}


def _of_all_ranks(views: torch.Tensor) -> torch.Tensor:
    """(2b, ...) of each rank -> (2B, ...), again with all first views before the second ones."""
    return distributed.gather(views.unflatten(0, (2, -1)), dim=1).flatten(0, 1)
