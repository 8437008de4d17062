"""What test_distributed.py starts twice:  torchrun --nproc-per-node=2 two_processes.py CASE HEARTS OUT

Each process leaves OUT/<case>-<rank>.pt; the test compares them with each other, and with one process. With
`make_method`, `global_views` and `make_batches` the test makes the same things itself. Or, one after the
other in the same two processes:  two_processes.py scripts "train_ssp WORDS" "finetune WORDS" "evaluate WORDS"
"""

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from loop import ORIGIN, segmentation, settings

from cmrssp import training
from cmrssp.cli import entry
from cmrssp.data import dataset, store
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.evaluation import validation
from cmrssp.hardware import distributed
from cmrssp.hardware.device import resolve_device
from cmrssp.runs.folder import Run
from cmrssp.runs.signals import Stopped
from cmrssp.segmentation import Segmentation
from cmrssp.ssp import health
from cmrssp.ssp.dino import DINO
from cmrssp.ssp.method import Method, Views
from cmrssp.ssp.mim import MIM
from cmrssp.ssp.motion import Motion
from cmrssp.ssp.pcl import PCL
from cmrssp.ssp.simclr import SimCLR
from cmrssp.weights import checkpoints

NAMES = ("simclr", "pcl", "dino", "mim", "motion", "segmentation")
BATCH, SIZE = 8, 32
SETTINGS = {"epochs": 2, "schedule": "cosine", "warmup_epochs": 0.5}


