"""Weights that transfer: what a checkpoint holds, and what of it fits a network."""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from cmrssp.errors import UserError
from cmrssp.files import atomic
from cmrssp.unet import NORMS, UNet

_PARTS = ("encoder", "decoder", "heads")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, TypeError,
            ValueError, AttributeError, AssertionError, struct.error)  # fmt: skip
_CONFIG = {"channels", "image_size", "spacing_mm", "classes"}
_PROVENANCE = {"method", "data", "split", "split_seed", "seed", "subjects"}


@dataclass(frozen=True)
class Checkpoint:
    """`state_dict` has plain UNet keys. `config`: channels, norm, image_size, spacing_mm, classes (None: no
    segmentation). `provenance`: method, epochs, data, split, subjects seen, and that of the checkpoint it
    started from (`init`).
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def norm(self) -> str:
        return self.config.get("norm", "batch")

    @property
    def unfinished(self) -> str:
        """How far its training has come, "" where it came to its end or does not say."""
        epochs, planned = self.provenance.get("epochs"), self.provenance.get("recipe", {}).get("epochs")
        return f"{epochs} of {planned} epochs" if planned and epochs is not None and epochs < planned else ""

    @property
    def history(self) -> list[dict]:
        """This training's provenance, then that of the one it started from, and so on."""
        chain, link = [], self.provenance
        while link:
            chain.append(link)
            link = link.get("init")
        return chain

    @property
    def digests(self) -> dict[str, str]:
        """{subject key: `check.digests` of its images} of all that the trainings have read."""
        return {key: image for link in self.history for key, image in link.get("digests", {}).items()}

    def seen(self) -> dict[str, str]:
        """{subject key: method that trained on it}, over the whole history."""
        return {key: link["method"] for link in self.history for key in link["subjects"]}


def load(path: str | Path) -> Checkpoint:
    """`unet.pt`, `last.pt` or a run folder (its unet.pt, else its last.pt). Runs no code from the file.

    A prefix that DistributedDataParallel or torch.compile put before every key is taken off, and said, as is
    a training that has not come to its end. Raises UserError for any other file.
    """
    path = locate(path)
    checkpoint = parse(path, read(path))
    if checkpoint.unfinished:
        print(f"{path}: of a training that has not ended, {checkpoint.unfinished}")
    return replace(checkpoint, state_dict=_without_prefix(path, checkpoint.state_dict))


def parse(path: Path, content: dict[str, Any], state: str = "state_dict") -> Checkpoint:
    """The content of a file with the weights below `state`. Raises UserError where something is missing."""
    _refuse_3d(path, content)
    try:
        checkpoint = Checkpoint(path, *(dict(content[k]) for k in (state, "config", "provenance")))
        if not all(set(link) >= _PROVENANCE for link in checkpoint.history):
            raise KeyError("provenance")
        if not set(checkpoint.config) >= _CONFIG or checkpoint.norm not in NORMS:
            raise KeyError("config")
        if not all(isinstance(value, torch.Tensor) for value in checkpoint.state_dict.values()):
            raise TypeError("state_dict")
    except _DAMAGED:
        raise _not_ours(path, _contents(content)) from None
    return checkpoint


