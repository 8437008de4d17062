"""Checkpoint files: `unet.pt` with the weights that transfer, `last.pt` with the training state as well."""

import pickle
import struct
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmrssp.errors import UserError
from cmrssp.files import atomic
from cmrssp.unet import NORMS
from cmrssp.weights.provenance import Provenance

_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, TypeError,
            ValueError, AttributeError, AssertionError, struct.error)  # fmt: skip
_CONFIG = {"channels", "image_size", "spacing_mm", "classes"}


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, and where they come from.

    `state_dict` has the keys of `UNet.state_dict()`, or some of them. `config` has channels, norm,
    image_size (px), spacing_mm and classes (None if the network does not segment).
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    provenance: Provenance

    @property
    def norm(self) -> str:
        return self.config.get("norm", "batch")  # files of the first version do not name it

    @property
    def digests(self) -> dict[str, str]:
        return self.provenance.image_digests()

    def seen(self) -> dict[str, str]:
        return self.provenance.seen()


def load(path: str | Path) -> Checkpoint:
    """Read a `unet.pt`, a `last.pt` or a run folder (its unet.pt, else its last.pt), without running code.

    Prints a notice if the training has not ended. Raises UserError for any other file.
    """
    path = locate(path)
    checkpoint = parse(path, read(path))
    if unfinished := checkpoint.provenance.unfinished():
        print(f"{path}: its training has not ended ({unfinished})")
    return checkpoint


def parse(path: Path, content: dict[str, Any], weights: str = "state_dict") -> Checkpoint:
    """The content of a file as a Checkpoint, its tensors under the key `weights`. Raises UserError."""
    _refuse_3d(path, content)
    try:
        provenance = Provenance.from_dict(content["provenance"])
        checkpoint = Checkpoint(path, dict(content[weights]), dict(content["config"]), provenance)
        if not set(checkpoint.config) >= _CONFIG or checkpoint.norm not in NORMS:
            raise KeyError("config")
        if not all(isinstance(value, torch.Tensor) for value in checkpoint.state_dict.values()):
            raise TypeError(weights)
    except _DAMAGED:
        raise _not_ours(path, _describe(content)) from None
    return checkpoint


def locate(path: str | Path) -> Path:
    """The checkpoint file that a path names. Raises UserError if there is none."""
    path = Path(path).expanduser()
    if path.is_dir():
        existing = [file for file in (path / "unet.pt", path / "last.pt") if file.is_file()]
        if not existing:
            raise UserError(f"{path}: expected a run folder with unet.pt or last.pt, found neither")
        path = existing[0]
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a unet.pt, a last.pt or a run folder")
    return path


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `save` wrote. Runs no code from the file. Raises UserError."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip():  # torch.load does not verify checksums
                    raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except _DAMAGED:
        what = "a damaged file, or one that holds more than weights (no code was run)"
        raise _not_ours(path, what) from None
    except OSError as error:
        if error.filename is None:  # torch raises this one for a truncated file
            raise _not_ours(path, "a damaged file") from None
        raise


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all. Equal content gives equal bytes. Raises OSError on a full disk."""
    with atomic(path) as file:
        try:
            torch.save(_one_object_per_string(content), file)
        except RuntimeError as error:  # torch's translation of an OSError
            reason = str(error).splitlines()[0]
            raise OSError(f"{path}: cannot be written, the disk may be full ({reason})") from None


def _one_object_per_string(value: Any) -> Any:
    """Pickle writes a string again if it is another object, so equal content could give other bytes."""
    if type(value) is str:
        return sys.intern(value)
    if type(value) is dict:
        return {_one_object_per_string(key): _one_object_per_string(each) for key, each in value.items()}
    return [_one_object_per_string(each) for each in value] if type(value) is list else value


def _not_ours(path: Path, what: str) -> UserError:
    return UserError(f"{path}: expected a checkpoint of this package (unet.pt or last.pt), got {what}")


def _describe(content: dict) -> str:
    if "network_weights" in content:
        return "weights of nnU-Net"
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return "a bare state dict, without config and provenance"
    return "a file without complete state_dict, config and provenance"


def _refuse_3d(path: Path, content: dict) -> None:
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key, value in part.items():
            if isinstance(value, torch.Tensor) and value.ndim == 5:
                shape = " x ".join(map(str, value.shape))
                raise UserError(f"{path}: expected weights of a 2D network, got 3D ones ({key} is {shape})")
