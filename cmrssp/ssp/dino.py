"""DINO: from global and local crops a student predicts the outputs of a teacher, its own moving average, for
the global crops (Caron et al., arXiv 2104.14294).
"""

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cmrssp.augmentation import Ranges, augment
from cmrssp.data.batches import Batch
from cmrssp.hardware import distributed
from cmrssp.losses import dino_cross_entropy
from cmrssp.ssp.flag_types import at_least_0, fraction, positive
from cmrssp.ssp.method import Method, Views
from cmrssp.unet import Encoder, check_image_size

_GLOBAL_AREA, _LOCAL_AREA = (0.14, 1.0), (0.05, 0.14)  # of the widest field of view, 1.4 x the plain crop's
_LOCAL_OFFSET = 0.25  # of the plain crop's side: 80 mm of 320


class DINO(Method):
    name = "dino"
    purpose = "a student predicts its own moving average from global and local crops (encoder)"
    defaults = {"batch_size": 64, "lr": 0.0075, "warmup_epochs": 10.0, "final_lr": 1e-6, "amp": "fp16"}
    quick = {"epochs": 3, "batch_size": 32}

    def __init__(
        self, *, channels: Sequence[int], norm: str, epochs: int, local_size: int | None, local_crops: int,
        outputs: int, hidden: int, student_temperature: float, teacher_temperature: float,
        teacher_temperature_start: float, teacher_temperature_epochs: float, centre_momentum: float,
        teacher_momentum: float, freeze_last_epochs: float, export: str, **options,
    ) -> None:  # fmt: skip
        """`local_size` None: half of `image_size`."""
        super().__init__(channels=channels, norm=norm, **options)
        self.local_size = local_size or self.image_size // 2
        check_image_size(self.local_size, channels, flag="--local-size", norm=norm)
        self.epochs, self.local_crops = epochs, local_crops
        self.student_temperature = student_temperature
        self.teacher_temperatures = (teacher_temperature_start, teacher_temperature)
        self.teacher_temperature_epochs = min(teacher_temperature_epochs, epochs)
        self.centre_momentum, self.momentum_start = centre_momentum, teacher_momentum
        self.freeze_last_epochs, self.export = freeze_last_epochs, export
        self.encoder, self.head = Encoder(channels, norm), Head(channels[-1], hidden, outputs)
        self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(outputs))
        self.register_buffer("batch_centre", torch.zeros(outputs))  # of the last batch, for `on_step_end`

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        number, above_0, epochs = positive(int), positive(float), at_least_0(float)
        add("--local-crops", type=number, default=6, metavar="N", help="per slice, besides 2 global crops")
        add("--local-size", type=number, metavar="PX", help="side (default: half of --image-size)")
        add("--outputs", type=number, default=8192, metavar="N", help="prototypes (paper, section 2.4)")
        add("--head-width", type=number, default=2048, dest="hidden", metavar="N", help="hidden units")
        add("--student-temperature", type=above_0, default=0.1, help="of the student's softmax")
        add("--teacher-temperature", type=above_0, default=0.04, help="of the teacher's, after a warm-up")
        add("--teacher-temperature-start", type=above_0, default=0.02, help="before it; low resists collapse")
        add("--teacher-temperature-epochs", type=epochs, default=30, metavar="N", help="of the warm-up")
        add("--centre-momentum", type=fraction, default=0.9, help="of the mean of the teacher's outputs")
        add("--teacher-momentum", type=fraction, default=0.996, help="at the start; rises to 1 as a cosine")
        add("--freeze-last-epochs", type=epochs, default=1, metavar="N", help="with a fixed last layer")
        export = "in unet.pt: the paper takes the student; in DINO's own work the teacher is often better"
        add("--export", choices=("student", "teacher"), default="student", help=export)

    def crop_ranges(self) -> tuple[Ranges, Ranges, Ranges] | tuple[None, None, None]:
        """For the first global crop, the second, the local ones. A crop's side is uniform, not its area."""
        if self.ranges is None:
            return None, None, None
        widest = self.ranges.fov_factor[1]
        chances = {"p_noise": 0.15, "p_blur": 0.1, "p_brightness": 0.2, "p_shift": 0.15, "p_gamma": 0.15}
        wide = tuple(widest * area**0.5 for area in _GLOBAL_AREA)
        base = replace(self.ranges, **chances, fov_factor=wide)
        enlarged = self.image_size / self.local_size  # a local crop has fewer pixels of the same size
        narrow = tuple(widest * enlarged * area**0.5 for area in _LOCAL_AREA)
        offset = _LOCAL_OFFSET * self.image_size * self.spacing_mm
        local = replace(base, fov_factor=narrow, translation_mm=offset, translation_scales=False)
        return replace(base, p_blur=1.0, blur_sigma_px=(0.1, 2.0)), replace(base, p_solarise=0.2), local

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """global (2B, 1, S, S): all first crops, then all second ones; local (crops x B, 1, L, L)."""
        *both, local = self.crop_ranges()
        kinds = {"global": (both, self.image_size), "local": ([local] * self.local_crops, self.local_size)}
        return {
            kind: augment(batch, ranges, generator, image_size=size, spacing_mm=self.spacing_mm)["image"]
            for kind, (ranges, size) in kinds.items()
        }

    def view_sizes(self) -> list[tuple[int, int]]:
        return [(self.image_size, 2), (self.local_size, self.local_crops)]

    def outputs(self, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's (2B + crops x B, K), and the teacher's (2B, K) without gradient."""
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher_encoder.pooled(views["global"]))
        pooled = [self.encoder.pooled(views["global"]), self.encoder.pooled(views["local"])]
        return self.head(torch.cat(pooled)), teacher

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        student, teacher = self.outputs(views)
        if self.training:
            mean = distributed.mean(teacher.float().mean(dim=0))
            # fp16 can overflow: the centre then stays as it is
            self.batch_centre.copy_(torch.where(mean.isfinite(), mean, self.centre))
        temperatures = (self.student_temperature, self.teacher_temperature(epoch))
        crops = student.chunk(2 + self.local_crops)
        return dino_cross_entropy(crops, teacher.chunk(2), self.centre, temperatures), {}

    def compile_networks(self, mode: str | None = None) -> None:
        super().compile_networks(mode)
        self.teacher_encoder.pooled = torch.compile(self.teacher_encoder.pooled, dynamic=False, mode=mode)

    def teacher_temperature(self, epoch: float) -> float:
        start, end = self.teacher_temperatures
        progress = epoch / self.teacher_temperature_epochs if self.teacher_temperature_epochs else 1.0
        return start + (end - start) * min(progress, 1.0)

    def teacher_momentum(self, epoch: float) -> float:
        return 1 - (1 - self.momentum_start) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def param_groups(self, weight_decay: float) -> list[dict]:
        """No weight decay on biases and norms."""
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed, free = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]

    def on_backward_end(self, epoch: float) -> None:
        if epoch < self.freeze_last_epochs:
            self.head.last.grad = None

    @torch.no_grad()
    def on_step_end(self, epoch: float) -> None:
        """Move the teacher towards the student, and the centre towards the batch's."""
        average = get_ema_multi_avg_fn(self.teacher_momentum(epoch))
        for teacher, student in ((self.teacher_encoder, self.encoder), (self.teacher_head, self.head)):
            average(list(teacher.parameters()), list(student.parameters()), None)
        self.centre.lerp_(self.batch_centre, 1 - self.centre_momentum)

    def panels(self, views: Views) -> dict[str, torch.Tensor]:
        first, second = views["global"].chunk(2)
        local = views["local"].chunk(self.local_crops)
        return {"global 1": first, "global 2": second, **{f"local {i}": x for i, x in enumerate(local, 1)}}

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        encoder = self.teacher_encoder if self.export == "teacher" else self.encoder
        return {f"encoder.{key}": value for key, value in encoder.state_dict().items()}


class Head(nn.Module):
    """(B, C) -> (B, K): three layers, batch norm, GELU; an L2-normalised bottleneck; K unit prototypes."""

    def __init__(self, inputs: int, hidden: int, outputs: int, bottleneck: int = 256) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.GELU()]
        layers += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last = nn.Parameter(torch.empty(outputs, bottleneck))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.last, std=0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(self.layers(features), dim=1), F.normalize(self.last, dim=1))
