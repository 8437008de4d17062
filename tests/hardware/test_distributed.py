"""Two processes with gloo on the CPU against one, and the scripts under torchrun."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from processes import ranks
from two_processes import NAMES

import evaluate
from cmrssp.data.batches import Batches, Slices
from cmrssp.errors import UserError
from cmrssp.hardware import distributed
from cmrssp.runs.folder import Run

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CLOCKS = ("slices_per_s", "seconds", "validation_s")


def torchrun(*words, cwd):
    command = [*TORCHRUN, "--nproc-per-node=2", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start(*words, cwd, **options):
    return ranks(two_processes.main, *words, name="two_processes.py", cwd=cwd, **options)


@pytest.fixture(scope="module")
def both(tmp_path_factory, phantom_folder):
    """What the two processes have found, their folder, and the store they used."""
    out = tmp_path_factory.mktemp("two")
    ends = [rank.end() for rank in start("everything", phantom_folder, out, cwd=out)]
    assert [status for status, _, _ in ends] == [0, 0], ends
    cines = two_processes.make_store(phantom_folder, out / "cache")
    return [torch.load(out / f"everything-{rank}.pt", weights_only=True) for rank in (0, 1)], out, cines


def test_one_process_is_left_alone():
    """Nothing is started, gathered or copied."""
    tensor = torch.ones(2, requires_grad=True)
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.gather(tensor) is tensor and distributed.mean(tensor) is tensor
    assert distributed.wrap(method := torch.nn.Linear(1, 1), torch.device("cpu")) is method
    assert distributed.maximum(3, False) == [3, 0] and distributed.merge([1, 2]) == [1, 2]
    assert distributed.own_items([1, 2, 3]) == [1, 2, 3] and distributed.from_main(lambda: tensor) is tensor
    distributed.start()
    distributed.connect(torch.device("cpu"))
    distributed.finish(failed=True)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_one_process_with_the_global_batch(both, name):
    ranks, _, _ = both
    method = two_processes.make_method(name)
    two_processes.freeze_norms(method)
    views = two_processes.global_views(name)
    one = two_processes.loss_and_gradients(method, method, views)
    losses = [rank[name]["loss"].item() for rank in ranks]
    assert sum(losses) / 2 == pytest.approx(one["loss"].item(), abs=1e-5)
    assert len(one["gradients"]) == sum(p.requires_grad for p in method.parameters())
    for rank in ranks:
        assert rank[name]["gradients"].keys() == one["gradients"].keys()
        for key, gradient in one["gradients"].items():
            assert (rank[name]["gradients"][key] - gradient).abs().max() < 1e-5, key
            assert torch.equal(rank[name]["gradients"][key], ranks[0][name]["gradients"][key]), key
    assert max(g.abs().max() for g in one["gradients"].values()) > 0.05  # 1e-5 says something
    if name in ("simclr", "pcl"):  # the loss of the global batch is not the mean over its parts
        assert losses[0] == losses[1]
        parts = [method(two_processes.part(views, rank, 2), 0.5)[0].item() for rank in (0, 1)]
        assert abs(sum(parts) / 2 - losses[0]) > 0.1
    if name == "dino":
        for rank in ranks:
            assert (rank[name]["batch_centre"] - one["batch_centre"]).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_networks_stay_the_same(both, name):
    """After eight steps through the loop, each rank with views of its own: DINO's teacher and centre, too."""
    (first, second), _, _ = both
    start = two_processes.make_method(name).state_dict()
    moved = 0
    # a bias before a norm has a gradient of 0, and DINO does not decay biases
    still = {key for key in start if ".conv" in key and key.endswith("bias")} if name == "dino" else set()
    for key, value in first[name]["trained"].items():
        assert torch.equal(value, second[name]["trained"][key]), key
        moved += not torch.equal(value, start[key])
    assert len(first[name]["seen"]) >= 5 and moved > 0.9 * len(start.keys() - still)


