import numpy as np
import pytest

from cmrssp.data.motion import motion_map, temporal_deviation


def two_spots() -> np.ndarray:
    """(2, 1, 33, 40): a pixel that goes from 0 to 16, another from 0 to 4."""
    cine = np.zeros((2, 1, 33, 40), np.int16)
    cine[1, 0, 8, 8], cine[1, 0, 24, 32] = 16, 4
    return cine


def test_temporal_deviation_by_hand():
    deviation = temporal_deviation(two_spots())
    assert (deviation[0, 8, 8], deviation[0, 24, 32], deviation.sum()) == (8, 2, 10)


def test_motion_map_by_hand():
    """Gaussians of 1 and 0.5 pixels (2 mm), their square roots, standardised in their box."""
    found = motion_map(temporal_deviation(two_spots()), (2.0, 4.0))
    kernels = []
    for sigma in (1.0, 0.5):
        taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
        kernels.append(taps / taps.sum() * (np.abs(np.arange(-4, 5)) <= 4 * sigma))
    blob = np.outer(*kernels)
    root = np.zeros((33, 40))
    root[4:13, 4:13], root[20:29, 28:37] = np.sqrt(8 * blob), np.sqrt(2 * blob)
    assert found.dtype == np.float16 and found.shape == (1, 33, 40)
    inside = root[4:29, 6:35]
    assert found[0] == pytest.approx((root - inside.mean()) / inside.std(), rel=5e-3, abs=2e-3)


def test_the_intensity_scale_does_not_matter():
    maps = [motion_map(temporal_deviation(scale * two_spots()), (2.0, 4.0)) for scale in (1, 100)]
    assert maps[0] == pytest.approx(maps[1], rel=2e-3, abs=1e-3)


@pytest.mark.parametrize(
    "cine", [two_spots()[:1], np.stack([np.full((1, 8, 8), n, np.int16) for n in (1, 5)])]
)
def test_one_frame_or_flicker_is_no_motion(cine):
    assert not motion_map(temporal_deviation(cine), (2.0, 2.0)).any()
