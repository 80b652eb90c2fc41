"""One rank that builds a model.

python build_worker.py DEEPSPEED.json RESULT.json [DEVICE]: the result has the host memory of rank 0, in bytes per
parameter, that building took at most (peak) and that it holds (held), and hashes of the parameters by name.
DEVICE "meta" stands for a device with memory of its own.
"""

import ctypes
import hashlib
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from steps_worker import CONFIG

from lcm_ds import deepspeed_config
from lcm_ds.config import ModelConfig, TrainConfig
from lcm_ds.distributed.environment import detect_environment
from lcm_ds.model.config import resolve_model
from lcm_ds.model.sizes import count_parameters
from lcm_ds.processes import exit_with
from lcm_ds.train.engine import build_model, init_distributed

SIZES = ModelConfig(
    embed_dim=256, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2816, dropout=0.1
)


def memory(name):
    """A line of /proc/self/status, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])


def digest(parameter):
    """A hash of a parameter's bytes."""
    return hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()


def main():
    json_path, result_path, *devices = sys.argv[1:]
    env = detect_environment(os.environ)
    init_distributed(env)
    config = TrainConfig.model_validate({**CONFIG, "deepspeed": json.loads(Path(json_path).read_text())})
    ds = deepspeed_config.resolve(deepspeed_config.read(config.deepspeed), config, env.world_size, "json")
    model_config = resolve_model(SIZES)
    normalizer = torch.zeros(SIZES.embed_dim).numpy(), torch.ones(SIZES.embed_dim).numpy()
    if devices:
        get_accelerator().current_device_name = lambda: devices[0]
    small = SIZES.model_copy(update={"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64})
    build_model(resolve_model(small), normalizer, 0, ds)  # imports what building needs, which is not memory of a model
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, parameters = memory("VmRSS"), count_parameters(model_config)
    model = build_model(model_config, normalizer, 0, ds)
    peak = memory("VmHWM") - before
    ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps for later, see keep_freed_memory
    result = {"peak": peak / parameters, "held": (memory("VmRSS") - before) / parameters, "digests": {}}
    for name, parameter in model.named_parameters() if not devices else ():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            result["digests"][name] = digest(parameter)
    if env.rank == 0:
        Path(result_path).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
