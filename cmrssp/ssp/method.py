"""The contract of a method: what the one training loop may ask of it."""

import argparse
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from cmrssp import augmentation
from cmrssp.data.batches import Batch
from cmrssp.unet import Encoder, check_image_size

Views = dict[str, torch.Tensor]


class Method(nn.Module):
    """One objective: its networks, its views, its loss, its flags. Four pretraining methods and the
    supervised one.
    """

    name: ClassVar[str]
    defaults: ClassVar[dict]  # the paper's optimisation settings, by flag (supplement A)
    quick: ClassVar[dict]  # what --quick changes of them
    fewest_slices: ClassVar[int] = 1  # in a batch
    classes: ClassVar[list[str] | None] = None  # that the network segments
    encoder: Encoder  # the network that is trained

    def __init__(
        self,
        *,
        channels: Sequence[int],
        image_size: int,
        spacing_mm: float,
        augment: bool,
        norm: str = "batch",
    ) -> None:
        """`image_size`: side of the network's square, in pixels of `spacing_mm`. Without `augment` the
        network sees the plain centred crop.
        """
        super().__init__()
        check_image_size(image_size, channels, norm=norm)
        self.image_size, self.spacing_mm = image_size, spacing_mm
        self.recipe = augmentation.paper_recipe(image_size, spacing_mm) if augment else None

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """This method's own flags, each with effect, unit and source."""

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Method":
        """With `own_flags` the only place that reads the flags."""
        return cls(
            channels=args.channels,
            image_size=args.image_size,
            spacing_mm=args.spacing,
            augment=args.augmentation == "on",
            norm=args.norm,
            **cls.own_flags(args),
        )

    @classmethod
    def own_flags(cls, args: argparse.Namespace) -> dict:
        """The constructor's other arguments, from this method's own flags."""
        raise NotImplementedError

    def config(self) -> dict:
        """The network's configuration, as unet.pt holds it."""
        return {
            "channels": list(self.encoder.channels),
            "image_size": self.image_size,
            "spacing_mm": self.spacing_mm,
            "classes": self.classes,
            "norm": self.encoder.norm,
        }

    def view(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """image (B, 1, S, S) float32 and, where the batch has one, label (B, 1, S, S) uint8: augmented or,
        without a generator, the plain centred crop.
        """
        return augmentation.views(
            batch, self.recipe, generator, image_size=self.image_size, spacing_mm=self.spacing_mm
        )

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """What the networks see in a step, on the batch's device, without gradient; without a generator it is
        made of the plain centred crops.
        """
        return self.view(batch, generator)

    def view_sizes(self) -> list[tuple[int, int]]:
        """(side in pixels, how many of each slice) of what goes through the encoder at once."""
        return [(self.image_size, 1)]

    def outputs(self, views: Views) -> Sequence[torch.Tensor]:
        """What the networks make of the views: `forward` without the loss. Some may have no gradient."""
        raise NotImplementedError

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(float32 scalar loss, detached 0-d tensors to log); schedules depend on the epoch alone."""
        raise NotImplementedError

    def compile_networks(self) -> None:
        """torch.compile in place, so that no key is renamed; each shape gets kernels of its own. Of an
        encoder no more than what is used: each further output would get a gradient of zeros.
        """
        self.encoder.pooled = torch.compile(self.encoder.pooled, dynamic=False)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """As torch.optim takes them; a group's `lr_factor`, 1 without one, multiplies the schedule's rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def on_backward_end(self, epoch: float) -> None:
        """After the backward pass, before the optimiser's step."""

    def on_step_end(self, epoch: float) -> None:
        """Exactly once after every step of the optimiser."""

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        """What a person should see: title -> images (B, 1, H, W)."""
        raise NotImplementedError

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        """What transfers: a subset of UNet.state_dict(), keys from `encoder.`, `decoder.`, `heads.`."""
        raise NotImplementedError
