"""Our supervised step against nnU-Net's recipe, on one machine in one run, alternating:

    python tests/hardware/nnunet_step.py [--amp fp16] [--batch-size 32] [--rounds 5] [--steps 20] [--small]

nnU-Net's recipe: PlainConvUNet of dynamic-network-architectures (not among the requirements) with batch norm
and deep supervision, NCHW, mixed precision, torch.compile, Dice over the batch + cross-entropy, gradients cut
to 12, SGD with Nesterov momentum 0.99, on views that lie ready. Ours: `training.Step` of the supervised
method on the same slices, augmentation on and off (the plain crop is made all the same), eager or compiled
and replayed as CUDA graphs.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import loop

from cmrssp.cli.flags import PAPER_NETWORK, QUICK_NETWORK
from cmrssp.hardware import benchmark
from cmrssp.hardware.device import AMP_TYPES
from cmrssp.training import Step


class FixedBatch:
    """As much of `Batches` as a step asks for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __len__(self) -> int:
        return 1000


def make_batch(size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Native slices of 256 x 208 pixels, noise with discs of three classes."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    distance = torch.hypot(rows - 128.0, columns - 104.0)
    label = (distance < 60).to(torch.uint8) + (distance < 40) + (distance < 25)
    noise = torch.randint(0, 1000, (size, 1, 256, 256), generator=generator)
    batch = {
        "image": (noise + 300 * label.long()).to(torch.int16),
        "label": label.expand(size, 1, 256, 256).contiguous(),
        "size": torch.tensor([[256, 208]] * size),
        "spacing_mm": torch.full((size, 2), 1.4),
        "centre": torch.tensor([[128.0, 104.0]] * size),
        "mean": torch.full((size,), 550.0),
        "std": torch.full((size,), 320.0),
        "max": torch.full((size,), 1900.0),
    }
    return {key: value.to(device) for key, value in batch.items()}


def nnunet_step(channels, image, label, amp: str, device: torch.device):
    """A call of it is one step of nnU-Net's recipe."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    count = len(channels)
    network = PlainConvUNet(
        1, count, list(channels), nn.Conv2d, 3, [1] + [2] * (count - 1), 2, 4, 2, True, nn.BatchNorm2d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, deep_supervision=True,
    ).to(device)  # fmt: skip
    network = torch.compile(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.0, momentum=0.99, nesterov=True, weight_decay=3e-5)
    loss_scale = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    weights = [2.0**-i for i in range(count - 1)]
    targets = [label.float()[:, :, :: 2**i, :: 2**i] for i in range(count - 1)]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        entropy = F.cross_entropy(output, target[:, 0].long())
        share = output.softmax(1)
        truth = torch.zeros_like(share).scatter_(1, target.long(), 1)[:, 1:]
        share = share[:, 1:]
        overlap, total = (share * truth).sum((0, 2, 3)), share.sum((0, 2, 3)) + truth.sum((0, 2, 3))
        return entropy - ((2 * overlap + 1e-5) / (total + 1e-5).clamp_min(1e-8)).mean()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, AMP_TYPES.get(amp), enabled=amp != "off"):
            outputs = network(image)
            losses = [loss(output, target) for output, target in zip(outputs, targets, strict=True)]
            total = sum(w * each for w, each in zip(weights, losses, strict=True)) / sum(weights)
        loss_scale.scale(total).backward()
        loss_scale.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        loss_scale.step(optimizer)
        loss_scale.update()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--amp", choices=("fp16", "bf16", "off"), default="fp16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="the network of --quick, for a look on a CPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    network = QUICK_NETWORK if args.small else PAPER_NETWORK
    batch = make_batch(args.batch_size, device)
    settings = dict(epochs=1, lr=0.0, schedule="poly", final_lr=0.0, warmup_epochs=0.0, momentum=0.99,
                    nesterov=True, weight_decay=3e-5, amp=args.amp, seed=0, validate_every=1,
                    save_every="1min", max_skipped=25)  # fmt: skip

    def ours(augment: bool, compile: bool) -> Step:
        torch.manual_seed(0)
        return Step(
            loop.segmentation(**network, augment=augment),
            FixedBatch(device),
            loop.settings(**settings, compile=compile, graph=compile and device.type == "cuda"),
        )

    plain = ours(False, False)
    views = plain.method.views(batch, None)
    recipe = nnunet_step(network["channels"], views["image"], views["label"], args.amp, device)
    steps = {"nnU-Net's recipe": recipe}
    for compile in (True, False):
        for augment in (True, False):
            step = ours(augment, compile)
            name = f"ours, {'compiled' if compile else 'eager'}, augmentation {'on' if augment else 'off'}"
            steps[name] = lambda step=step: step(batch, 0, 0)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            took = benchmark.timed(lambda step=step: [step() for _ in range(args.steps)], device)
            rates[name].append(args.steps * args.batch_size / took)
    first = rates["nnU-Net's recipe"]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{card}, torch {torch.__version__}, {args.amp}, batch {args.batch_size}")
    for name, measured in rates.items():
        shares = [a / b for a, b in zip(measured, first, strict=True)]
        print(f"{name:<40}{statistics.median(measured):>10.1f} slices/s  {statistics.median(shares):>6.2f} x "
              f"({min(shares):.2f} to {max(shares):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
