"""The 2D U-Net of the nnU-Net family: the graph of PlainConvUNet, in three parts that stand alone.

Two 3x3 convolutions per stage, each with norm and LeakyReLU(0.01); down by stride 2, up by 2x2 transposed
convolution, skips by concatenation, 1x1 heads. Channels 32 64 128 256 512 512 512 have 33.47 M parameters.
Batch norm is the paper's, instance norm is what nnU-Net builds by default.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmrssp.errors import UserError

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": partial(nn.InstanceNorm2d, eps=1e-5, affine=True),
}


class Stage(nn.Sequential):
    """Two 3x3 convolutions, each with norm and activation; the first one has the stride."""

    recompute = False  # True: keep only the convolutions' inputs, compute the rest again in the backward pass

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        layers = OrderedDict()
        for i in (1, 2):
            layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
            layers[f"norm{i}"] = NORMS[norm](outputs)
            layers[f"act{i}"] = nn.LeakyReLU(0.01, inplace=True)
            inputs, stride = outputs, 1
        super().__init__(layers)

    def forward(self, image: Tensor) -> Tensor:
        for conv, norm, act in ((self.conv1, self.norm1, self.act1), (self.conv2, self.norm2, self.act2)):
            if self.recompute and torch.is_grad_enabled():
                image = _recomputed(conv, norm, act, image)
            else:
                image = act(_normalised(conv, norm, image))
        return _WithoutEffect.apply(image, self.conv1.bias, self.conv2.bias)


def _normalised(conv: nn.Conv2d, norm: nn.Module, image: Tensor) -> Tensor:
    """norm(conv(image)), without the two passes over the features that add a bias and sum up its gradient.
    The norm subtracts each channel's mean, and the bias with it. So the bias enters only the running mean of
    batch norm, and with fixed statistics (evaluation, a frozen encoder) the norm's own bias.
    """
    features = _convolved(conv, image)
    if isinstance(norm, nn.InstanceNorm2d):
        return norm(features)
    if not norm.training:
        shift = norm.bias + conv.bias * norm.weight * (norm.running_var + norm.eps).rsqrt()
        return F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, shift, eps=norm.eps)
    normalised = norm(features)
    # through .data, because autograd refuses to change a tensor that batch norm has saved (and does not read)
    norm.running_mean.data.add_(conv.bias.detach(), alpha=norm.momentum)
    return normalised


def _convolved(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """conv(image) without the bias. Compiled, a 3x3 convolution of one channel becomes a 1x1 convolution of
    16: the 3x3 pixels around each pixel, and 7 zeros. A GPU's matrix units need 16.
    """
    if conv.in_channels > 1 or not torch.compiler.is_compiling():
        return F.conv2d(image, conv.weight, None, conv.stride, conv.padding)
    height, width = image.shape[2:]
    padded = F.pad(image, (1, 1, 1, 1))
    shifted = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    neighbours = torch.cat([*shifted, image.new_zeros(len(image), 7, height, width)], dim=1)
    weight = F.pad(conv.weight.reshape(-1, 9), (0, 7))[:, :, None, None]
    return F.conv2d(neighbours.contiguous(memory_format=torch.channels_last), weight, None, conv.stride)


class _WithoutEffect(torch.autograd.Function):
    """(features, biases) -> the features. Gives the biases a gradient of 0, not None, where a norm takes them
    out. So SGD's momentum and weight decay move them towards 0, which changes no output of training (and
    hardly the running mean, which lags behind), and DDP sees them used.
    """

    @staticmethod
    def forward(ctx, features: Tensor, *biases: Tensor) -> Tensor:
        ctx.save_for_backward(*biases)
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


def _recomputed(conv: nn.Conv2d, norm: nn.Module, act: nn.Module, image: Tensor) -> Tensor:
    """act(norm(conv(image))), computed again in the backward pass."""
    options = {"use_reentrant": False, "preserve_rng_state": False}
    options["context_fn"] = lambda: (nullcontext(), _seen_before(norm))
    return checkpoint(lambda image: act(_normalised(conv, norm, image)), image, **options)


@contextmanager
def _seen_before(norm: nn.Module) -> Iterator[None]:
    """The norm normalises as it did, but takes nothing into its running statistics a second time."""
    momentum, counter = norm.momentum, norm.num_batches_tracked
    count = None if counter is None else counter.clone()
    norm.momentum = 0.0
    try:
        yield
    finally:
        norm.momentum = momentum
        if counter is not None:
            counter.copy_(count)


def recompute_activations(network: nn.Module) -> None:
    """Keep about half as much for the backward pass and compute the rest again; the results are the same."""
    for layers in network.modules():
        if isinstance(layers, Stage):
            layers.recompute = True


class Encoder(nn.Module):
    """(B, 1, H, W) -> the features of every stage, finest first; the last one is the bottleneck."""

    def __init__(self, channels: Sequence[int], norm: str) -> None:
        super().__init__()
        self.channels, self.norm = tuple(channels), norm
        inputs = (1, *channels[:-1])
        strides = [1] + [2] * (len(channels) - 1)
        self.stages = nn.ModuleList(map(Stage, inputs, channels, strides, [norm] * len(channels)))

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for layers in self.stages:
            image = layers(image)
            features.append(image)
        return features

    def pooled(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, C): the global average of the bottleneck."""
        return self(image)[-1].mean(dim=(2, 3))


