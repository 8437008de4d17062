"""Positional contrastive learning: slices at nearly the same place in the heart attract each other, also
across subjects (Zeng et al., arXiv 2106.09157). SimCLR with more positives.
"""

import argparse

import torch

from cmrssp.ssp.flag_types import fraction
from cmrssp.ssp.simclr import SimCLR

_ROUNDING = 1e-6  # positions k / n and m / n' can differ by exactly the threshold, which is not below it


class PCL(SimCLR):
    name = "pcl"
    purpose = "slices at nearly the same place between base and apex attract each other (encoder)"
    defaults = {"batch_size": 64, "lr": 0.1, "weight_decay": 1e-5, "amp": "off"}
    quick = {"epochs": 3, "batch_size": 64}

    def __init__(self, *, threshold: float, **options) -> None:
        super().__init__(**options)
        self.threshold = threshold

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        SimCLR.add_flags(parser)
        less = "slices attract if their positions, base 0 to apex 1, differ by less (paper, section 2.4)"
        parser.add_argument("--threshold", type=fraction, default=0.1, metavar="FRACTION", help=less)

    def positives(self, position: torch.Tensor) -> torch.Tensor:
        """(2B, 2B) bool, 1 = attracts: the other view of the same slice, and every slice at nearly the same
        position. A NaN position (a stack of one slice) is near to none.
        """
        exact = position.double()
        near = (exact[:, None] - exact[None]).abs() < self.threshold - _ROUNDING
        return (near | super().positives(position)).fill_diagonal_(False)
