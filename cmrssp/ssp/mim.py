"""Masked image modelling: restore the masked patches of an augmented image (He et al., arXiv 2111.06377).

Patches of 32 px, 75 % of them masked by 0.0 after standardisation and augmentation, mean squared error over
the masked pixels. Pretrains encoder and decoder; the output convolution stays behind.
"""

import argparse
from collections.abc import Sequence

import torch

from cmrssp.cli.argument_types import positive, share
from cmrssp.data.batches import Batch
from cmrssp.errors import UserError
from cmrssp.losses import masked_mse
from cmrssp.ssp.method import Method, Views
from cmrssp.unet import Encoder, UNet


class MIM(Method):
    name = "mim"
    defaults = {
        "epochs": 100,
        "batch_size": 128,
        "lr": 0.01,
        "schedule": "cosine",
        "momentum": 0.99,
        "nesterov": True,
        "weight_decay": 3e-5,
        "amp": "fp16",
    }
    quick = {"epochs": 3, "batch_size": 32, "patch_size": 16}

    def __init__(
        self,
        *,
        channels: Sequence[int],
        image_size: int,
        norm: str = "batch",
        patch_size: int,
        mask_ratio: float,
        **options,
    ) -> None:
        super().__init__(channels=channels, image_size=image_size, norm=norm, **options)
        if image_size % patch_size:
            raise UserError(
                f"--patch-size: expected a divisor of --image-size {image_size}, got {patch_size}"
            )
        self.patch_size = patch_size
        self.num_patches = (image_size // patch_size) ** 2
        self.num_masked = round(mask_ratio * self.num_patches)
        if not 1 <= self.num_masked <= self.num_patches:
            raise UserError(
                f"--mask-ratio: expected to mask 1 to {self.num_patches} of the {self.num_patches} patches, "
                f"got {mask_ratio}, which masks {self.num_masked}"
            )
        self.unet = UNet(channels=channels, num_outputs=1, num_heads=1, norm=norm)

    @property
    def encoder(self) -> Encoder:
        return self.unet.encoder

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--patch-size",
            type=positive(int),
            default=32,
            metavar="PX",
            help="side of a masked patch in target pixels (paper, section 2.4)",
        )
        parser.add_argument(
            "--mask-ratio",
            type=share,
            default=0.75,
            help="share of the patches masked in every image (paper, section 2.4)",
        )

    @classmethod
    def own_flags(cls, args: argparse.Namespace) -> dict:
        return {"patch_size": args.patch_size, "mask_ratio": args.mask_ratio}

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """image (B, 1, S, S) and mask (B, 1, S, S) bool, 1 = masked. Validation masks are always the same."""
        image = self.view(batch, generator)["image"]
        chosen = torch.rand(
            len(image), self.num_patches, generator=generator or torch.Generator().manual_seed(0)
        )
        masked = chosen.argsort(dim=1).argsort(dim=1) < self.num_masked  # exactly num_masked of every image
        side = self.image_size // self.patch_size
        mask = masked.view(-1, 1, side, side).to(image.device, non_blocking=True)
        mask = mask.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return {"image": image, "mask": mask}

    def outputs(self, views: Views) -> list[torch.Tensor]:
        """The restored images (B, 1, S, S)."""
        return self.unet(self._masked(views))

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return masked_mse(self.outputs(views)[0], views["image"], views["mask"]), {}

    def compile_networks(self) -> None:
        self.unet.compile(dynamic=False)

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        restored = self.unet.full_resolution(self._masked(views))
        restored = torch.where(views["mask"], restored, views["image"])
        return {"original": views["image"], "masked": self._masked(views), "restored": restored}

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in self.unet.state_dict().items() if not k.startswith("heads.")}

    @staticmethod
    def _masked(views: Views) -> torch.Tensor:
        image = views["image"].masked_fill(views["mask"], 0.0)
        return image.contiguous(memory_format=torch.channels_last)
