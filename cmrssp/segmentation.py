"""The supervised objective, as a `Method`; prediction on the native grid."""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from skimage import measure

from cmrssp import augmentation
from cmrssp.data.batches import Batch, collate, to_device
from cmrssp.data.store import Store
from cmrssp.data.subject import CLASSES
from cmrssp.errors import UserError
from cmrssp.losses import dice_cross_entropy
from cmrssp.ssp.flag_types import at_least_0, positive
from cmrssp.ssp.method import NNUNETS_SGD, UNetMethod, Views
from cmrssp.unet import UNet
from cmrssp.weights.checkpoints import Checkpoint
from cmrssp.weights.transfer import transfer

_SLICES_AT_ONCE = 32


class Segmentation(UNetMethod):
    name = "segmentation"
    defaults = {"epochs": 1000, "batch_size": 32, "schedule": "poly", **NNUNETS_SGD, "amp": "fp16"}
    quick = {"epochs": 100, "batch_size": 8}
    classes = list(CLASSES)

    def __init__(
        self,
        *,
        channels: Sequence[int],
        norm: str,
        freeze_encoder: float,
        encoder_lr_factor: float,
        **options,
    ) -> None:
        """`freeze_encoder`: epochs; `encoder_lr_factor`: multiplies the encoder's learning rate."""
        super().__init__(channels=channels, norm=norm, **options)
        self.freeze_encoder, self.encoder_lr_factor = freeze_encoder, encoder_lr_factor
        outputs = len(CLASSES) + 1
        self.unet = UNet(channels=channels, num_outputs=outputs, num_heads=len(channels) - 1, norm=norm)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        frozen = "train decoder and heads alone first; the encoder's weights and batch statistics stay"
        add("--freeze-encoder", type=at_least_0(float), default=0.0, metavar="EPOCHS", help=frozen)
        slower = "of the encoder's learning rate; below 1 a pretrained encoder changes more slowly"
        add("--encoder-lr-factor", type=positive(float), default=1.0, metavar="FACTOR", help=slower)

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        views = self.crop(batch, generator)
        return {**views, "weight": batch["weight"]} if "weight" in batch else views

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.training and self.freeze_encoder:
            self.encoder.train(epoch >= self.freeze_encoder)  # frozen: its batch statistics stay fixed
        weight = views.get("weight")
        return self.loss(dice_cross_entropy, self.outputs(views), views["label"], weight=weight), {}

    def param_groups(self, weight_decay: float) -> list[dict]:
        if self.encoder_lr_factor == 1:
            return super().param_groups(weight_decay)
        rest = [*self.unet.decoder.parameters(), *self.unet.heads.parameters()]
        encoder = {"params": list(self.encoder.parameters()), "lr_factor": self.encoder_lr_factor}
        return [{**group, "weight_decay": weight_decay} for group in (encoder, {"params": rest})]

    def on_backward_end(self, epoch: float) -> None:
        """Without a gradient SGD leaves a parameter alone, with no decay and no momentum."""
        if epoch < self.freeze_encoder:
            self.encoder.zero_grad(set_to_none=True)

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        return {"image": views["image"], "label": views["label"]}

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        return self.unet.state_dict()

    @torch.inference_mode()
    def probabilities(self, batch: Batch, *, flips: bool = False) -> torch.Tensor:
        """(B, 4, H, W) float32 on the batch's native grid, 0 outside the crop. The network sees the plain
        centred crop, with `flips` also its three mirror images; their mean is sampled back linearly.
        """
        image = self.views(batch, None)["image"]
        total = 0.0
        mirrored = ((), (2,), (3,), (2, 3)) if flips else ((),)
        for axes in mirrored:
            logits = self.unet.full_resolution(image.flip(axes)).float()
            total = total + logits.softmax(dim=1).flip(axes)
        grid = augmentation.native_grid(batch, **self.grid)
        return F.grid_sample(total / len(mirrored), grid, mode="bilinear", align_corners=True)


def restore(checkpoint: Checkpoint) -> Segmentation:
    """The network of a fine-tuned checkpoint, ready to predict. Raises UserError for any other checkpoint."""
    if checkpoint.config["classes"] != list(CLASSES):
        raise UserError(
            f"{checkpoint.path}: expected a fine-tuned segmentation network, got one pretrained by "
            f"{checkpoint.provenance.method}; run finetune.py --init {checkpoint.path} first"
        )
    training = {"augment": False, "freeze_encoder": 0.0, "encoder_lr_factor": 1.0}
    method = Segmentation(**checkpoint.network, **training)
    transfer(checkpoint, method.unet)
    return method.eval()


def predict_frames(
    methods: Sequence[Segmentation],
    store: Store,
    subject: int,
    frames: Sequence[int],
    device: torch.device,
    *,
    flips: bool = False,
    largest_component: bool = False,
) -> Iterator[np.ndarray]:
    """The label map (Z, H, W) uint8 of each of the cine `frames`, on the subject's canonical native grid.
    Averages the probabilities of several `methods`, all in evaluation mode, and with `flips` those of mirror
    images. Voxels outside every crop are background. `largest_component`: keep only that of each class.
    """
    _, slices, height, width = store.cines[subject].shape
    places = [(subject, frame, z) for frame in frames for z in range(slices)]
    done: list[np.ndarray] = []
    for start in range(0, len(places), _SLICES_AT_ONCE):
        batch = to_device(collate(store, places[start : start + _SLICES_AT_ONCE], labelled=False), device)
        mean = sum(method.probabilities(batch, flips=flips) for method in methods)
        done.extend(mean.argmax(dim=1).to(torch.uint8)[:, :height, :width].cpu().numpy())
        while len(done) >= slices:
            labels = np.stack(done[:slices])
            yield keep_largest(labels) if largest_component else labels
            done = done[slices:]


def keep_largest(labels: np.ndarray) -> np.ndarray:
    """(Z, H, W) with only the largest component of each class, by 26-connectivity; the rest is background."""
    kept = np.zeros_like(labels)
    for id in range(1, len(CLASSES) + 1):
        kept[main_component(labels == id)] = id
    return kept


def main_component(mask: np.ndarray) -> np.ndarray:
    """The largest component of a mask of any number of axes; voxels that touch at a corner are connected."""
    components = measure.label(mask, connectivity=mask.ndim)
    sizes = np.bincount(components.ravel())[1:]
    return components == 1 + np.argmax(sizes) if len(sizes) else mask
