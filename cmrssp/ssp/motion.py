"""Motion prediction: predict from one frame how much each place of the slice moves over the heart cycle.

The target is the cine's motion map (`data.motion.motion_map`), which needs several frames and no labels. It
is sampled on the grid of the augmented image; intensity augmentation changes the image alone. A U-Net with
deep supervision, mean squared error. Pretrains encoder and decoder. Not from the paper.

Other forms were not better. Validation Dice as in `mim.py` (from scratch 0.770): this one 0.786; half of the
8 px patches of the input masked 0.764; the mean frame as a second target 0.785; as target the signed
difference to the other frames 0.776. The form of the map hardly matters (means of two seeds): as it is 0.789,
not blurred 0.793, blurred by 4 mm 0.783, without the root 0.794, with the fourth root 0.786. A third of the
60 epochs is too short (0.775). End diastole and end systole are enough frames: on three whole cines
their map correlates with that of all frames at 0.92 to 0.95 around the heart.
"""

from collections.abc import Sequence

import torch

from cmrssp.data.store import Store
from cmrssp.data.subject import listed
from cmrssp.losses import mse
from cmrssp.ssp.method import NNUNETS_SGD, UNetMethod, Views
from cmrssp.unet import UNet


class Motion(UNetMethod):
    name = "motion"
    purpose = "the movement over the heart cycle is predicted from one frame (encoder and decoder)"
    defaults = {"batch_size": 32, **NNUNETS_SGD, "amp": "fp16"}
    quick = {"epochs": 3}
    finetuning = {"lr": 0.01, "transfer": "encoder"}
    needs_motion = True

    def __init__(self, *, channels: Sequence[int], norm: str, **options) -> None:
        super().__init__(channels=channels, norm=norm, **options)
        self.unet = UNet(channels=channels, num_outputs=1, num_heads=len(channels) - 1, norm=norm)

    def usable(self, store: Store, keys: Sequence[str]) -> list[str]:
        """The subjects whose cine has more than one frame; prints who the others are."""
        still = [key for key in keys if store.cines[store.index[key]].shape[0] == 1]
        if still:
            print(f"{len(still)} subjects left out, their cine has one frame: {listed(still)}")
        return [key for key in keys if key not in still]

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logs the fraction of the maps' variance over the batch that the finest output explains."""
        predicted, motion = self.outputs(views), views["motion"]
        explained = 1 - mse(predicted[0].detach(), motion) / motion.var().clamp_min(1e-12)
        return self.loss(mse, predicted, motion), {"explained_variance": explained}

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        return {**views, "prediction": self.unet.full_resolution(views["image"])}
