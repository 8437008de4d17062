"""Makes golden_unet.json with the real PlainConvUNet:  python tests/golden_unet.py  (run once; the package
dynamic-network-architectures 0.4 must be importable, the tests need only the JSON).

Weights are filled by a formula, one phase per key of OUR state dict, so that both networks get the same ones.
"""

import json
import zlib
from pathlib import Path

import torch

GOLDEN = Path(__file__).with_name("golden_unet.json")
CHANNELS, NUM_OUTPUTS, IMAGE_SIZE = (4, 6, 8, 10, 12, 12, 12), 4, 128


def fill(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Deterministic weights of order 1 / sqrt(fan-in); running variances between 0.5 and 1.5."""
    count = torch.Size(shape).numel()
    wave = torch.sin(zlib.crc32(key.encode()) % 1000 + 0.7 * torch.arange(count, dtype=torch.float64) ** 1.1)
    if key.endswith("running_var"):
        return (1 + 0.5 * wave).float().view(shape)
    if "norm" in key and key.endswith("weight"):
        return (1 + 0.2 * wave).float().view(shape)
    fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 25
    return (wave * (2 / fan_in) ** 0.5).float().view(shape)


def image() -> torch.Tensor:
    y, x = torch.meshgrid(*[torch.arange(IMAGE_SIZE, dtype=torch.float64)] * 2, indexing="ij")
    return (torch.sin(0.21 * x + 0.03 * y) + torch.cos(0.0017 * x * y))[None, None].float()


def pixels(size: int) -> list[tuple[int, int]]:
    return [
        (0, 0),
        (size - 1, 0),
        (0, size - 1),
        (size // 2, size // 3),
        (size // 4, size // 2),
        (size - 1, size - 1),
    ]


def our_key(key: str, scales: int) -> str | None:
    """nnU-Net's key -> ours; None for its twins of the same tensors."""
    parts = key.split(".")
    if "all_modules" in parts or key.startswith("decoder.encoder"):
        return None
    if key.startswith("encoder.stages"):
        _, _, stage, _, _, conv, layer, name = parts
        return f"encoder.stages.{stage}.{layer}{int(conv) + 1}.{name}"
    if key.startswith("decoder.stages"):
        _, _, stage, _, conv, layer, name = parts
        return f"decoder.stages.{stage}.{layer}{int(conv) + 1}.{name}"
    if key.startswith("decoder.transpconvs"):
        return f"decoder.ups.{parts[2]}.{parts[3]}"
    return f"heads.{scales - 1 - int(parts[2])}.{parts[3]}"


def outputs_of(norm: type[torch.nn.Module]) -> list:
    """At `pixels`, of the real network with this norm and the weights of `fill`."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(CHANNELS)
    network = PlainConvUNet(
        1,
        stages,
        CHANNELS,
        torch.nn.Conv2d,
        3,
        [1] + [2] * (stages - 1),
        2,
        NUM_OUTPUTS,
        2,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    ).eval()
    state = network.state_dict()
    for key, value in state.items():
        ours = our_key(key, stages - 1)
        if ours and value.is_floating_point():
            value.copy_(fill(ours, tuple(value.shape)))
    with torch.no_grad():
        outputs = network(image())
    return [
        [
            [round(output[0, c, y, x].item(), 8) for c in range(NUM_OUTPUTS)]
            for y, x in pixels(output.shape[2])
        ]
        for output in outputs
    ]


def main() -> None:
    golden = {
        "channels": CHANNELS,
        "outputs": outputs_of(torch.nn.BatchNorm2d),
        "instance_outputs": outputs_of(torch.nn.InstanceNorm2d),
    }
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
