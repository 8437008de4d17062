"""Makes golden_nnunet.json with the real nnU-Net:  python tests/golden_nnunet.py  (run once; nnunetv2 2.8
must be importable, the tests need only the JSON): names and shapes of the state dict of a small network.
"""

import json
from pathlib import Path

GOLDEN = Path(__file__).with_name("golden_nnunet.json")
CHANNELS, NUM_CLASSES = (16, 32, 64, 128), 4
NORM_OPS = {
    "batch": "torch.nn.modules.batchnorm.BatchNorm2d",
    "instance": "torch.nn.modules.instancenorm.InstanceNorm2d",
}


def shapes(norm_op: str) -> dict[str, list[int]]:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    stages = len(CHANNELS)
    network = get_network_from_plans(
        "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        {
            "n_stages": stages,
            "features_per_stage": CHANNELS,
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[3, 3]] * stages,
            "strides": [[1, 1]] + [[2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": norm_op,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
        1,
        NUM_CLASSES,
        deep_supervision=True,
    )
    return {key: list(value.shape) for key, value in network.state_dict().items()}


def main() -> None:
    GOLDEN.write_text(json.dumps({norm: shapes(norm_op) for norm, norm_op in NORM_OPS.items()}) + "\n")


if __name__ == "__main__":
    main()