def locate(path: str | Path) -> Path:
    """The file that a path names: itself, or the run folder's unet.pt, else its last.pt. Raises UserError."""
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
    """The content of a file of this package. Runs no code from the file. Raises UserError for any other."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip():  # torch does not look whether a bit has changed
                    raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except _DAMAGED as error:
        raise _not_ours(path, _kind(path, error)) from None
    except OSError as error:
        if error.filename is None:  # torch's, for a file that is cut off
            raise _not_ours(path, "a damaged file") from None
        raise


def _not_ours(path: Path, what: str) -> UserError:
    return UserError(f"{path}: expected a checkpoint of this package (unet.pt or last.pt), got {what}")


def _kind(path: Path, error: Exception) -> str:
    """Of a file that torch does not load as plain weights."""
    with open(path, "rb") as file:
        head = file.read(512)
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        return f"a pickle with other objects than weights ({foreign[1]}); none of it was run"
    if not head:
        return "an empty file"
    if head.startswith(b"\x80"):
        return "a pickle that is not weights"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return "another or a damaged file"


def _contents(content: dict) -> str:
    """Of weights that are not a checkpoint of this package."""
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


def _without_prefix(path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    taken = ""
    while prefix := next((p for p in _PREFIXES if state and all(k.startswith(p) for k in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        taken += prefix
    if taken:
        print(f"{path}: its keys start with '{taken}'; loaded without that")
    return state


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; the same content gives the same bytes. Raises OSError, also for a full disk."""
    with atomic(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of an OSError
            raise OSError(
                f"{path}: cannot be written, the disk may be full ({str(error).splitlines()[0]})"
            ) from None


def transfer(checkpoint: Checkpoint, unet: UNet) -> dict[str, str]:
    """Copy what transfers into `unet`, and report {part: what happened to it}.

    Encoder and decoder transfer where the checkpoint has them, whole or not at all; the heads only from a
    network with the same classes. Raises UserError for weights that do not fit: nothing is loaded in silence.
    """
    if checkpoint.norm != unet.encoder.norm:
        raise UserError(
            f"{checkpoint.path}: was trained with --norm {checkpoint.norm}, this network has --norm "
            f"{unet.encoder.norm}; leave --norm out, or pretrain with --norm {unet.encoder.norm}"
        )
    check_keys(checkpoint)
    target = unet.state_dict()
    report, chosen = {}, {}
    for part in _PARTS:
        ours = {k for k in target if k.startswith(part + ".")}
        theirs = {k for k in checkpoint.state_dict if k.startswith(part + ".")}
        same_heads = {k: target[k].shape for k in ours} == {k: checkpoint.state_dict[k].shape for k in theirs}
        if not theirs:
            report[part] = f"fresh (the checkpoint has none), {len(ours)} tensors"
        elif part == "heads" and not same_heads:
            report[part] = f"fresh (other classes in the checkpoint), {len(ours)} tensors"
        else:
            _check_fit(checkpoint, unet, part, ours, theirs)
            chosen.update({k: checkpoint.state_dict[k] for k in theirs})
            report[part] = f"transferred, {len(theirs)} tensors"
    unet.load_state_dict({**target, **chosen})
    return report


def check_keys(checkpoint: Checkpoint) -> None:
    """Raise UserError for weights that are no U-Net's, or that have other channels than the configuration."""
    state, said = checkpoint.state_dict, list(checkpoint.config["channels"])
    unknown = sorted(k for k in state if not k.startswith(tuple(part + "." for part in _PARTS)))
    if unknown or not state:
        raise UserError(
            f"{checkpoint.path}: expected keys from {', '.join(_PARTS)}, got "
            f"{unknown[:3] if unknown else 'no weights at all (an empty state dict)'}"
        )
    names = (f"encoder.stages.{n}.conv1.weight" for n in count())
    found = [len(state[name]) for name in takewhile(state.__contains__, names)]
    if found and found != said:
        raise UserError(
            f"{checkpoint.path}: its configuration says --channels {_words(said)}, its weights have "
            f"{_words(found)}"
        )


def _check_fit(checkpoint: Checkpoint, unet: UNet, part: str, ours: set[str], theirs: set[str]) -> None:
    target = unet.state_dict()
    unfit = sorted(k for k in ours & theirs if target[k].shape != checkpoint.state_dict[k].shape)
    if unfit or ours != theirs:
        odd = unfit or sorted(ours ^ theirs)
        raise UserError(
            f"{checkpoint.path}: its {part} does not fit this network ({len(odd)} tensors differ, first "
            f"{odd[0]}); the checkpoint has --channels {_words(checkpoint.config['channels'])}, the network "
            f"{_words(unet.encoder.channels)}"
        )


def _words(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def refuse_seen(checkpoint: Checkpoint, split: dict[str, list[str]], parts: tuple[str, ...]) -> None:
    """Raise UserError when the checkpoint has been trained on a subject of these parts of the split."""
    seen = checkpoint.seen()
    for part in parts:
        leaked = [key for key in split[part] if key in seen]
        if leaked:
            raise UserError(
                f"{checkpoint.path}: has been trained on {len(leaked)} of the {len(split[part])} {part} "
                f"subjects ({seen[leaked[0]]}, the first is {leaked[0]}); use the split that it was "
                "trained with (leave out --split-seed and --split-file), or pretrain anew"
            )
