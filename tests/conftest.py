"""Small data for the tests: cines written by hand, the small phantom, and the real ones where they are."""

import os
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from cmrssp.data import phantom

TESTS = Path(__file__).parent
REAL = TESTS.parents[1] / "shared" / "data"
# a test file finds what it shares with another folder
sys.path[:0] = [str(TESTS), *(str(folder) for folder in sorted(TESTS.glob("[a-z]*")) if folder.is_dir())]
torch.set_num_threads(1)  # tiny networks gain nothing from more, and sums depend on it in their last bits
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the campaigns that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nnunet: needs nnunetv2, which is not among the requirements")
    config.addinivalue_line("markers", "slow: a campaign that takes minutes; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="a campaign that takes minutes: add --slow"))


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(request):
    """Whatever the machine has: on a GPU sums depend on their order. Those of test_gpu.py take the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_gpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that tests start
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def acdc70() -> Path:
    if not (REAL / "acdc70").is_dir():
        pytest.skip(f"real cines are absent ({REAL / 'acdc70'})")
    return REAL / "acdc70"


@pytest.fixture(scope="session")
def bivme() -> Path:
    if not (REAL / "bivme").is_dir():
        pytest.skip(f"real cines are absent ({REAL / 'bivme'})")
    return REAL / "bivme"


@pytest.fixture(scope="session")
def published_split() -> Path:
    if not (REAL / "published_split").is_dir():
        pytest.skip(f"the published split is absent ({REAL / 'published_split'})")
    return REAL / "published_split"


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory) -> Path:
    """Eight small phantom subjects in the M&Ms layout; read only."""
    folder = tmp_path_factory.mktemp("data") / "hearts"
    phantom.write(folder, num_subjects=8, num_frames=3, max_slices=3, max_matrix=96)
    return folder


@pytest.fixture
def write_mnms(tmp_path):
    """write_mnms(id, cine (X, Y, Z, T), labels or None, affine) -> the folder it lies in."""

    def write(
        id: str, cine: np.ndarray, labels: np.ndarray | None = None, affine: np.ndarray | None = None
    ) -> Path:
        affine = np.diag([1.5, 1.5, 10.0, 1.0]) if affine is None else affine
        folder = tmp_path / "mnms"
        folder.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(cine, affine), folder / f"{id}_sa.nii.gz")
        if labels is not None:
            nibabel.save(nibabel.Nifti1Image(labels.astype(np.uint8), affine), folder / f"{id}_sa_gt.nii.gz")
        return folder

    return write


@pytest.fixture(scope="session")
def beating():
    """beating(seed) -> (cine (X, Y, Z, T) int16, labels with ED in frame 2 and ES in frame 0); 40 x 32 x 3 x
    3.
    """

    def make(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        x, y = np.meshgrid(np.arange(40), np.arange(32), indexing="ij")
        distance = np.hypot(x - 22, y - 14)
        cine = rng.integers(0, 40, (40, 32, 3, 3)).astype(np.int16)
        labels = np.zeros(cine.shape, np.uint8)
        for frame, radius in ((0, 4), (1, 6), (2, 8)):
            cine[..., frame][distance < radius] += 200
            if frame != 1:
                labels[..., frame][distance < radius + 3] = 2
                labels[..., frame][distance < radius] = 1
                labels[..., frame][(x < 9) & (y < 20)] = 3
        return cine, labels

    return make
