"""Makes golden_metrics.json with other libraries' distances:  python tests/golden_metrics.py  (run once;
MONAI 1.6 and MedPy 0.5 must be importable, the tests need only the JSON)."""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("golden_metrics.json")
SPACINGS_MM = ((10.0, 1.25, 1.25), (6.5, 0.7, 1.9))


def masks() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (prediction, truth)}, bool (8, 40, 44): shells cut by the border, specks far away, grains."""
    z, y, x = np.indices((8, 40, 44))
    wave = np.sin(0.7 * y) + np.cos(0.9 * x + z)
    ball = (2.5 * (z - 3.5)) ** 2 + (y - 18) ** 2 + (x - 21) ** 2
    moved = (2.5 * (z - 4)) ** 2 + (y - 21) ** 2 + (x - 19) ** 2
    grain = np.sin(np.arange(z.size) ** 1.3).reshape(z.shape)
    return {
        "balls": (ball + 8 * wave < 120, moved < 130),
        "shells": ((ball < 400) & (ball > 150), (moved < 330) & (moved > 190)),
        "ball and specks": ((ball < 90) | (grain > 0.999), moved < 90),
        "grains": (grain > 0.9, grain < -0.8),
    }


def main() -> None:
    import torch
    from medpy.metric import binary as medpy
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    golden = {}
    for name, pair in masks().items():
        batch = [torch.from_numpy(mask)[None, None] for mask in pair]
        for spacing in SPACINGS_MM:
            monai = {
                "hausdorff_mm": compute_hausdorff_distance(*batch, spacing=spacing),
                "hd95_mm": compute_hausdorff_distance(*batch, percentile=95, spacing=spacing),
                "assd_mm": compute_average_surface_distance(*batch, symmetric=True, spacing=spacing),
            }
            golden[f"{name} {spacing}"] = {
                "MONAI": {column: value.item() for column, value in monai.items()},
                "MedPy": {
                    "hausdorff_mm": float(medpy.hd(*pair, voxelspacing=spacing)),
                    "assd_mm": float(medpy.assd(*pair, voxelspacing=spacing)),
                },
            }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
