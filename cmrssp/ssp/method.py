"""What the training loop asks of a method.

To add a method, write one file here with one subclass of `Method` (`motion.py` is a short one) and list
it in `__init__.py`. It sets the class variables and, in its constructor, `encoder`, the network to pretrain.
It defines `outputs`, `forward` and `panels`, and others only if needed. A method that pretrains a whole U-Net
derives from `UNetMethod`, sets `unet` in place of `encoder`, and inherits `outputs`.

The constructor has keyword-only arguments without defaults, each taken from the flag of that name (argparse's
`dest`); `**options` go on to the class above. `forward` alone is called through DistributedDataParallel.
Randomness comes from the generator alone, and every schedule from the epoch alone: a resumed run then repeats
an uninterrupted one.
"""

import argparse
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from cmrssp import augmentation
from cmrssp.data.batches import Batch
from cmrssp.data.store import Store
from cmrssp.losses import deep_supervision
from cmrssp.unet import Encoder, UNet, check_image_size

Views = dict[str, torch.Tensor]
NNUNETS_SGD = {"lr": 0.01, "momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}


class Method(nn.Module):
    """One training objective: its networks, its views, its loss, its flags."""

    name: ClassVar[str]
    purpose: ClassVar[str]  # in one line
    defaults: ClassVar[dict]  # of the shared flags, by destination, where their own do not fit (supplement A)
    quick: ClassVar[dict]  # what --quick changes in them
    finetuning: ClassVar[dict] = {"lr": 0.005, "transfer": "all"}  # flags of finetune.py (supplement A)
    fewest_slices: ClassVar[int] = 1  # in a batch
    needs_motion: ClassVar[bool] = False  # `views` reads the batch's motion maps
    classes: ClassVar[list[str] | None] = None  # that the network segments
    encoder: Encoder

    def __init__(
        self, *, channels: Sequence[int], norm: str, image_size: int, spacing_mm: float, augment: bool
    ) -> None:
        """The network sees squares of `image_size` px of `spacing_mm`; without `augment` centred crops."""
        super().__init__()
        check_image_size(image_size, channels, norm=norm)
        self.image_size, self.spacing_mm = image_size, spacing_mm
        self.grid = {"image_size": image_size, "spacing_mm": spacing_mm}  # of the network's input
        self.ranges = augmentation.paper_ranges(image_size, spacing_mm) if augment else None

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Declare this method's own flags."""

    def usable(self, store: Store, keys: Sequence[str]) -> list[str]:
        """The subjects that the method can learn from; names the others."""
        return list(keys)

    def config(self) -> dict:
        """The network's configuration, as unet.pt holds it."""
        network = {"channels": list(self.encoder.channels), "norm": self.encoder.norm}
        return {**network, **self.grid, "classes": self.classes}

    def crop(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """One augmented crop of each slice; without a generator the plain centred crop.

        image (B, 1, S, S) float32, standardised; label and motion (B, 1, S, S) if the batch has them.
        """
        return augmentation.augment(batch, [self.ranges], generator, **self.grid)

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """What the networks see in a step, without gradient; without a generator from plain centred crops."""
        return self.crop(batch, generator)

    def view_sizes(self) -> list[tuple[int, int]]:
        """(side in pixels, number per slice) of the images in each call of the encoder."""
        return [(self.image_size, 1)]

    def outputs(self, views: Views) -> Sequence[torch.Tensor]:
        """What the networks make of the views, before the loss. Outputs of a teacher have no gradient."""
        raise NotImplementedError

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(0-d float32 loss, detached 0-d tensors to log) at a fractional epoch."""
        raise NotImplementedError

    def compile_networks(self, mode: str | None = None) -> None:
        """torch.compile in place, so that no key of the state dict changes. Only the pooled features are
        compiled: each other output would get a gradient of zeros. `mode`: torch.compile's.
        """
        self.encoder.pooled = torch.compile(self.encoder.pooled, dynamic=False, mode=mode)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Groups for the optimiser. A group's `lr_factor` (1 if absent) multiplies the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def on_backward_end(self, epoch: float) -> None:
        """Runs after the backward pass, before the optimiser's step."""

    def on_step_end(self, epoch: float) -> None:
        """Runs once after each step, also after one whose update fp16's scaler left out because a gradient
        overflowed (to know which, the host would have to wait). So a teacher moves towards an unchanged
        student, and any other average must skip values that are not finite, on the device.
        """

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        """{title: images (B, 1, H, W)} for views.png."""
        raise NotImplementedError

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        """What transfers: a subset of UNet.state_dict(), keys in `encoder.`, `decoder.` and `heads.`."""
        return {f"encoder.{key}": value for key, value in self.encoder.state_dict().items()}


class UNetMethod(Method):
    """A method with a whole `unet`, which it pretrains without the heads."""

    unet: UNet
    loss = staticmethod(deep_supervision)  # `forward` calls self.loss, which is compiled with the network

    @property
    def encoder(self) -> Encoder:
        return self.unet.encoder

    def outputs(self, views: Views) -> list[torch.Tensor]:
        """(B, outputs, S / 2^i, S / 2^i) of each head i, from `image`."""
        return self.unet(views["image"])

    def compile_networks(self, mode: str | None = None) -> None:
        self.unet.compile(dynamic=False, mode=mode)
        self.loss = torch.compile(self.loss, dynamic=False, mode=mode)

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in self.unet.state_dict().items() if not k.startswith("heads.")}
