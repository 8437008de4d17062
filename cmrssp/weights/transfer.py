"""What of a checkpoint goes into a network."""

from collections.abc import Iterable

from cmrssp.errors import UserError
from cmrssp.unet import UNet
from cmrssp.weights.checkpoints import Checkpoint

PARTS = ("encoder", "decoder", "heads")


def transfer(checkpoint: Checkpoint, unet: UNet, parts: Iterable[str] = PARTS) -> dict[str, str]:
    """Copy the weights of these parts into `unet`, and report {part: what happened to it}. Encoder and
    decoder transfer whole or not at all; the heads only from a network with the same classes. Raises
    UserError for weights that do not fit.
    """
    if checkpoint.norm != unet.encoder.norm:
        ours = f"--norm {unet.encoder.norm}"
        what = f"was trained with --norm {checkpoint.norm}, this network has {ours}"
        raise UserError(f"{checkpoint.path}: {what}; leave --norm out, or pretrain with {ours}")
    state, source, report = unet.state_dict(), checkpoint.state_dict, {}
    for part in PARTS:
        ours = {key: state[key].shape for key in state if key.startswith(part + ".")}
        theirs = {key: source[key].shape for key in source if key.startswith(part + ".")}
        odd = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if not theirs:
            report[part] = f"fresh (the checkpoint has none), {len(ours)} tensors"
        elif part not in parts:
            report[part] = f"fresh (left out by --transfer), {len(ours)} tensors"
        elif part == "heads" and odd:
            report[part] = f"fresh (other classes in the checkpoint), {len(ours)} tensors"
        elif odd:
            has, needs = (
                " ".join(map(str, c)) for c in (checkpoint.config["channels"], unet.encoder.channels)
            )
            what = f"its {part} does not fit this network ({len(odd)} tensors differ, first {odd[0]})"
            raise UserError(f"{checkpoint.path}: {what}; it has --channels {has}, the network {needs}")
        else:
            state |= {key: source[key] for key in theirs}
            report[part] = f"transferred, {len(theirs)} tensors"
    unet.load_state_dict(state)
    return report
