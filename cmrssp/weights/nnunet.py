"""nnU-Net v2's names for our tensors, and the plan with which it builds our network.

Its PlainConvUNet lists one tensor under up to four names: a convolution also as the first of its block's
`all_modules`, the norm as the second, and the whole encoder again below `decoder.encoder`. nnU-Net's loader
(nnunetv2.run.load_pretrained_weights) asks for all of them, except those of the segmentation layers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cmrssp.unet import UNet

CONFIGURATION = "2d_cmrssp"
TRAINERS = {"batch": "nnUNetTrainerBN", "instance": "nnUNetTrainer"}


def fresh(channels: Sequence[int], norm: str) -> UNet:
    """A UNet with nnU-Net's initialisation (He et al., arXiv 1502.01852) from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(channels=channels, num_outputs=1, num_heads=1, norm=norm)
        for module in unet.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, a=0.01)  # the slope of LeakyReLU
                nn.init.zeros_(module.bias)
    return unet


def network_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """UNet.state_dict() -> PlainConvUNet's without its segmentation layers. Twins share their memory."""
    found = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "heads":
            continue
        value, block = value.contiguous(), rest.startswith("stages.")
        for name in _block_names(rest, part) if block else [rest.replace("ups.", "transpconvs.")]:
            found[f"{part}.{name}"] = value
            if part == "encoder":
                found[f"decoder.encoder.{name}"] = value
    return found


def _block_names(rest: str, part: str) -> list[str]:
    """stages.2.norm1.weight -> stages.2.0.convs.0.norm.weight (no `.0` in the decoder), and its twin."""
    _, stage, layer, name = rest.split(".")
    block = f"stages.{stage}{'.0' if part == 'encoder' else ''}.convs.{int(layer[4:]) - 1}"
    kind = layer[:4]  # conv or norm
    return [f"{block}.{kind}.{name}", f"{block}.all_modules.{int(kind == 'norm')}.{name}"]


def plan(*, channels: Sequence[int], norm: str, image_size: int, spacing_mm: float) -> dict[str, Any]:
    """For `configurations` in nnUNetPlans.json (nnU-Net 2.8.1): 2d, our network and grid."""
    stages = len(channels)
    return {
        "inherits_from": "2d",
        "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
        "spacing": [spacing_mm] * 2,
        "patch_size": [image_size] * 2,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": list(channels),
                "conv_op": "torch.nn.modules.conv.Conv2d",
                "kernel_sizes": [[3, 3]] * stages,
                "strides": [[1, 1]] + [[2, 2]] * (stages - 1),
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.{norm}norm.{norm.title()}Norm2d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def as_text(plan: dict[str, Any]) -> str:
    """`"2d_cmrssp": {...}` in JSON, a list of numbers in one line."""
    text = json.dumps(plan, indent=2)
    return f'"{CONFIGURATION}": ' + re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text)
