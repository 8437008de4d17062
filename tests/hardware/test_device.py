"""What a run takes of its machine: cores, torch.compile, CUDA graphs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import Script

from cmrssp.hardware.device import COMPILE_FROM, resolve_compile, resolve_device, resolve_graph, untuned

CPU = torch.device("cpu")


def compiles(choice, device, *, num_slices=10**9, norm="batch"):
    return resolve_compile(choice, device, norm=norm, num_slices=num_slices)


def test_auto_compiles_nothing_on_a_cpu_and_no_short_training(capsys):
    assert not compiles("auto", CPU)
    assert not compiles("auto", torch.device("cuda"), num_slices=COMPILE_FROM - 1)
    assert not compiles("off", torch.device("cuda"))
    assert not capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # torch's own, of a compiler that it finds no use for
def test_without_a_compiler_training_goes_on_uncompiled(monkeypatch, tmp_path, capsys):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    assert compiles("on", CPU) is False
    assert capsys.readouterr().out.startswith("compile: off")


def test_the_common_batch_norm_of_several_gpus_is_not_compiled(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compiles("auto", torch.device("cuda")) is False
    assert capsys.readouterr().out.startswith("compile: off")


def test_torch_keeps_its_kernels_below_the_cache(tmp_path):
    """Asked of torch, in a process that has not chosen a place yet."""
    code = (
        "from pathlib import Path; from cmrssp.hardware.device import prepare_torch; "
        f"prepare_torch(0, True, Path({str(tmp_path)!r})); "
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    root = Path(__file__).parents[2]
    said = subprocess.check_output([sys.executable, "-c", code], env=env, cwd=root, text=True)
    assert said.split() == [str(tmp_path / "inductor")]


def test_rare_shapes_are_not_compiled():
    compiled = []
    act = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: compiled.append(graph) or graph)
    with untuned(True):
        assert act(torch.ones(3))[0] == 2 and not compiled
    assert act(torch.ones(3))[0] == 2 and len(compiled) == 1


def test_graphs_are_for_compiled_networks_on_one_gpu(monkeypatch, capsys):
    gpu = torch.device("cuda")
    assert resolve_graph("auto", gpu, compiled=True)
    assert not resolve_graph("off", gpu, compiled=True)
    assert not resolve_graph("auto", gpu, compiled=False)
    assert not resolve_graph("auto", CPU, compiled=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not resolve_graph("auto", gpu, compiled=True)


def test_torch_takes_no_more_threads_than_the_allotted_core(tmp_path):
    def main(argv) -> int:
        torch.set_num_threads(2)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        resolve_device("cpu")
        print(torch.get_num_threads())
        return 0

    status, said, _ = Script(main, name="threads", cwd=tmp_path).end()
    assert status == 0 and said.splitlines()[-1] == "1"
