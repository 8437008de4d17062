"""DINO: a student that sees global and local crops learns to say what a teacher says of the global ones; the
teacher is the moving average of the student (Caron et al., arXiv 2104.14294).
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

from cmrssp import augmentation
from cmrssp.cli.argument_types import at_least_0, positive, share
from cmrssp.data.batches import Batch
from cmrssp.hardware import distributed
from cmrssp.losses import dino_cross_entropy
from cmrssp.ssp.method import Method, Views
from cmrssp.unet import Encoder, check_image_size

# shares of the widest field of view, 1.4 x the plain crop's
_GLOBAL_AREA, _LOCAL_AREA = (0.14, 1.0), (0.05, 0.14)
_LOCAL_OFFSET = 0.25  # of the plain crop's side: 80 mm of 320


class DINO(Method):
    name = "dino"
    defaults = {
        "epochs": 100,
        "batch_size": 64,
        "lr": 0.0075,
        "schedule": "cosine",
        "warmup_epochs": 10.0,
        "final_lr": 1e-6,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-4,
        "amp": "fp16",
    }
    quick = {"epochs": 3, "batch_size": 32}

    def __init__(
        self,
        *,
        channels: Sequence[int],
        norm: str = "batch",
        epochs: int,
        local_size: int,
        local_crops: int,
        outputs: int,
        hidden: int,
        student_temperature: float,
        teacher_temperature: float,
        teacher_temperature_start: float,
        teacher_temperature_epochs: float,
        centre_momentum: float,
        teacher_momentum: float,
        freeze_last_epochs: float,
        export: str,
        **options,
    ) -> None:
        super().__init__(channels=channels, norm=norm, **options)
        check_image_size(local_size, channels, flag="--local-size", norm=norm)
        self.epochs, self.local_size, self.local_crops = epochs, local_size, local_crops
        self.student_temperature = student_temperature
        self.teacher_temperatures = (teacher_temperature_start, teacher_temperature)
        self.teacher_temperature_epochs = min(teacher_temperature_epochs, epochs)
        self.centre_momentum, self.momentum_start = centre_momentum, teacher_momentum
        self.freeze_last_epochs, self.export = freeze_last_epochs, export
        self.encoder, self.head = Encoder(channels, norm), Head(channels[-1], hidden, outputs)
        self.teacher_encoder, self.teacher_head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        for teacher in (self.teacher_encoder, self.teacher_head):
            teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(outputs))
        self.register_buffer("batch_centre", torch.zeros(outputs))  # the mean that the next step takes in

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add(
            "--local-crops",
            type=positive(int),
            default=6,
            metavar="N",
            help="local crops of a slice, beside 2 global ones",
        )
        add(
            "--local-size",
            type=positive(int),
            metavar="PX",
            help="side of a local crop (default: half of --image-size)",
        )
        add(
            "--outputs",
            type=positive(int),
            default=8192,
            metavar="N",
            help="prototypes of the head (paper, section 2.4)",
        )
        add("--head-width", type=positive(int), default=2048, metavar="N", help="hidden units of the head")
        add("--student-temperature", type=positive(float), default=0.1, help="of the student's softmax")
        add(
            "--teacher-temperature",
            type=positive(float),
            default=0.04,
            help="of the teacher's softmax after its warm-up",
        )
        add(
            "--teacher-temperature-start",
            type=positive(float),
            default=0.02,
            help="lower is safer against collapse",
        )
        add(
            "--teacher-temperature-epochs",
            type=at_least_0(float),
            default=30,
            metavar="N",
            help="linear warm-up between the two",
        )
        add("--centre-momentum", type=share, default=0.9, help="of the running mean of the teacher's outputs")
        add("--teacher-momentum", type=share, default=0.996, help="at the start; rises to 1 along a cosine")
        add(
            "--freeze-last-epochs",
            type=at_least_0(float),
            default=1,
            metavar="N",
            help="last layer of the head fixed so long",
        )
        add(
            "--export",
            choices=("student", "teacher"),
            default="student",
            help="whose encoder lands in unet.pt; the teacher, an average over steps, is often better in "
            "DINO's own studies, the student is what the paper fine-tunes",
        )

    @classmethod
    def own_flags(cls, args: argparse.Namespace) -> dict:
        return {
            "epochs": args.epochs,
            "local_size": args.image_size // 2 if args.local_size is None else args.local_size,
            "local_crops": args.local_crops,
            "outputs": args.outputs,
            "hidden": args.head_width,
            "student_temperature": args.student_temperature,
            "teacher_temperature": args.teacher_temperature,
            "teacher_temperature_start": args.teacher_temperature_start,
            "teacher_temperature_epochs": args.teacher_temperature_epochs,
            "centre_momentum": args.centre_momentum,
            "teacher_momentum": args.teacher_momentum,
            "freeze_last_epochs": args.freeze_last_epochs,
            "export": args.export,
        }

    def recipes(self) -> tuple[augmentation.Recipe, augmentation.Recipe, augmentation.Recipe]:
        """Of the first global view, the second one, and the local crops. Uniform in the side, as in
        the paper's code.
        """
        side = self.image_size * self.spacing_mm
        widest = self.recipe.zoom[1]
        base = replace(
            self.recipe,
            p_noise=0.15,
            p_blur=0.1,
            p_brightness=0.2,
            p_shift=0.15,
            p_gamma=0.15,
            zoom=tuple(widest * share**0.5 for share in _GLOBAL_AREA),
        )
        enlarged = self.image_size / self.local_size  # a local crop has fewer pixels of the same size
        local = replace(
            base,
            zoom=tuple(widest * enlarged * share**0.5 for share in _LOCAL_AREA),
            translation_mm=_LOCAL_OFFSET * side,
            translation_zoomed=False,
        )
        return replace(base, p_blur=1.0, blur_sigma_px=(0.1, 2.0)), replace(base, p_solarise=0.2), local

    def views(self, batch: Batch, generator: torch.Generator | None) -> Views:
        """global (2B, 1, S, S): first the blurred views, then the others; local (crops x B, 1, L, L)."""
        first, second, local = self.recipes() if self.recipe else (None, None, None)

        def crops(recipe: augmentation.Recipe | None, size: int) -> torch.Tensor:
            grid = {"image_size": size, "spacing_mm": self.spacing_mm}
            return augmentation.views(batch, recipe, generator, **grid)["image"]

        return {
            "global": torch.cat([crops(first, self.image_size), crops(second, self.image_size)]),
            "local": torch.cat([crops(local, self.local_size) for _ in range(self.local_crops)]),
        }

    def view_sizes(self) -> list[tuple[int, int]]:
        return [(self.image_size, 2), (self.local_size, self.local_crops)]

    def outputs(self, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the student (2B + crops x B, K); of the teacher (2B, K), without gradient."""
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher_encoder.pooled(views["global"]))
        pooled = [self.encoder.pooled(views["global"]), self.encoder.pooled(views["local"])]
        return self.head(torch.cat(pooled)), teacher

    def forward(self, views: Views, epoch: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        student, teacher = self.outputs(views)
        if self.training:
            mean = distributed.mean(teacher.float().mean(dim=0))
            # not finite where fp16 overflows, in a step that the scaler leaves out
            self.batch_centre.copy_(torch.where(mean.isfinite(), mean, self.centre))
        loss = dino_cross_entropy(
            student.chunk(2 + self.local_crops),
            teacher.chunk(2),
            self.centre,
            self.student_temperature,
            self.teacher_temperature(epoch),
        )
        return loss, {}

    def compile_networks(self) -> None:
        super().compile_networks()
        self.teacher_encoder.pooled = torch.compile(self.teacher_encoder.pooled, dynamic=False)

    def teacher_temperature(self, epoch: float) -> float:
        start, end = self.teacher_temperatures
        share = epoch / self.teacher_temperature_epochs if self.teacher_temperature_epochs else 1.0
        return start + (end - start) * min(share, 1.0)

    def teacher_momentum(self, epoch: float) -> float:
        return 1 - (1 - self.momentum_start) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def param_groups(self, weight_decay: float) -> list[dict]:
        """No decay on biases and norms."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]

    def on_backward_end(self, epoch: float) -> None:
        if epoch < self.freeze_last_epochs:
            self.head.last.grad = None

    @torch.no_grad()
    def on_step_end(self, epoch: float) -> None:
        """Teacher and centre take one step."""
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
    """Three layers with batch norm and GELU, an L2-normalised bottleneck of 256, unit-length prototypes."""

    def __init__(self, inputs: int, hidden: int, outputs: int, bottleneck: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last = nn.Parameter(torch.empty(outputs, bottleneck))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.last, std=0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(self.layers(features), dim=1), F.normalize(self.last, dim=1))
