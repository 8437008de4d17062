"""Weights that transfer: what a checkpoint holds, and what of it fits a network."""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmrssp.errors import UserError
from cmrssp.files import atomic
from cmrssp.unet import UNet

_PARTS = ("encoder", "decoder", "heads")
_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, TypeError,
            ValueError, AttributeError)  # fmt: skip
_CONFIG = {"channels", "image_size", "spacing_mm", "classes"}
_PROVENANCE = {"method", "data", "split", "split_seed", "seed", "subjects"}


@dataclass(frozen=True)
class Checkpoint:
    """`state_dict` has plain UNet keys. `config`: channels, image_size, spacing_mm, classes (None: no
    segmentation). `provenance`: method, epochs, data, split, subjects seen, and that of the checkpoint it
    started from (`init`).
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    provenance: dict[str, Any]

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
    """`unet.pt`, `last.pt` or a run folder (its unet.pt, else its last.pt). Runs no code from the file."""
    path = Path(path).expanduser()
    if path.is_dir():
        candidates = [path / "unet.pt", path / "last.pt"]
        existing = [c for c in candidates if c.is_file()]
        if not existing:
            raise UserError(f"{path}: expected a run folder with unet.pt or last.pt, found neither")
        path = existing[0]
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a unet.pt, a last.pt or a run folder")
    content = read(path)
    try:
        checkpoint = Checkpoint(path, *(dict(content[k]) for k in ("state_dict", "config", "provenance")))
        if not all(set(link) >= _PROVENANCE for link in checkpoint.history):
            raise KeyError("provenance")
        if not set(checkpoint.config) >= _CONFIG:
            raise KeyError("config")
        return checkpoint
    except _DAMAGED:
        raise _not_ours(path) from None


def read(path: Path) -> dict[str, Any]:
    """The content of a file of this package; runs no code from it. Raises UserError for any other file."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except _DAMAGED:
        raise _not_ours(path) from None


def _not_ours(path: Path) -> UserError:
    return UserError(
        f"{path}: expected a checkpoint of this package (unet.pt or last.pt), got another or a damaged file"
    )


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; the same content gives the same bytes. Raises OSError for a full disk."""
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
            _check_fit(checkpoint, target, part, ours, theirs)
            chosen.update({k: checkpoint.state_dict[k] for k in theirs})
            report[part] = f"transferred, {len(theirs)} tensors"
    unknown = {k for k in checkpoint.state_dict if not k.startswith(tuple(part + "." for part in _PARTS))}
    if unknown or not chosen:
        raise UserError(
            f"{checkpoint.path}: expected keys from {', '.join(_PARTS)}, got "
            f"{sorted(unknown)[:3] if unknown else 'no weights at all'}"
        )
    unet.load_state_dict({**target, **chosen})
    return report


def _check_fit(checkpoint: Checkpoint, target: dict, part: str, ours: set[str], theirs: set[str]) -> None:
    unfit = sorted(k for k in ours & theirs if target[k].shape != checkpoint.state_dict[k].shape)
    if unfit or ours != theirs:
        channels = checkpoint.config.get("channels")
        odd = unfit or sorted(ours ^ theirs)
        raise UserError(
            f"{checkpoint.path}: its {part} does not fit this network ({len(odd)} tensors differ, the first "
            f"is {odd[0]}); the checkpoint has --channels {' '.join(map(str, channels or ['unknown']))}"
        )


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