def make_method(name: str, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    common = {"channels": (4, 8, 8), "image_size": SIZE, "spacing_mm": 3.0, "augment": True, "norm": "batch"}
    contrast = {"temperature": 0.1, "projection": 16}
    dino = dict(
        epochs=2, local_size=16, local_crops=2, outputs=32, hidden=16, student_temperature=0.1,
        teacher_temperature=0.04, teacher_temperature_start=0.02, teacher_temperature_epochs=1,
        centre_momentum=0.9, teacher_momentum=0.9, freeze_last_epochs=1, export="student",
    )  # fmt: skip
    return {
        "simclr": lambda: SimCLR(**common, **contrast),
        "pcl": lambda: PCL(**common, **contrast, threshold=0.1),
        "dino": lambda: DINO(**common, **dino),
        "mim": lambda: MIM(**common, patch_size=8, mask_ratio=0.75),
        "motion": lambda: Motion(**common),
        "segmentation": lambda: segmentation(**common),
    }[name]()


def freeze_norms(method: Method) -> None:
    """Every layer in training mode, but batch norm by fixed statistics, other than those of the start."""
    generator = torch.Generator().manual_seed(5)
    method.train()
    for layer in method.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.eval()
            layer.running_mean.copy_(0.1 * torch.randn(layer.running_mean.shape, generator=generator))
            layer.running_var.copy_(0.05 + 0.1 * torch.rand(layer.running_var.shape, generator=generator))


def global_views(name: str) -> Views:
    """Of a batch of eight slices, each unlike the others."""
    generator = torch.Generator().manual_seed(1)

    def images(count: int, size: int = SIZE) -> torch.Tensor:
        scale = torch.arange(1.0, BATCH + 1).repeat(count).view(-1, 1, 1, 1)
        return scale * torch.randn(count * BATCH, 1, size, size, generator=generator)

    if name in ("simclr", "pcl"):
        position = torch.tensor([0.0, 0.5, float("nan"), 0.25, 0.05, 0.55, 0.1, 0.28])
        return {"image": images(2), "position": position.repeat(2)}
    if name == "dino":
        return {"global": images(2), "local": images(2, 16)}
    if name == "mim":
        return {"image": images(1), "mask": make_method("mim").views(_batch(), None)["mask"]}
    if name == "motion":
        return {"image": images(1) / BATCH, "motion": images(1) / BATCH}
    label = torch.randint(0, 4, (BATCH, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    label[:3] = 0  # no foreground
    return {"image": images(1), "label": label}


def _batch() -> dict[str, torch.Tensor]:
    ones = torch.ones(BATCH)
    return {"image": torch.zeros(BATCH, 1, 64, 64), "spacing_mm": torch.ones(BATCH, 2),
            "centre": torch.zeros(BATCH, 2), "size": torch.full((BATCH, 2), 64), "mean": 0 * ones,
            "std": ones, "max": ones}  # fmt: skip


def part(views: Views, rank: int, ranks: int) -> Views:
    """Of every kind of view, those of this rank's slices."""
    share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return {key: x.unflatten(0, (-1, BATCH))[:, share].flatten(0, 1) for key, x in views.items()}


def loss_and_gradients(method: Method, network: nn.Module, views: Views) -> dict:
    """Also what DINO's centre will be."""
    loss, _ = network(views, 0.5)
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    centres = {k: v for k, v in method.named_buffers() if k == "batch_centre"}
    return {"loss": loss.detach(), "gradients": gradients, **centres}


def make_batches(cines: store.Store, *, labelled: bool, kind: type[Batches] = Batches, **named) -> Batches:
    slices = Slices(cines, sorted(cines.index), phases="both" if labelled else None)
    options = {"batch_size": BATCH, "seed": 4, "device": torch.device("cpu"), "motion": not labelled}
    return kind(cines, slices, labelled=labelled, **options, **named)


def make_store(hearts: Path, cache: Path) -> store.Store:
    return store.build(dataset.find([str(hearts)], cache)[0], cache, labels=True)


def mean_dice(method: Segmentation, cines: store.Store, subjects: Sequence[int]) -> dict[str, float]:
    keys = [cines.subjects[i].key for i in subjects]
    return validation.mean_dice(method, cines, keys, torch.device("cpu"))


def figures(name: str, cines: store.Store) -> dict[str, float]:
    """What the validation says of an untrained network."""
    if name == "segmentation":
        return mean_dice(make_method(name), cines, range(5))
    keys = sorted(cines.index)
    slices = Slices(cines, keys)
    while len(slices) % 2:  # two ranks share an even number
        slices = Slices(cines, keys := keys[1:])
    options = {"batch_size": BATCH, "seed": 0, "device": torch.device("cpu"), "motion": True}
    return health.check(make_method(name), Batches(cines, slices, labelled=False, **options), 0)


class Recording(Batches):
    """Keeps what it hands out, and at one step of one rank does something else before."""

    def __init__(self, *words, at=(-1, -1, -1), does=None, **named) -> None:
        super().__init__(*words, **named)
        self.at, self.does, self.seen = at, does, []

    def epochs(self, first: int, end: int, step: int = 0) -> Iterator[dict]:
        for number, batch in enumerate(super().epochs(first, end, step), first * len(self) + step):
            if (distributed.rank(), *divmod(number, len(self))) == self.at:
                self.does(batch)
            self.seen.append(
                torch.stack([batch["subject"], batch["frame"], batch["position"].nan_to_num(-1)])
            )
            yield batch


def train(name: str, cines: store.Store, folder: Path, state: dict | None = None, **batches) -> Method:
    method = make_method(name, seed=0 if state is None else 99)
    loader = make_batches(cines, labelled=name == "segmentation", kind=Recording, **batches)
    method.drawn, views = [], method.views

    def watched(batch: dict, generator: torch.Generator | None) -> Views:
        method.drawn += [generator.initial_seed()] if generator else []
        return views(batch, generator)

    def validate(method: Method, epoch: int) -> dict[str, float]:
        if name == "segmentation":
            return mean_dice(method, cines, [0, 1, 2])
        return health.check(method, loader, epoch)

    method.views = watched
    if distributed.is_main():
        folder.mkdir(exist_ok=True)
    try:
        training.train(method, loader, settings(**SETTINGS), Run(folder), ORIGIN, validate, state)
    finally:
        method.seen = loader.seen
    return method


def everything(cines: store.Store, out: Path) -> dict:
    device = torch.device("cpu")
    result = {}
    for name in NAMES:
        method = make_method(name, seed=0 if distributed.is_main() else 7)  # DDP starts from those of rank 0
        freeze_norms(method)
        network = distributed.wrap(method, device)
        share = part(global_views(name), distributed.rank(), distributed.world_size())
        result[name] = loss_and_gradients(method, network, share)
        result[name]["figures"] = figures(name, cines)
        trained = train(name, cines, out / name)
        result[name]["trained"] = trained.state_dict()
        result[name]["seen"], result[name]["drawn"] = trained.seen, trained.drawn
    result["highest"] = distributed.maximum(distributed.rank(), 1 - distributed.rank(), -3)
    result["merged"] = distributed.merge([10 * x for x in distributed.own_items(range(5))])
    result["from main"] = distributed.from_main(lambda: [distributed.rank(), "x"])

    # rank 1 alone gets a signal in the middle of the second epoch
    def stop(batch) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    try:
        train("dino", cines, out / "stopped", at=(1, 1, 2), does=stop)
    except Stopped as stopped:
        result["stopped"] = str(stopped)
    distributed.barrier()
    again = train("dino", cines, out / "stopped", state=checkpoints.read(out / "stopped" / "last.pt"))
    result["resumed"] = again.state_dict()

    # one slice of rank 1 is not a number
    def spoil(batch) -> None:
        batch["mean"][0] = float("nan")

    try:
        train("mim", cines, out / "spoilt", at=(1, 0, 2), does=spoil)
    except UserError as error:
        result["spoilt"] = str(error)
    return result


def on_gpus() -> dict:
    """Of each method loss and gradients, nothing frozen: the ranks normalise by the batch of both."""
    device, found = resolve_device("cuda"), {}
    torch.backends.cudnn.allow_tf32 = False
    for name in NAMES:
        method = make_method(name).to(device)
        network = distributed.wrap(method, device)
        share = part(global_views(name), distributed.rank(), distributed.world_size())
        result = loss_and_gradients(method, network, {key: value.to(device) for key, value in share.items()})
        gradients = {key: gradient.cpu() for key, gradient in result["gradients"].items()}
        found[name] = {"loss": result["loss"].cpu(), "gradients": gradients}
    return found


def die(how: str, cines: store.Store, out: Path) -> None:
    """One rank dies in the third step, by force or by an exception, or where it saves."""

    def kill(batch) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(batch) -> None:
        raise OSError("the disk is gone")

    if how == "save":
        if distributed.is_main():
            (out / "save" / "last.pt").mkdir(parents=True)
        train("mim", cines, out / "save")
    else:
        train("mim", cines, out / how, at=(1, 0, 2), does={"kill": kill, "fail": fail}[how])


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)
    case, *words = sys.argv[1:]
    if case == "scripts":
        for name, *flags in map(shlex.split, words):
            importlib.import_module(name).main(flags)
        return 0
    if case == "gpus":
        torch.save(on_gpus(), Path(*words) / f"{case}-{distributed.rank()}.pt")
        return 0
    hearts, out = map(Path, words)
    resolve_device("cpu")
    with distributed.main_first():
        cines = make_store(hearts, out / "cache")
    if case == "everything":
        torch.save(everything(cines, out), out / f"{case}-{distributed.rank()}.pt")
    else:
        die(case, cines, out)
    return 0


if __name__ == "__main__":
    entry.end(main)
