import copy
import json
from functools import partial

import golden_unet
import pytest
import torch
from torch import nn

from cmrssp.errors import UserError
from cmrssp.unet import Stage, UNet, check_image_size

PAPER = (32, 64, 128, 256, 512, 512, 512)


def test_the_papers_size():
    network = UNet(channels=PAPER, num_outputs=4, num_heads=6, norm="batch")
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(33.47e6, abs=5e3)
    assert sum(p.numel() for p in network.encoder.parameters()) == pytest.approx(14.16e6, abs=5e3)


@pytest.mark.parametrize(
    ("norm", "name", "rounding"), [("batch", "outputs", 1e-6), ("instance", "instance_outputs", 2e-4)]
)
def test_same_outputs_as_plain_conv_unet_at_all_six_scales(norm, name, rounding):
    """An instance norm over the few pixels of the coarse scales enlarges what float32 rounds away, which is
    another part of it on every kind of processor.
    """
    golden = json.loads(golden_unet.GOLDEN.read_text())[name]
    network = UNet(channels=golden_unet.CHANNELS, num_outputs=4, num_heads=6, norm=norm).eval()
    network.load_state_dict(
        {
            k: golden_unet.fill(k, tuple(v.shape)) if v.is_floating_point() else v
            for k, v in network.state_dict().items()
        }
    )
    with torch.no_grad():
        outputs = network(golden_unet.image())
        assert torch.equal(network.full_resolution(golden_unet.image()), outputs[0])
    assert [o.shape[2] for o in outputs] == [128, 64, 32, 16, 8, 4] and len(golden) == 6
    for output, expected in zip(outputs, golden, strict=True):
        ours = [output[0, :, y, x].tolist() for y, x in golden_unet.pixels(output.shape[2])]
        assert (torch.tensor(ours) - torch.tensor(expected)).abs().max() < rounding


def test_the_decoder_does_not_hold_the_encoder():
    keys = UNet(channels=(4, 8, 8), num_outputs=1, num_heads=1, norm="batch").state_dict()
    assert {k.split(".")[0] for k in keys} == {"encoder", "decoder", "heads"}
    assert not [k for k in keys if k.startswith("decoder.") and "encoder" in k]


@pytest.mark.parametrize(
    ("size", "channels", "message"),
    [(100, PAPER, "multiple of 64"), (0, PAPER, "multiple"), (64, (8,), "at least two stages")],
)
def test_sizes_that_cannot_be(size, channels, message):
    with pytest.raises(UserError, match=message):
        check_image_size(size, channels, norm="batch")


def test_instance_norm_needs_two_pixels_at_the_bottleneck():
    """It refuses a single value, as torch does; batch norm has those of the other slices."""
    check_image_size(64, PAPER, norm="batch")
    check_image_size(128, PAPER, norm="instance")
    with pytest.raises(UserError, match=r"--local-size: .* at least 128 .*--norm instance"):
        check_image_size(64, PAPER, flag="--local-size", norm="instance")
    network = UNet(channels=(4, 8, 8), num_outputs=1, num_heads=1, norm="instance")
    assert network(torch.zeros(1, 1, 8, 8))[0].shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        network(torch.zeros(1, 1, 4, 4))


def make_stages(norm, seed=0):
    """(a stage in float64 whose numbers are all unlike those of the start, its copy)."""
    torch.manual_seed(seed)
    stage = Stage(3, 5, 2, norm).double()
    with torch.no_grad():
        for tensor in (*stage.parameters(), *stage.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return stage, copy.deepcopy(stage)


def as_written(stage, image):
    """Layer by layer, the bias added to the features."""
    return nn.Sequential.forward(stage, image)


@pytest.mark.parametrize("synchronised", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_stage_gives_what_its_layers_give_one_by_one(norm, training, synchronised):
    """Two passes before the backward one, as DINO's two sizes of crops."""
    stage, plain = make_stages(norm)
    if synchronised:
        stage = nn.SyncBatchNorm.convert_sync_batchnorm(stage)
    images = [torch.randn(4, 3, size, size, dtype=torch.float64) for size in (16, 8)]
    found, expected = [], []
    for network, forward, into in ((stage, stage, found), (plain, partial(as_written, plain), expected)):
        network.train(training)
        outputs = [forward(image) for image in images]
        sum(output.square().mean() for output in outputs).backward()
        into += [*outputs, *network.buffers(), *(p.grad for p in network.parameters())]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-6
    assert stage.state_dict().keys() == plain.state_dict().keys()
    assert (plain.norm1.training, plain.conv2.bias.grad.abs().max() > 1e-3) == (
        training,
        norm == "batch" and not training,  # with fixed statistics a bias counts
    )


def test_the_product_that_a_compiled_network_makes_of_its_first_convolution(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(0)
    stage = Stage(1, 5, 1, "batch").double()
    plain, image = copy.deepcopy(stage), torch.randn(3, 1, 9, 7, dtype=torch.float64)
    found, expected = stage(image), as_written(plain, image)
    assert (found - expected).abs().max() < 1e-9
    for output in (found, expected):
        (output * image).square().sum().backward()
    assert (stage.conv1.weight.grad - plain.conv1.weight.grad).abs().max() < 1e-9


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_weight_decay_and_momentum_move_a_bias_that_has_no_effect(norm):
    """By hand for a gradient of exactly 0: v = 0.9 v + 0.1 b, b = b - 0.5 v."""
    stage, _ = make_stages(norm)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    bias, velocity = stage.conv1.bias.detach().clone(), 0.0
    for _ in range(3):
        stage(torch.randn(4, 3, 8, 8, dtype=torch.float64)).square().mean().backward()
        assert not stage.conv1.bias.grad.any() and not stage.conv2.bias.grad.any()
        optimizer.step()
        optimizer.zero_grad()
        velocity = 0.9 * velocity + 0.1 * bias
        bias = bias - 0.5 * velocity
    assert (stage.conv1.bias - bias).abs().max() < 1e-12 and bias.abs().min() > 0
