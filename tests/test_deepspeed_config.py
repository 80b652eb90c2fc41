"""The strict reader of DeepSpeed JSON: keys that DeepSpeed would ignore are refused, "auto" is filled in."""

from pathlib import Path

import pytest

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.deepspeed_config import resolver, schema
from lcm_ds.errors import InputError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}


def train_config(rows_per_step=16, micro_batch_rows=2, **optim):
    return TrainConfig.model_validate(
        {
            "run_dir": "runs/x",
            "model": {"preset": "quickstart"},
            "data": {"train": "datasets/x"},
            "batch": {"rows_per_step": rows_per_step, "micro_batch_rows": micro_batch_rows},
            "optim": {"lr": 3e-4, "max_grad_norm": 25.0, **optim},
            "steps": 1,
            "deepspeed": "x.json",
        }
    )


def mistakes_of(call, *arguments, **keywords):
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    return caught.value.errors


def mistakes_in(mapping):
    return mistakes_of(deepspeed_config.check, mapping, "f.json")


def test_the_shipped_files_are_known_by_their_content_and_pass_every_check():
    """So that plans and mistakes in the YAML need no DeepSpeed, whose import takes seconds."""
    known = {}
    for path in SHIPPED:
        mapping = deepspeed_config.read(str(path))
        known[resolver.digest(mapping)] = path.name
        deepspeed_config.check(mapping, path)
        optim = {"max_grad_norm": 0} if "muon" in path.name else {}
        config, more = train_config(**optim), {"wall_clock_breakdown": False}  # DeepSpeed's default, not in the files
        resolved = deepspeed_config.resolve(mapping, config, 2, path, hidden_size=512)
        assert resolved | more == deepspeed_config.resolve(mapping | more, config, 2, path, hidden_size=512)
    lines = "".join(f'        "{digest}",  # {name}\n' for digest, name in known.items())
    assert set(known) == set(resolver.SHIPPED), f"SHIPPED in deepspeed_config/resolver.py has to be\n{lines}"


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"gradient_cliping": 1.0}, "f.json: gradient_cliping: unknown key; did you mean 'gradient_clipping'?"),
        ({"zero_optimisation": {}}, "f.json: zero_optimisation: unknown key; did you mean 'zero_optimization'?"),
        (
            {"zero_optimization": {"stgae": 2}},
            "f.json: zero_optimization.stgae: unknown key; did you mean 'stage'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "f.json: zero_optimization.offload_param.devise: unknown key; did you mean 'device'?",
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_sise": 1}},
            "f.json: zero_optimization.stage3_prefetch_bucket_sise: unknown key; "
            "did you mean 'stage3_prefetch_bucket_size'?",
        ),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "f.json: optimizer.parms: unknown key; did you mean 'params'?"),
        (
            {"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.95]}}},
            "f.json: optimizer.params.beta: AdamW has no such argument; did you mean 'betas'?",
        ),
        ({"bf16": {"enable": True}}, "f.json: bf16.enable: unknown key; did you mean 'enabled'?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean 'grad_accum_dtype'?"),
        ({"activation_checkpointing": {"partitioned_activations": True}}, "did you mean 'partition_activations'?"),
        ({"checkpoint": {"writer": {"decopled": True}}}, "did you mean 'decoupled'?"),
        ({"tensorboard": {"output": "x"}}, "did you mean 'output_path'?"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_closest_match(mapping, expected):
    lines = mistakes_in(mapping)
    assert len(lines) == 1
    assert lines[0].endswith(expected)


def test_all_errors_are_reported_at_once():
    lines = mistakes_in(
        {
            "gradient_cliping": 1,
            "zero_optimization": {"stgae": 2, "reduce_bucket_size": -1},
            "scheduler": {"type": "WarmupLR"},
            "optimizer": {"type": "AdamW", "params": {"lrr": 1}},
        }
    )
    assert sorted(line.split(": ")[1] for line in lines) == [
        "gradient_cliping",
        "optimizer.params.lrr",
        "scheduler",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stgae",
    ]


@pytest.mark.parametrize("key", ["amp", "elasticity", "nebula", "scheduler", "torch_autocast", "data_efficiency"])
def test_unsupported_keys_are_refused_with_a_reason(key):
    (line,) = mistakes_in({key: {"enabled": False}})
    assert line.startswith(f"f.json: {key}: ")
    assert "unknown" not in line


def test_node_local_storage_is_refused():
    """DeepSpeed names files by LOCAL_RANK, which `DistEnv.enter` makes 0 on each rank that sees one device."""
    (line,) = mistakes_in({"checkpoint": {"use_node_local_storage": True}})
    assert line.startswith("f.json: checkpoint.use_node_local_storage: names files by local rank")


class Asked(dict):
    """A mapping that records which keys were read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.names = set()

    def get(self, key, default=None):
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.names.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.names.add(key)
        return super().__getitem__(key)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def keys(self):
        return self


def test_known_and_refused_keys_are_those_that_the_installed_deepspeed_reads():
    from deepspeed.runtime import config as theirs

    blocks = {
        key: Asked()
        for key in ("data_types", "activation_checkpointing", "flops_profiler", "aio", "checkpoint", "optimizer")
    }
    blocks["optimizer"]["type"] = "AdamW"
    blocks["checkpoint"]["writer"] = Asked()
    blocks["checkpoint"]["parallel_write"] = Asked()
    mapping = Asked({"train_micro_batch_size_per_gpu": 1, **blocks})
    theirs.DeepSpeedConfig(mapping)
    # read in __init__.py; removed keys are in separate lists
    asked = mapping.names | {"sequence_parallel_size", "data_parallel_size"}
    asked |= set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    refused = {key for key in schema.REFUSED if "." not in key}
    known = {*schema.DeepSpeedJson.model_fields, *refused}
    assert known == asked
    removed = {f"zero_optimization.{key}" for key in theirs._REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= set(schema.REFUSED)
    for key, block in {
        "data_types": schema.DataTypesBlock,
        "activation_checkpointing": schema.ActivationCheckpointingBlock,
        "flops_profiler": schema.FlopsProfilerBlock,
        "aio": schema.AioBlock,
        "checkpoint": schema.CheckpointBlock,
        "optimizer": schema.OptimizerBlock,
    }.items():
        refused = {name.removeprefix(f"{key}.") for name in schema.REFUSED if name.startswith(f"{key}.")}
        assert blocks[key].names == set(block.model_fields) | {name for name in refused if "." not in name}, key
    assert blocks["checkpoint"]["writer"].names == set(schema.CheckpointWriterBlock.model_fields)
    assert blocks["checkpoint"]["parallel_write"].names == set(schema.ParallelWriteBlock.model_fields)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "key"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage"),
        ({"zero_optimization": True}, "zero_optimization"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "zero_optimization.offload_optimizer.device"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled"),
        ({"bf16": {"enabled": 3}}, "bf16.enabled"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),
        ({"fp16": {"enabled": True, "loss_scale": -1}, "zero_optimization": {"stage": 1}}, "fp16.loss_scale"),
        ({"gradient_clipping": -1}, "gradient_clipping"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "data_types.grad_accum_dtype"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled, fp16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"optimizer": {"type": "AdamV"}}, "optimizer.type"),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}}, "optimizer.type"),
        ({"steps_per_print": 0}, "steps_per_print"),
        ({"checkpoint": {"tag_validation": "perhaps"}}, "checkpoint.tag_validation"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(mapping, key):
    lines = mistakes_in(mapping)
    assert [line.split(": ")[1] for line in lines] == [key]


@pytest.mark.parametrize(
    "mapping",
    [
        {},
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/scratch"}}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": True}},
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 8}},
        {"optimizer": {"type": "Lion", "params": {"lr": "auto", "betas": "auto"}}},
        {"optimizer": {"type": "Muon", "params": {"momentum": 0.95, "adam_lr": 1e-3}}},
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_allow_untested_optimizer": True},
        {"checkpoint": {"tag_validation": "Fail", "writer": {"type": "python"}}, "comms_logger": {"enabled": True}},
        {"communication_data_type": "fp32", "wall_clock_breakdown": True, "csv_monitor": {"enabled": False}},
    ],
)
def test_valid_settings_are_accepted(mapping):
    deepspeed_config.check(mapping, "f.json")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_path_is_found_from_the_current_folder_and_from_the_configs_folder_upwards(tmp_path, monkeypatch):
    config = tmp_path / "checkout/configs/train/x.yaml"
    (tmp_path / "checkout/ds_configs").mkdir(parents=True)
    (tmp_path / "checkout/ds_configs/a.json").write_text('{"steps_per_print": 7}')
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert deepspeed_config.read("ds_configs/a.json", config)["steps_per_print"] == 7
    (line,) = mistakes_of(deepspeed_config.read, "ds_configs/b.json", config)
    assert line.startswith("ds_configs/b.json: no such DeepSpeed JSON")
    monkeypatch.chdir(tmp_path / "checkout")
    assert deepspeed_config.read("ds_configs/a.json", None)["steps_per_print"] == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  "steps_per_print" 1\n}', "line 2, column 21: not JSON"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "enabled: is repeated"),
        ("[1]", "has to be a JSON object"),
        ('{"gradient_clipping": NaN}', "NaN: is not a JSON number"),
    ],
)
def test_invalid_json_is_refused_with_the_position(tmp_path, text, expected):
    path = tmp_path / "a.json"
    path.write_text(text)
    lines = mistakes_of(deepspeed_config.read, str(path))
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}: ")
    assert expected in lines[0]


def test_a_null_value_is_ignored():
    read = deepspeed_config.read({"bf16": None, "zero_optimization": {"stage": 1, "offload_optimizer": None}})
    assert read == {"zero_optimization": {"stage": 1}}


# --- filling in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["auto", "absent"])
def test_values_of_the_yaml_are_filled_in(value):
    params = {"torch_adam": True}
    mapping = {"optimizer": {"type": "AdamW", "params": params}}
    if value == "auto":
        mapping |= dict.fromkeys(
            ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"],
            "auto",
        )
        params |= dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto")
    resolved = deepspeed_config.resolve(mapping, train_config(16, 2), 2, "f.json")
    assert resolved == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 25.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"torch_adam": True, "lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
    }


def test_an_optimizer_gets_only_arguments_that_it_has():
    mapping = {"optimizer": {"type": "SGD", "params": {"betas": "auto"}}}
    params = deepspeed_config.resolve(mapping, train_config(), 1, "f.json")["optimizer"]["params"]
    assert params == {"lr": 3e-4, "weight_decay": 0.1}


def test_bucket_sizes_follow_the_hidden_size():
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    mapping = {"optimizer": ADAMW, "zero_optimization": zero}
    resolved = deepspeed_config.resolve(mapping, train_config(), 1, "f.json", hidden_size=512)
    assert resolved["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 512 * 512,
        "stage3_param_persistence_threshold": 5120,
    }


def test_contradicting_values_are_refused_with_both():
    mapping = {
        "train_batch_size": 32,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999]}},
    }
    lines = mistakes_of(deepspeed_config.resolve, mapping, train_config(16), 2, "f.json", "x.yaml")
    assert len(lines) == 3
    for line, expected in zip(
        lines,
        (
            ("train_batch_size: 32", "batch.rows_per_step = 16"),
            ("gradient_clipping: 1.0", "optim.max_grad_norm = 25.0"),
            ("optimizer.params.betas: [0.9, 0.999]", "optim.betas = [0.9, 0.95]"),
        ),
        strict=True,
    ):
        assert line.startswith("f.json: ")
        assert all(text in line for text in (*expected, "x.yaml"))


def test_rows_that_cannot_be_divided_are_refused_with_alternatives():
    (line,) = mistakes_of(deepspeed_config.resolve, {"optimizer": ADAMW}, train_config(48, 4), 5, "f.json", "x.yaml")
    assert line == (
        "x.yaml: batch.rows_per_step: 48 rows are not a multiple of 5 ranks * 4 micro_batch_rows; "
        "use 1, 2, 3, 4, 6, 12 ranks; or rows_per_step 40 or 60"
    )
    (line,) = mistakes_of(deepspeed_config.resolve, {"optimizer": ADAMW}, train_config(12, 5), 2, "f.json", "x.yaml")
    assert "micro_batch_rows 1, 2, 3, 6; or rows_per_step 10 or 20" in line


def test_errors_that_only_deepspeed_finds_are_one_line_too():
    mapping = {"optimizer": ADAMW, "bf16": {"enabled": True, "bf16_optimizer_states": True}}
    (line,) = mistakes_of(deepspeed_config.resolve, mapping, train_config(), 1, "f.json")
    assert line.startswith("f.json: DeepSpeed: bf16_optimizer_states")


def test_a_precision_that_the_device_does_not_support_is_refused():
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device has fp16")
    (line,) = mistakes_of(deepspeed_config.check_device, {"fp16": {"enabled": True}}, "f.json")
    assert "float16" in line
    deepspeed_config.check_device({"bf16": {"enabled": False}}, "f.json")
