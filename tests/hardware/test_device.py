"""What a run takes of its machine: cores, torch.compile, CUDA graphs."""

import os

import pytest
import torch
from processes import Script

from cmrssp.hardware.device import COMPILE_FROM, resolve_compile, resolve_device, resolve_graph

CPU = torch.device("cpu")


def compiles(choice, device, *, num_slices=10**9, norm="batch", cache):
    return resolve_compile(choice, device, norm=norm, num_slices=num_slices, cache=cache)


def test_auto_compiles_nothing_on_a_cpu_and_no_short_training(tmp_path, capsys):
    assert not compiles("auto", CPU, cache=tmp_path)
    assert not compiles("auto", torch.device("cuda"), num_slices=COMPILE_FROM - 1, cache=tmp_path)
    assert not compiles("off", torch.device("cuda"), cache=tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # torch's own, of a compiler that it finds no use for
def test_without_a_compiler_training_goes_on_uncompiled(monkeypatch, tmp_path, capsys):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    assert compiles("on", CPU, cache=tmp_path) is False
    assert capsys.readouterr().out.startswith("compile: off")


def test_the_common_batch_norm_of_several_gpus_is_not_compiled(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compiles("auto", torch.device("cuda"), cache=tmp_path) is False
    assert capsys.readouterr().out.startswith("compile: off")


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
