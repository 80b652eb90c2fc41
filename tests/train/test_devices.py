"""The device of a worker, on any launcher: checked with CUDA's accelerator of DeepSpeed and patched device counts."""

import inspect
import os
import re
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.accelerator import cuda_accelerator
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.zero import partition_parameters
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import get_compile_threads

from lcm_ds.config import EncoderConfig
from lcm_ds.distributed import collectives
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.prepare import texts
from lcm_ds.train import engine

deepspeed_comm = sys.modules["deepspeed.comm.torch"]  # its package has an attribute torch, which is torch
UUIDS = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,MIG-GPU-b5f1/1/0"


class Accelerator(cuda_accelerator.CUDA_Accelerator):
    """DeepSpeed's for CUDA, which knows its device without having one."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self.devices, self.current = devices, 0

    def device_count(self):
        return self.devices

    def set_device(self, device_index):
        index = torch.device(device_index).index if not isinstance(device_index, int) else device_index
        if index >= self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal: {index} of {self.devices}")
        self.current = index

    def is_fp16_supported(self):
        return True

    def current_device_name(self):
        return f"cuda:{self.current}"


@pytest.fixture
def on_gpus(monkeypatch):
    """on_gpus(devices): lcm-ds and DeepSpeed see so many GPUs; returns the accelerator."""

    def see(devices: int) -> Accelerator:
        accelerator = Accelerator(devices)
        for module in (engine, deepspeed_comm, deepspeed_engine, partition_parameters):
            monkeypatch.setattr(module, "get_accelerator", lambda: accelerator)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return accelerator

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored after the test
    return see


def join(monkeypatch, place: DistEnv) -> tuple[torch.device, torch.device]:
    """The device that `init_distributed` returns, and the one that DeepSpeed binds the process group to."""
    bound = []
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setattr(engine, "wait_for_all_ranks", lambda env, purpose: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, *, device_id=None, **_: bound.append(device_id)
    )

    def init_distributed(**_):
        backend = SimpleNamespace()
        deepspeed_comm.TorchBackend.init_process_group(backend, "nccl", None, None, place.rank, place.world_size)

    monkeypatch.setattr(deepspeed, "init_distributed", init_distributed)
    return engine.init_distributed(place), bound[0]


@pytest.mark.parametrize(
    ("local_rank", "devices", "expected"),
    [(0, 1, 0), (1, 1, 0), (3, 1, 0), (3, 8, 3), (7, 8, 7)],
)
def test_each_process_computes_on_a_device_that_it_sees(local_rank, devices, expected, on_gpus, monkeypatch):
    """`srun --gpus-per-task=1` shows a process one device, whatever its local rank; torchrun shows all of them."""
    on_gpus(devices)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", str(local_rank))  # DeepSpeed asserts that it is LOCAL_RANK
    device = torch.device("cuda", expected)
    assert join(monkeypatch, DistEnv(local_rank, 8, local_rank, 8, "127.0.0.1", 29500)) == (device, device)
    inside = SimpleNamespace()
    deepspeed_engine.DeepSpeedEngine._configure_with_arguments(inside, None, None)
    monkeypatch.setattr(deepspeed_engine.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(deepspeed_engine.dist, "get_rank", lambda: local_rank)
    deepspeed_engine.DeepSpeedEngine._set_distributed_vars(inside, None)
    assert inside.device == device


def test_zero_3_partitions_on_that_device(on_gpus, monkeypatch):
    accelerator = on_gpus(1)
    join(monkeypatch, DistEnv(1, 2, 1, 2, "127.0.0.1", 29500))

    class Partitioned(Exception):
        pass

    def set_device(device):
        Accelerator.set_device(accelerator, device)
        raise Partitioned(device)

    accelerator.set_device = set_device
    monkeypatch.setattr(partition_parameters.dist, "is_initialized", lambda: True)
    for name, value in (("get_world_group", None), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(partition_parameters.dist, name, lambda *_, value=value, **__: value)
    with pytest.raises(Partitioned, match="cuda:0"):
        deepspeed.zero.Init()


def test_deepspeed_takes_its_device_from_nothing_else():
    """Its modules that a run imports read LOCAL_RANK, which `DistEnv.enter` sets; another variable would be new."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.") and not name.startswith("deepspeed.launcher") and hasattr(module, "__file__"):
            found |= set(
                re.findall(r"""environ(?:\.get\(|\[)["'](\w*LOCAL\w*RANK|\w*LOCALID)["']""", inspect.getsource(module))
            )
    assert found == {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"}


@pytest.mark.parametrize(("devices", "expected"), [(1, 0), (8, 5)])
def test_so_do_preparing_and_evaluating(devices, expected, on_gpus, monkeypatch, tmp_path):
    on_gpus(devices)
    place = DistEnv(5, 8, 5, 8, "127.0.0.1", 29500)
    assert Ranks(place).device == torch.device("cuda", expected)
    monkeypatch.setattr(texts, "load_encoder", lambda encoder: encoder.device)
    config = SimpleNamespace(encoder=EncoderConfig(name="sonar", model="random"), output=tmp_path)
    assert texts.load_for_rank(config, place) == f"cuda:{expected}"
    monkeypatch.setattr(collectives, "wait_for_all_ranks", lambda env, purpose: None)
    monkeypatch.setattr(collectives.dist, "init_process_group", lambda *_, **__: None)
    Ranks(place).__enter__()
    assert os.environ["LOCAL_RANK"] == str(expected)


def test_on_cpus_local_ranks_stay_as_they_are(monkeypatch):
    environ = {"OMPI_COMM_WORLD_LOCAL_RANK": "5"}
    DistEnv(5, 8, 5, 8, "127.0.0.1", 29500).enter(environ)
    assert environ["LOCAL_RANK"] == environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "5"


def test_zero_finds_the_free_memory_of_a_device_that_has_a_uuid(on_gpus, monkeypatch):
    """DeepSpeed reads CUDA_VISIBLE_DEVICES as numbers if nvidia-ml-py is installed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUIDS)
    nvml = SimpleNamespace(nvmlDeviceGetHandleByIndex=int, nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(free=1))
    accelerator = on_gpus(2)
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    with pytest.raises(ValueError, match="GPU-8932f937"):
        accelerator.available_memory(0)
    free = {0: 100, 1: 200, None: 200}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free[device], 1000))
    join(monkeypatch, DistEnv(1, 2, 1, 2, "127.0.0.1", 29500))
    assert (accelerator.available_memory(), accelerator.available_memory(0)) == (200, 100)


@pytest.mark.parametrize(
    ("bound", "processors", "ranks", "chosen", "threads"),
    [
        (96, 96, 8, None, 12),
        (256, 256, 4, None, 32),
        (2, 2, 8, None, 1),
        (96, 96, 8, "5", None),
        (8, 64, 8, None, 8),  # srun --cpus-per-task=8: the share of each rank
        (4, 64, 8, None, 4),
    ],
)
def test_ranks_of_a_host_share_its_processors_for_compiling(bound, processors, ranks, chosen, threads, monkeypatch):
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda _: range(bound))
    monkeypatch.setattr(engine.os, "cpu_count", lambda: processors)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", chosen or "")  # restored after the test
    if chosen is None:
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    with inductor_config.patch(compile_threads=7):
        engine.share_compile_threads(ranks)
        assert get_compile_threads() == (threads or 7)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == (chosen or str(threads))


def test_a_worker_shares_them_when_it_joins(on_gpus, monkeypatch):
    on_gpus(8)
    shared = []
    monkeypatch.setattr(engine, "share_compile_threads", shared.append)
    join(monkeypatch, DistEnv(3, 16, 3, 8, "127.0.0.1", 29500))
    assert shared == [8]
