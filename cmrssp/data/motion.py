"""Where a slice moves over the heart cycle, without labels."""

import numpy as np
from scipy.ndimage import gaussian_filter


def temporal_deviation(cine: np.ndarray) -> np.ndarray:
    """(T, Z, H, W) -> (Z, H, W) float32: the standard deviation of each pixel over the frames."""
    return np.stack([cine[:, z].std(axis=0, dtype=np.float32) for z in range(cine.shape[1])])


def motion_map(deviation: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """Temporal deviation (Z, H, W) -> motion map (Z, H, W) float16; all 0 if nothing moves.

    The deviation is blurred in plane (sigma 2 mm). Its square root is taken (a few pixels change far more
    than others), and standardised over the stack without empty borders: 0, which also pads images, is the
    mean.
    """
    root = np.sqrt(gaussian_filter(deviation, [0, *(2 / s for s in spacing_mm)]))
    if not root.any():
        return root.astype(np.float16)
    box = tuple(slice(index.min(), index.max() + 1) for index in np.nonzero(root))
    mean, std = root[box].mean(dtype=np.float64), root[box].std(dtype=np.float64)
    flickers = std < 1e-3 * root.max()  # the whole image changes alike: no motion
    return (0 * root if flickers else (root - mean) / std).astype(np.float16)
