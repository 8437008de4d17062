"""What of a checkpoint goes into a network."""

from collections.abc import Iterable
from itertools import count, takewhile

from cmrssp.errors import UserError
from cmrssp.unet import UNet
from cmrssp.weights.checkpoints import Checkpoint

PARTS = ("encoder", "decoder", "heads")


def transfer(checkpoint: Checkpoint, unet: UNet, parts: Iterable[str] = PARTS) -> dict[str, str]:
    """Copy the weights of these parts into `unet`, and report {part: what happened to it}.

    Encoder and decoder transfer whole or not at all; the heads only from a network with the same classes.
    Raises UserError for weights that do not fit.
    """
    if checkpoint.norm != unet.encoder.norm:
        theirs, ours = f"--norm {checkpoint.norm}", f"--norm {unet.encoder.norm}"
        what = f"was trained with {theirs}, this network has {ours}"
        raise UserError(f"{checkpoint.path}: {what}; leave --norm out, or pretrain with {ours}")
    check_keys(checkpoint)
    target, source = unet.state_dict(), checkpoint.state_dict
    report, chosen = {}, {}
    for part in PARTS:
        ours = {key: target[key].shape for key in target if key.startswith(part + ".")}
        theirs = {key: source[key].shape for key in source if key.startswith(part + ".")}
        if not theirs:
            report[part] = f"fresh (the checkpoint has none), {len(ours)} tensors"
        elif part not in parts:
            report[part] = f"fresh (left out by --transfer), {len(ours)} tensors"
        elif part == "heads" and ours != theirs:
            report[part] = f"fresh (other classes in the checkpoint), {len(ours)} tensors"
        elif ours != theirs:
            odd = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
            what = f"its {part} does not fit this network ({len(odd)} tensors differ, first {odd[0]})"
            has = f"the checkpoint has --channels {_words(checkpoint.config['channels'])}"
            raise UserError(f"{checkpoint.path}: {what}; {has}, the network {_words(unet.encoder.channels)}")
        else:
            chosen.update({key: source[key] for key in theirs})
            report[part] = f"transferred, {len(theirs)} tensors"
    unet.load_state_dict({**target, **chosen})
    return report


def check_keys(checkpoint: Checkpoint) -> None:
    """Raise UserError if the weights are not a U-Net's, or have other channels than the configuration."""
    state, expected = checkpoint.state_dict, list(checkpoint.config["channels"])
    unknown = sorted(key for key in state if key.partition(".")[0] not in PARTS)
    if unknown or not state:
        got = unknown[:3] or "no weights at all (an empty state dict)"
        raise UserError(f"{checkpoint.path}: expected keys from {', '.join(PARTS)}, got {got}")
    names = (f"encoder.stages.{n}.conv1.weight" for n in count())
    found = [len(state[name]) for name in takewhile(state.__contains__, names)]
    if found and found != expected:
        what = f"its configuration says --channels {_words(expected)}, its weights have {_words(found)}"
        raise UserError(f"{checkpoint.path}: {what}")


def _words(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
