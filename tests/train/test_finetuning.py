"""Fine-tuning from start to end: JSONL of prompts and answers, a pretrained model, loss only on the answers."""

import json

import pytest
import yaml
from runs import finish, start

from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import open_shard

QUESTIONS = [
    {
        "source_sentences": f"What does item {i} hold? Tell me what it is made of.",
        "target_sentences": [f"Item {i} holds {i} objects.", "It is made of wood."],
    }
    for i in range(24)
]
REFUSED = [
    {"source_sentences": "Is there an answer?", "target_sentences": []},
    {"source_sentences": "", "target_sentences": "Nobody asked."},
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The dataset of `lcm-ds prepare` from QUESTIONS and REFUSED, and its output."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS + REFUSED))
    overrides = [f"source.paths=[{folder}/answers.jsonl]", f"output={folder}/dataset", "validation=0.2",
                 "encoder={name: sentence-transformers, model: minilm, device: cpu}", "documents_per_shard=8",
                 "split_workers=0", "processes=1"]  # fmt: skip
    code, out, err = finish(start("prepare", "configs/prepare/supervised.yaml", *overrides))
    assert code == 0, out + err
    return folder / "dataset", out


def test_documents_have_both_parts_with_the_suffix_between_and_the_end_after_them(prepared):
    folder, output = prepared
    assert "2 refused (empty)" in output
    dataset = open_dataset(folder / "train")
    assert dataset.info.supervised is not None
    assert dataset.info.supervised.source_suffix == "[MODEL]:"
    shard = open_shard(dataset, 0)
    stored = json.loads(shard.members(0)["json"])
    number = stored["source_sentences"][0].split()[3]
    assert stored["source_sentences"] == [
        f"What does item {number} hold?", "Tell me what it is made of.", "[MODEL]:"
    ]  # fmt: skip
    assert stored["target_sentences"] == [
        f"Item {number} holds {number} objects.",
        "It is made of wood.",
        "End of text.",
    ]
    assert shard.lengths[0] == 6


def test_inspect_shows_the_lengths_of_sources_and_targets(prepared):
    folder, _ = prepared
    documents = open_dataset(folder / "train").info.totals.documents
    code, out, _ = finish(start("inspect", folder / "train"))
    assert code == 0
    output = " ".join(out.replace("│", " ").split())
    assert f"{3 * documents} concepts are given, {3 * documents} are learned; sources end with '[MODEL]:'" in output


@pytest.mark.slow
def test_a_pretrained_model_is_trained_and_validated_only_on_the_targets(prepared, tmp_path):
    folder, _ = prepared
    validation = open_dataset(folder / "validation").info.totals.documents
    sizes = {
        "embed_dim": 384,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    mapping = yaml.safe_load(open("configs/train/finetune.yaml"))  # noqa: SIM115
    mapping |= {"run_dir": str(tmp_path / "pretrained"), "model": sizes, "epochs": None, "steps": 1,
                "batch": {"rows_per_step": 2, "micro_batch_rows": 2}, "log": {"every": 1}, "evaluate": {"every": 5},
                "deepspeed": "ds_configs/zero1_fp32.json"}  # fmt: skip
    mapping["data"] |= {"train": str(folder / "train"), "validation": str(folder / "validation"), "row_length": 64,
                        "max_segment": 64}  # fmt: skip
    mapping["optim"]["schedule"]["warmup_steps"] = 0
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(mapping))
    code, out, err = finish(start("train", config))
    assert code == 0, out + err
    begin = f"model={{init_from: {tmp_path}/pretrained}}"
    code, out, err = finish(start("train", config, f"run_dir={tmp_path}/tuned", begin, "steps=10", "optim.lr=1e-2"))
    assert code == 0, out + err
    assert "weights from" in out
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "val_loss" in line]
    assert [line["val_targets"] for line in validated] == [3 * validation] * 2
    train = open_dataset(folder / "train").info.totals.documents
    assert f"{folder}/train: an epoch reaches {3 * train} of {3 * train} targets\n" in out
    assert sum(line.get("targets", 0) for line in lines) > 3 * train  # of each step, over several epochs
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
