"""The pretraining methods by name."""

from cmrssp.ssp.method import Method
from cmrssp.ssp.mim import MIM

METHODS: dict[str, type[Method]] = {method.name: method for method in (MIM,)}
