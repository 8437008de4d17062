"""The pretraining methods by name."""

from cmrssp.ssp.dino import DINO
from cmrssp.ssp.method import Method
from cmrssp.ssp.mim import MIM
from cmrssp.ssp.pcl import PCL
from cmrssp.ssp.simclr import SimCLR

METHODS: dict[str, type[Method]] = {method.name: method for method in (SimCLR, PCL, DINO, MIM)}