@pytest.mark.slow
def test_four_processes_do_what_one_does(phantom_folder, tmp_path):
    """Losses and gradients of the global batch, and one network after the loop."""
    started = start("everything", phantom_folder, tmp_path, cwd=tmp_path, processes=4)
    assert [rank.end()[0] for rank in started] == [0] * 4
    ranks = [torch.load(tmp_path / f"everything-{rank}.pt", weights_only=True) for rank in range(4)]
    for name in NAMES:
        method = two_processes.make_method(name)
        two_processes.freeze_norms(method)
        one = two_processes.loss_and_gradients(method, method, two_processes.global_views(name))
        losses = [rank[name]["loss"].item() for rank in ranks]
        assert sum(losses) / 4 == pytest.approx(one["loss"].item(), abs=1e-5)
        for rank in ranks:
            for key, gradient in one["gradients"].items():
                assert (rank[name]["gradients"][key] - gradient).abs().max() < 1e-5, (name, key)
            for key, value in ranks[0][name]["trained"].items():
                assert torch.equal(rank[name]["trained"][key], value), (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_validation_figures_equal_those_of_one_process(both, name):
    ranks, _, cines = both
    one = two_processes.figures(name, cines)
    for rank in ranks:
        found = rank[name]["figures"]
        assert found == ranks[0][name]["figures"] and found.keys() == one.keys()
        for key, value in one.items():
            if key not in ("validation_loss", "validation_explained_variance"):  # the views are others
                assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", ["simclr", "segmentation"])
def test_the_ranks_share_the_batches_of_one_process(both, name):
    ranks, _, cines = both
    loader = two_processes.make_batches(cines, labelled=name == "segmentation", kind=two_processes.Recording)
    steps = [*loader.epochs(0, 1), *loader.epochs(1, 2)]
    assert len(steps) == len(ranks[0][name]["seen"]) == len(ranks[1][name]["seen"])
    for whole, *parts in zip(loader.seen, *(rank[name]["seen"] for rank in ranks), strict=True):
        assert [part.shape[1] for part in parts] == [4, 4] and torch.equal(torch.cat(parts, dim=1), whole)
    first, second = ({*rank[name]["drawn"]} for rank in ranks)
    assert len(first) == len(second) >= len(steps) and not first & second  # augmented each by its own draws


def test_one_writes_what_all_have_found(both):
    ranks, out, _ = both
    for name in NAMES:
        records = Run(out / name).records()
        assert [record["epoch"] for record in records] == [1, 2]
        saved = torch.load(out / name / "last.pt", weights_only=True)
        assert all(torch.equal(saved["method"][k], v) for k, v in ranks[0][name]["trained"].items())
    for rank in ranks:
        assert rank["highest"] == [1, 1, -3] and rank["from main"] == [0, "x"]
        assert rank["merged"] == [0, 10, 20, 30, 40]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(both):
    """And the run goes on to the same weights and log as the one that was not stopped."""
    ranks, out, _ = both
    for rank in ranks:
        assert (
            "stopped by SIGUSR1 and saved after epoch 1, step 3; go on with: torchrun --nproc-per-node=2 "
            in rank["stopped"]
        )
        assert rank["resumed"].keys() == rank["dino"]["trained"].keys()
        assert all(torch.equal(v, rank["dino"]["trained"][k]) for k, v in rank["resumed"].items())
    logs = [
        [{k: v for k, v in record.items() if k not in CLOCKS} for record in Run(out / name).records()]
        for name in ("dino", "stopped")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(both):
    ranks, out, cines = both
    seen = [rank["mim"]["seen"][2][0].long().tolist() for rank in ranks]
    subjects = sorted(cines.subjects[i].key for i in {*seen[0], *seen[1]})
    for rank in ranks:
        assert "epoch 1, step 3 of " in rank["spoilt"] and "not finite: loss nan" in rank["spoilt"]
        assert f"slices of {', '.join(subjects)}" in rank["spoilt"].replace(", ...", "")
    assert not (out / "spoilt" / "last.pt").exists()


@pytest.fixture(scope="module")
def deaths(both, phantom_folder):
    """How trainings end one of whose two ranks dies: [(exit status, stdout, stderr) of each rank]."""
    _, out, _ = both
    started = {how: start(how, phantom_folder, out, cwd=out) for how in ("kill", "fail", "save")}
    return {how: [rank.end() for rank in ranks] for how, ranks in started.items()}


@pytest.mark.parametrize(
    ("how", "statuses", "says"),
    [
        ("kill", [1, -signal.SIGKILL], "another process has ended"),
        ("fail", [1, 2], "error: the disk is gone"),
        ("save", [2, 1], "last.pt"),
    ],
)
def test_a_rank_that_dies_ends_the_others(both, deaths, how, statuses, says):
    """Killed, or by an error in a step, or while the others wait for what it saves."""
    _, out, _ = both
    assert [status for status, _, _ in deaths[how]] == statuses, deaths[how]
    errors = "".join(error for _, _, error in deaths[how])
    lines = [line for line in errors.splitlines() if line.startswith("two_processes.py: error: ")]
    assert any(says in line for line in lines), errors
    assert len(lines) == len(set(lines)) and not (out / how / "unet.pt").exists()


def test_batches_that_cannot_be_shared_are_refused(both, monkeypatch):
    _, _, cines = both
    one = Slices(cines, sorted(cines.index)[:1])
    few = dict(seed=0, labelled=False, device=torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match=r"--batch-size 8: .* expected a multiple of 3, for example 9"):
        Batches(cines, one, batch_size=8, **few)
    assert Batches(cines, one, batch_size=300, **few).batch_size == len(one) // 3 * 3
    monkeypatch.setenv("WORLD_SIZE", "64")
    with pytest.raises(UserError, match=f"64 processes, got {len(one)}"):
        Batches(cines, one, batch_size=64, **few)


def test_the_scripts_under_torchrun(phantom_folder, tmp_path):
    """Pretrained, fine-tuned and evaluated by two processes; the scores are those of one."""
    common = ["--cache", str(tmp_path / "cache")]
    network = ["--channels", "4", "8", "8", "--image-size", "32", "--spacing", "6"]
    pretrain = ["train_ssp", "--method", "simclr", "--data", str(phantom_folder), *common, *network]
    pretrain += ["--epochs", "2", "--batch-size", "8"]
    run = tmp_path / "runs" / "simclr-hearts"
    tune = ["finetune", "--init", str(run), *common, "--epochs", "2", "--batch-size", "4", "--out", "tuned"]
    words = ["--split", "train", "--checkpoint", str(tmp_path / "tuned"), *common, "--save-predictions"]
    scripts = map(shlex.join, (pretrain, tune, ["evaluate", *words, "--out", "two"]))
    said = torchrun(TESTS / "two_processes.py", "scripts", *scripts, cwd=tmp_path).stdout
    assert said.count("run folder: ") == said.count("done: ") == 2 and "device: 2 processes" in said
    assert said.count("3D Dice") == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["simclr-hearts"]
    assert {"args.json", "split.json", "log.jsonl", "last.pt", "unet.pt", "views.png", "curves.png"} <= {
        p.name for p in run.iterdir()
    }
    assert [r["epoch"] for r in Run(run).records()] == [1, 2]
    assert evaluate.main([*words, "--out", str(tmp_path / "one")]) == 0
    for name in ("metrics.csv", "slices.csv", "clinical.csv", "breakdown.csv", "summary.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    files = [sorted(p.name for p in (tmp_path / n).rglob("*")) for n in ("one", "two")]
    subjects = json.loads((tmp_path / "two" / "summary.json").read_text())["subjects"]
    assert files[0] == files[1] and len(subjects) > 2