class Decoder(nn.Module):
    """The encoder's features -> decoded features of every scale but the bottleneck's, finest first."""

    def __init__(self, channels: Sequence[int], norm: str) -> None:
        super().__init__()
        pairs = list(zip(channels[:0:-1], channels[-2::-1], strict=True))  # (coarser, finer), from below
        self.ups = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for coarse, fine in pairs)
        self.stages = nn.ModuleList(Stage(2 * fine, fine, 1, norm) for _, fine in pairs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        image, decoded = features[-1], []
        for up, layers, skip in zip(self.ups, self.stages, features[-2::-1], strict=True):
            image = layers(torch.cat((up(image), skip), dim=1))
            decoded.append(image)
        return decoded[::-1]


class UNet(nn.Module):
    """Encoder, decoder, and a head per scale: heads.0 at full resolution, heads.i at 1 / 2^i of it."""

    def __init__(self, *, channels: Sequence[int], num_outputs: int, num_heads: int, norm: str) -> None:
        """`num_heads`: scales - 1 = len(channels) - 1 for deep supervision, 1 without. `norm`: of NORMS."""
        super().__init__()
        self.encoder, self.decoder = Encoder(channels, norm), Decoder(channels, norm)
        self.heads = nn.ModuleList(nn.Conv2d(c, num_outputs, 1) for c in channels[:num_heads])

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 1, H, W) -> one (B, num_outputs, H / 2^i, W / 2^i) for each head i."""
        decoded = self.decoder(self.encoder(image))
        return [head(features) for head, features in zip(self.heads, decoded, strict=False)]

    def full_resolution(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, num_outputs, H, W): the first head alone, for prediction."""
        return self.heads[0](self.decoder(self.encoder(image))[0])


def check_image_size(image_size: int, channels: Sequence[int], norm: str, flag: str = "--image-size") -> None:
    """Raise UserError for a square that the stages cannot halve, or with one pixel left for instance norm."""
    factor = 2 ** (len(channels) - 1)
    least = 2 * factor if norm == "instance" else factor
    if len(channels) < 2:
        raise UserError(f"--channels: expected at least two stages, got {' '.join(map(str, channels))}")
    if image_size < least or image_size % factor:
        why = f"for {len(channels)} stages in --channels and --norm {norm}"
        raise UserError(
            f"{flag}: expected a multiple of {factor}, at least {least} ({why}), got {image_size}"
        )
