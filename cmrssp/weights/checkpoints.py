"""Checkpoint files: `unet.pt` with the weights that transfer, `last.pt` with the training state as well."""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmrssp.errors import UserError
from cmrssp.files import atomic
from cmrssp.weights.provenance import Provenance


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, and where they come from. `state_dict` has the keys of `UNet.state_dict()`, or
    some of them. `config` has channels, norm, image_size (px), spacing_mm and classes (None: no
    segmentation).
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    provenance: Provenance

    @property
    def norm(self) -> str:
        return self.config.get("norm", "batch")  # files of the first version do not name it

    @property
    def network(self) -> dict[str, Any]:
        """The values of the flags of its network: channels, image_size, spacing_mm and norm."""
        return {**{k: self.config[k] for k in ("channels", "image_size", "spacing_mm")}, "norm": self.norm}

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


def parse(path: Path, content: dict[str, Any]) -> Checkpoint:
    """The content of a file as a Checkpoint. Raises UserError."""
    try:
        provenance = Provenance.from_dict(content["provenance"])
        return Checkpoint(path, dict(content["state_dict"]), dict(content["config"]), provenance)
    except (KeyError, TypeError, ValueError):
        keys = ", ".join(map(str, [*content][:3]))
        raise _not_ours(path, f"a file without weights, config or provenance (with {keys})") from None


def locate(path: str | Path) -> Path:
    """The checkpoint file that a path names. Raises UserError if there is none."""
    path = Path(path).expanduser()
    for file in (path / "unet.pt", path / "last.pt", path):
        if file.is_file():
            return file
    raise UserError(f"{path}: no such checkpoint; expected a unet.pt, a last.pt or a run folder with one")


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `save` wrote. Runs no code from the file. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not verify checksums
                raise zipfile.BadZipFile
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception:  # a damaged file can raise anything
        what = "a damaged file, or one that holds more than weights (no code was run)"
        raise _not_ours(path, what) from None


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
