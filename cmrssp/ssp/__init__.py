"""The pretraining methods, one file each; `method.py` tells how to add one."""

from cmrssp.ssp.dino import DINO
from cmrssp.ssp.method import Method
from cmrssp.ssp.mim import MIM
from cmrssp.ssp.motion import Motion
from cmrssp.ssp.pcl import PCL
from cmrssp.ssp.simclr import SimCLR

METHODS: dict[str, type[Method]] = {method.name: method for method in (SimCLR, PCL, DINO, MIM, Motion)}
