import pytest
import torch
from loop import segmentation, settings

from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.hardware import memory


@pytest.fixture
def loader(write_mnms, beating, tmp_path):
    cines = store.build(
        dataset.find([write_mnms("A", *beating())], tmp_path)[0], tmp_path / "cache", labels=True
    )
    return Batches(
        cines,
        Slices(cines, ["mnms/A"], phases="both"),
        batch_size=4,
        seed=0,
        labelled=True,
        device=torch.device("cpu"),
    )


def test_the_estimate_against_a_count_by_hand(loader):
    """Two stages of 8 and 16 channels at 64 px. Every convolution's output is kept twice, before and after
    norm and activation (in place); the decoder adds the concatenation's 16 channels; the losses a few maps of
    4 classes.
    """
    method = segmentation(channels=(8, 16), spacing_mm=1.0, augment=True)
    fixed, per_slice = memory.estimate(method, loader, amp="off")
    assert fixed == 3 * 4 * sum(p.numel() for p in method.parameters())
    pixels = 64 * 64
    stages = 2 * (2 * 8) * pixels + 2 * (2 * 16) * pixels / 4 + 2 * (2 * 8) * pixels
    by_hand = 4 * (stages + 16 * pixels + 5 * 4 * pixels)
    assert per_slice == pytest.approx(by_hand, rel=0.2)
    assert memory.estimate(method, loader, amp="fp16")[1] == pytest.approx(per_slice / 2, rel=0.1)


def test_what_cannot_fit_is_refused_with_a_batch_size_that_does(loader, monkeypatch, capsys):
    method = segmentation(channels=(8, 16), spacing_mm=1.0, augment=True)
    fixed, per_slice = memory.estimate(method, loader, amp="off")
    memory.check(method, loader, settings())
    assert "memory: about 0.0 of " in capsys.readouterr().out
    monkeypatch.setattr(memory, "capacity", lambda device: fixed + 2.5 * per_slice)
    with pytest.raises(UserError, match=r"--batch-size 4: this training needs about .* try --batch-size 2"):
        memory.check(method, loader, settings())
    monkeypatch.setattr(memory, "capacity", lambda device: 1.5 * (fixed + 4 * per_slice))
    compiled = settings(compile=True, graph=True)  # may need 2.1 times as much
    assert memory.check(method, loader, compiled) == compiled
    capsys.readouterr()
    assert memory.check(method, loader, compiled, uncompile=True) == settings()
    assert "compile: off" in capsys.readouterr().out
    monkeypatch.setattr(memory, "capacity", lambda device: 2.2 * (fixed + 4 * per_slice))
    assert memory.check(method, loader, compiled, uncompile=True) == compiled
    monkeypatch.setattr(memory, "capacity", lambda device: fixed)
    with pytest.raises(UserError, match="try fewer --channels"):
        memory.check(method, loader, settings())
