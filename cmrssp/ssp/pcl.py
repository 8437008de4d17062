"""Positional contrastive learning: slices at nearly the same place in the heart attract each other, whoever's
heart it is (Zeng et al., arXiv 2106.09157). SimCLR with other positives.
"""

import argparse

import torch

from cmrssp.cli.argument_types import share
from cmrssp.ssp.simclr import SimCLR

_ROUNDING = 1e-6  # positions k / n and m / n' can differ by exactly the threshold: that is not below it


class PCL(SimCLR):
    name = "pcl"
    defaults = {
        "epochs": 100,
        "batch_size": 64,
        "lr": 0.1,
        "schedule": "cosine",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-5,
        "amp": "off",
    }
    quick = {"epochs": 3, "batch_size": 64}

    def __init__(self, *, threshold: float, **options) -> None:
        super().__init__(**options)
        self.threshold = threshold

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        SimCLR.add_flags(parser)
        parser.add_argument(
            "--threshold",
            type=share,
            default=0.1,
            metavar="SHARE",
            help="slices attract when their positions from base 0 to apex 1 differ by less "
            "(paper, section 2.4)",
        )

    @classmethod
    def own_flags(cls, args: argparse.Namespace) -> dict:
        return {**super().own_flags(args), "threshold": args.threshold}

    def positives(self, position: torch.Tensor) -> torch.Tensor:
        """(2B, 2B) bool: the own other view, and every slice of any subject at nearly the same position. A
        NaN position (a stack of one slice) is near to none.
        """
        exact = position.double()
        near = (exact[:, None] - exact[None]).abs() < self.threshold - _ROUNDING
        return (near | super().positives(position)).fill_diagonal_(False)
