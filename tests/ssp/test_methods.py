import pytest
import torch
from loop import segmentation

from cmrssp.data import dataset, store
from cmrssp.data.batches import collate
from cmrssp.errors import UserError
from cmrssp.segmentation import predict_frames
from cmrssp.ssp.mim import MIM
from cmrssp.training import step_generator

SMALL = {"channels": (4, 8, 8), "norm": "batch", "image_size": 32, "spacing_mm": 1.5}


@pytest.fixture
def hearts(write_mnms, beating, tmp_path):
    for i, id in enumerate("AB"):
        folder = write_mnms(id, *beating(i))
    return store.build(dataset.find([folder], tmp_path)[0], tmp_path / "cache", labels=True)


def mim(**changes):
    return MIM(**{**SMALL, "augment": True, "patch_size": 8, "mask_ratio": 0.75, **changes})


def test_mim_masks_whole_patches_of_every_image(hearts):
    method = mim()
    views = method.views(
        collate(hearts, [(0, t, z) for t in range(3) for z in range(3)], labelled=False),
        step_generator(0, 0, 0),
    )
    patches = views["mask"].view(9, 4, 8, 4, 8).float().mean((2, 4))  # share masked of each 8 x 8 patch
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    assert patches.sum((1, 2)).tolist() == [12.0] * 9  # round(0.75 * 16)
    assert len({tuple(p.flatten().tolist()) for p in patches}) > 1  # another mask for every image
    masked = method.panels(views)["masked"]
    assert (masked[views["mask"]] == 0).all() and (masked == views["image"])[~views["mask"]].all()


def test_mim_loss_is_that_of_the_masked_pixels(hearts):
    torch.manual_seed(0)
    method = mim().eval()
    views = method.views(collate(hearts, [(0, 0, 0), (1, 2, 1)], labelled=False), step_generator(0, 0, 0))
    loss, logs = method(views, 0.0)
    with torch.no_grad():
        reconstruction = method.unet(torch.where(views["mask"], 0.0, views["image"]))[0]
    errors = [
        (float(reconstruction[i, 0, y, x]) - float(views["image"][i, 0, y, x])) ** 2
        for i, _, y, x in views["mask"].nonzero().tolist()
    ]
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5) and logs == {}
    changed = {**views, "image": torch.where(views["mask"], views["image"] + 3, views["image"])}
    assert not torch.equal(method(changed, 0.0)[0], loss)  # what is masked is the target


def test_mim_in_bf16_stays_near_float32(hearts):
    torch.manual_seed(0)
    method = mim()
    views = method.views(collate(hearts, [(0, 0, 0), (1, 2, 1)], labelled=False), step_generator(0, 0, 0))
    plain = method(views, 0.0)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(views, 0.0)[0]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain, abs=2e-2)


def test_mim_transfers_encoder_and_decoder(hearts):
    assert {k.split(".")[0] for k in mim().pretrained_state()} == {"encoder", "decoder"}


def test_views_depend_on_the_generator_and_validation_views_do_not(hearts):
    batch = collate(hearts, [(0, 0, 0)], labelled=True)
    for method in (mim(), segmentation(**SMALL, augment=True)):
        first, again, other = (method.views(batch, step_generator(0, 0, step)) for step in (0, 0, 1))
        assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(
            first["image"], other["image"]
        )
        plain = [method.views(batch, None) for _ in range(2)]
        assert all(torch.equal(plain[0][k], plain[1][k]) for k in plain[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 12}, "--patch-size: expected a divisor"),
        ({"mask_ratio": 0.0}, "--mask-ratio"),
        ({"image_size": 34, "patch_size": 17}, "--image-size"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        mim(**changes)


def test_prediction_lies_on_the_native_grid(hearts):
    """A network that thresholds the image must give the threshold of the native image, where the crop covers
    it.
    """
    method = segmentation().eval()
    level = (120 - hearts.cines[1].mean) / hearts.cines[1].std
    threshold = ThresholdAt(level)
    method.unet = threshold
    (labels,) = predict_frames([method], hearts, 1, [2], torch.device("cpu"))
    image = torch.from_numpy(hearts.volume(1, 2).copy())
    assert labels.shape == image.shape
    agree = torch.from_numpy(labels) == (image > 120)
    assert agree.float().mean() > 0.98 and (labels == 1).sum() > 400


class ThresholdAt(torch.nn.Module):
    """Class 1 where the standardised image is above a level."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def full_resolution(self, image):
        other = torch.full_like(image, -1e3)
        return torch.cat((torch.zeros_like(image), (image - self.level) * 100, other, other), dim=1)


def test_outside_the_crop_is_background(hearts):
    method = segmentation(image_size=8).eval()
    method.unet = ThresholdAt(-1e6)  # class 1 everywhere
    (labels,) = predict_frames([method], hearts, 0, [0], torch.device("cpu"))
    row, column = hearts.cines[0].centre
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(40), indexing="ij")
    inside = ((rows - row).abs() < 3.5) & ((columns - column).abs() < 3.5)
    outside = ((rows - row).abs() > 4.6) | ((columns - column).abs() > 4.6)
    assert (labels[:, inside.numpy()] == 1).all() and (labels[:, outside.numpy()] == 0).all()
