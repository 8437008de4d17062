"""Masked image modelling: reconstruct the masked patches of an augmented image (He et al., arXiv 2111.06377).

75 % of the 32 px patches are set to 0.0 after standardisation and augmentation; mean squared error over the
masked pixels. Pretrains encoder and decoder; the output convolution does not transfer.

The decoder can hinder a short fine-tuning. Its features are as rich as others (effective rank 45 of 64, 20
of 32 and 9 of 16 channels; after motion prediction 41, 17 and 8), but they come through the skips: the
upsampled path gives 19, 10 and 2 % of the variance behind the stages' first convolutions (after motion
prediction 35, 39 and 45 %), and still 30, 45 and 16 % after fine-tuning, where training from scratch ends at
32, 52 and 80 %. What was tried (ACDC, 7 labelled patients, --quick, 1,360 steps, seed 0, validation Dice of
10 patients, every figure one run; in brackets on another split, with 70 patients to pretrain on):

    from scratch                                 0.770   (0.803)
    all of MIM                                   0.642   (0.764)
    1  its encoder alone                         0.745   (0.802)
    2  its full-resolution stages alone                  (0.809)
    3  all but its full-resolution stages                (0.771)
    4  all, filters at the norm of fresh ones            (0.761)
    5  all, pretrained with a loss on all pixels         (0.731)
    6  all, pretrained with heads at every scale 0.608
    7  all, pretrained with half the skips at 0  0.587
    8  all, the decoder 0.4 of it + 0.6 fresh    0.719
"""

import argparse
from collections.abc import Sequence

import torch

from cmrssp.data.batches import Batch
from cmrssp.errors import UserError
from cmrssp.losses import masked_mse
from cmrssp.ssp.flag_types import fraction, positive
from cmrssp.ssp.method import NNUNETS_SGD, UNetMethod, Views
from cmrssp.unet import UNet


class MIM(UNetMethod):
    name = "mim"
    purpose = "masked patches are reconstructed (encoder and decoder)"
    defaults = {"batch_size": 128, **NNUNETS_SGD, "amp": "fp16"}
    quick = {"epochs": 3, "batch_size": 32, "patch_size": 16}
    loss = staticmethod(masked_mse)

    def __init__(
        self, *, channels: Sequence[int], norm: str, patch_size: int, mask_ratio: float, **options
    ) -> None:
        super().__init__(channels=channels, norm=norm, **options)
        size, self.patch_size = self.image_size, patch_size
        if size % patch_size:
            raise UserError(f"--patch-size: expected a divisor of --image-size {size}, got {patch_size}")
        self.num_patches = (size // patch_size) ** 2
        self.num_masked = round(mask_ratio * self.num_patches)
        if self.num_masked < 1:
            least = f"expected to mask at least one of the {self.num_patches} patches"
            raise UserError(f"--mask-ratio: {least}, got {mask_ratio}, which masks none")
        self.unet = UNet(channels=channels, num_outputs=1, num_heads=1, norm=norm)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        add, side = parser.add_argument, "side of a patch (paper, section 2.4)"
        add("--patch-size", type=positive(int), default=32, metavar="PX", help=side)
        add("--mask-ratio", type=fraction, default=0.75, help="masked fraction of the patches of each image")

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """image (B, 1, S, S); mask (B, 1, S, S) bool, 1 = masked; without a generator that of seed 0."""
        image = self.crop(batch, generator)["image"]
        generator = generator or torch.Generator().manual_seed(0)
        order = torch.rand(len(image), self.num_patches, generator=generator)
        masked = order.argsort(dim=1).argsort(dim=1) < self.num_masked  # exactly num_masked in each image
        side = self.image_size // self.patch_size
        mask = masked.view(-1, 1, side, side).to(image.device, non_blocking=True)
        mask = mask.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return {"image": image, "mask": mask}

    def outputs(self, views: Views) -> list[torch.Tensor]:
        """The reconstructions (B, 1, S, S)."""
        return self.unet(_masked(views))

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.loss(self.outputs(views)[0], views["image"], views["mask"]), {}

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        masked = _masked(views)
        reconstruction = torch.where(views["mask"], self.unet.full_resolution(masked), views["image"])
        return {"original": views["image"], "masked": masked, "reconstruction": reconstruction}


def _masked(views: Views) -> torch.Tensor:
    """(B, 1, S, S): the image with 0 in place of the masked pixels."""
    return views["image"].masked_fill(views["mask"], 0.0)
