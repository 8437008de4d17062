import json

import golden_unet
import pytest
import torch

from cmrssp.errors import UserError
from cmrssp.unet import UNet, check_image_size

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
    with pytest.raises(UserError, match=r"--local-size: expected at least 128 with --norm instance"):
        check_image_size(64, PAPER, flag="--local-size", norm="instance")
    network = UNet(channels=(4, 8, 8), num_outputs=1, num_heads=1, norm="instance")
    assert network(torch.zeros(1, 1, 8, 8))[0].shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        network(torch.zeros(1, 1, 4, 4))
