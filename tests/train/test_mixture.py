"""A run on two datasets, one of which has a shard that cannot be read: trained, evaluated, traced, and moved."""

import json
import shutil

import numpy as np
import pytest
from runs import finish, metrics, run_dir, start

from lcm_ds.checkpoint.format import load_model
from lcm_ds.cli import main
from lcm_ds.data.concepts import ConceptInfo
from lcm_ds.data.format import open_dataset, read_normalizer, write_normalizer
from lcm_ds.data.shard import Shard
from lcm_ds.data.tools.fit_normalizer import fit_normalizer
from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile
from lcm_ds.train.job_builder import build_job, encoder_lines
from lcm_ds.train.trace import trace


@pytest.fixture(scope="module")
def mixture(concepts, synthetic_dataset, make_config, tmp_path_factory):
    """A finished run of 12 steps, its two datasets, and its output; the second has a bad shard."""
    ours = concepts["train"]
    damaged = tmp_path_factory.mktemp("mixture") / "damaged"
    shutil.copytree(synthetic_dataset(documents=40, embed_dim=16, seed=3), damaged)
    shard = damaged / open_dataset(damaged).shards[1].name
    data = bytearray(shard.read_bytes())
    for offset in Shard(shard).offsets:
        data[offset] ^= 1  # in the first concept of each document
    shard.write_bytes(data)
    config = make_config(
        data={
            "train": [{"path": str(ours), "weight": 3}, {"path": str(damaged), "weight": 1}],
            "validation": str(damaged),
            "row_length": 32,
            "max_segment": 16,
            "on_bad_shard": "skip",
        },
        optim={"lr": 2.0e-3, "eps": 1.0e-2, "schedule": {"name": "cosine", "warmup_steps": 5}},
        steps=12,
        log={"every": 7},
        checkpoint={"every": 5},
        evaluate={"every": 12},
    )
    code, out, err = finish(start("train", config))
    assert code == 0, out + err
    return config, ours, damaged, out


def test_the_shares_of_a_mixture_are_those_of_its_weights_and_are_printed(mixture):
    _, ours, damaged, out = mixture
    totals = [sum(shard.concepts for shard in open_dataset(path, skip_bad=True).shards) for path in (ours, damaged)]
    assert (
        f"data: {ours} ({totals[0]:,} concepts, 6 of 8 rows of a step), "
        f"{damaged} ({totals[1]:,} concepts, 2 of 8 rows of a step)" in out
    )


def test_the_first_lines_have_the_length_of_the_run_and_a_warning_for_a_long_warm_up(mixture):
    config, *datasets, out = mixture
    total = sum(shard.concepts for path in datasets for shard in open_dataset(path, skip_bad=True).shards)
    read = 12 * 8 * 32
    assert f"\ntotal: {read:,} concepts, {read / total:.2f} epochs; warm-up 5 steps, 41.7% of the run\n" in out
    line = "optim.schedule.warmup_steps: 5 is 42% of the run's 12 steps; the LCM paper's 4 % would be 1"
    assert f"\nwarning: {line}\n" in out
    assert f"WARNING lcm_ds: {line}" in (run_dir(config) / "log.txt").read_text()


def test_an_eps_above_the_gradients_is_named_once_and_logged_with_the_share_of_clipped_steps(mixture):
    config, *_, out = mixture
    assert out.count("warning: optim.eps: 0.01 is ") == 1
    assert "the LCM paper's eps corresponds to 6.25e-07 here: 1e-05 / 16" in out
    norms, shares, clipped = (metrics(config, key) for key in ("grad_norm", "adam_eps_share", "clipped"))
    weights = load_model(run_dir(config))[0].num_parameters()
    for step, norm in norms.items():
        assert shares[step] == pytest.approx(0.01 / (0.01 + min(norm, 1.0) / weights**0.5), rel=1e-6)
    assert set(shares) == set(clipped) == {5, 7, 10, 12}
    assert all(0 <= share <= 1 for share in clipped.values())


def test_a_report_precedes_each_save(mixture):
    """Else a resumed run would never log the losses just before its checkpoint."""
    losses = metrics(mixture[0], "losses")
    assert {step: len(some) for step, some in losses.items()} == {5: 5, 7: 2, 10: 3, 12: 2}


def test_a_run_that_skipped_a_bad_shard_can_be_evaluated(mixture):
    config, _, damaged, _ = mixture
    code, _, err = finish(start("evaluate", run_dir(config)))
    assert code == 0, err
    shard = open_dataset(damaged, skip_bad=True).shards[1].name
    log = (run_dir(config) / "log.txt").read_text()
    assert shard in log
    assert "skipped" in log
    assert metrics(config, "missing_concepts")[12] > 0
    figures = json.loads((run_dir(config) / "evaluation.json").read_text())
    assert 0 < figures["targets"] == metrics(config, "val_targets")[12]


def test_a_trace_shows_the_dataset_of_a_document(mixture, capsys):
    config, ours, damaged, _ = mixture
    assert main(["trace", str(config), "--step", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()[1:]
    for lane in range(8):
        path = ours if lane < 6 else damaged
        lines = [line for line in printed if line.startswith(f"row {lane:>3}  ")]
        assert lines
        assert all(line.startswith(f"row {lane:>3}  {path}  shard-") for line in lines)


def test_a_trace_of_a_moved_run_has_its_losses_and_marks_non_finite_ones(mixture, tmp_path, capsys):
    config, *_ = mixture
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(run_dir(config) / "config.yaml", moved)
    (moved / "metrics.jsonl").write_text('{"step": 2, "losses": [0.5, null]}\n')
    trace(moved, [], 0, 2)
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert heads == ["step 0  loss 0.5", "step 1  loss not finite, or without targets", "step 2  loss not logged"]


def test_a_trace_reads_no_shard_in_full(mixture, monkeypatch):
    monkeypatch.setattr(OpenFile, "sha256", lambda file: pytest.fail(f"{file.path} was read"))
    assert trace(mixture[0], [], 3)[0]


def test_datasets_that_do_not_match_are_refused_with_both_named(concepts, synthetic_dataset, make_config, tmp_path):
    ours, wide = concepts["train"], synthetic_dataset(documents=10, embed_dim=24)
    other = tmp_path / "other"
    shutil.copytree(synthetic_dataset(documents=20, embed_dim=16, seed=4), other)
    described = json.loads((other / "dataset.json").read_text())
    described["encoder"]["revision"] = "b"
    (other / "dataset.json").write_text(json.dumps(described))
    for path, expected in ((wide, ["24 dimensions", "of 16;"]), (other, ["'revision': 'b'", "'revision': None"])):
        config = make_config(data={"train": [{"path": str(ours)}, {"path": str(path)}]})
        with pytest.raises(InputError) as caught:
            build_job(config, [], 1)
        assert any(
            all(words in line for words in (f"{config}: data: {path}", str(ours), *expected))
            for line in caught.value.errors
        )


@pytest.fixture
def two(concepts, synthetic_dataset, make_config, tmp_path):
    """Two datasets of a mixture, and functions to change dataset.json of the second and to get all errors."""
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(concepts["train"], one)
    shutil.copytree(synthetic_dataset(documents=40, embed_dim=16, seed=4), other)
    data = {"train": [{"path": str(one)}, {"path": str(other)}], "row_length": 32, "max_segment": 16}

    def describe(folder, **changes):
        described = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**described, **changes}))

    def errors(**more):
        try:
            build_job(make_config(data={**data, **more}), [], 1)
        except InputError as error:
            return [line.split(".yaml: ", 1)[1] for line in error.errors]
        return []

    return one, other, describe, errors


def test_a_mixture_with_normalisers_that_differ_in_a_bit_is_refused_with_the_solution(two):
    one, other, _, errors = two
    assert errors() == []
    center, scale = read_normalizer(other)
    scale[3] = np.nextafter(scale[3], np.float32(1))
    write_normalizer(other, center, scale, {})
    (line,) = errors()
    assert line == (
        f"data.train: {other} and {one} have different normalisers; fit a common one: "
        f"lcm-ds fit-normalizer {one} {other}"
    )
    weighted = [{"path": str(one), "weight": 3}, {"path": str(other), "weight": 0.5}]
    assert errors(train=weighted)[0].endswith(f": lcm-ds fit-normalizer {one}=3 {other}=0.5")
    fit_normalizer([f"{one}=3", f"{other}=0.5"])
    assert errors(train=weighted) == []


def test_validation_data_need_the_training_datas_normaliser(two):
    one, other, _, errors = two
    write_normalizer(other, *(numbers * 2 for numbers in read_normalizer(other)), {})
    (line,) = errors(train=str(one), validation=str(other))
    assert line.startswith(f"data.validation: {other} and {one} have different normalisers; copy ")
    shutil.copy(one / "normalizer.safetensors", other)
    assert errors(train=str(one), validation=str(other)) == []


def test_a_mixture_with_another_end_of_text_is_refused(two):
    one, other, describe, errors = two
    end = json.loads((one / "dataset.json").read_text())["end_of_text"]
    rounded = {**end, "vector": [number * 1.01 for number in end["vector"]]}  # as from another device
    describe(other, end_of_text=rounded)
    assert errors() == []
    for its in (
        {**end, "text": "Fin."},
        {**end, "vector": [-number for number in end["vector"]]},
        None,
    ):
        describe(other, end_of_text=its)
        (line,) = errors()
        assert line.startswith(f"data: documents of {other} end with ")
        assert f", those of {one} with 'End of text.' (" in line
        (line,) = errors(train=str(one), validation=str(other))
        assert "data: documents of" in line


def test_languages_and_dtypes_of_one_encoder_mix_with_a_line_that_says_so(two, make_config, capsys):
    one, other, describe, errors = two
    end = json.loads((one / "dataset.json").read_text())["end_of_text"]
    sonar = {"name": "sonar", "model": "hub/sonar", "revision": "a", "language": "eng_Latn", "dtype": "float16"}
    describe(one, encoder=sonar)
    german = {**end, "vector": [-number for number in end["vector"]]}
    describe(other, encoder={**sonar, "language": "deu_Latn", "dtype": "bfloat16"}, end_of_text=german)
    assert errors() == []
    fit_normalizer([str(one), str(other)])
    differences = "one encoder, but language eng_Latn and deu_Latn, dtype float16 and bfloat16"
    assert f"{one} and {other}: {differences}\n" in capsys.readouterr().out
    data = {"train": [{"path": str(one)}, {"path": str(other)}], "row_length": 32, "max_segment": 16}
    for more in ({}, {"train": str(one), "validation": str(other)}):
        [line] = encoder_lines(build_job(make_config(data={**data, **more}), [], 1))
        assert line.startswith(f"{one} and {other}: {differences}; their documents end with other concepts")
    assert main(["train", str(make_config(data=data)), "--dry-run", "--ranks", "2"]) == 0
    assert f"encoders      {one} and {other}: {differences}" in capsys.readouterr().out
    describe(other, encoder={**sonar, "dtype": "bfloat16"}, end_of_text=german)  # of one language ends are the same
    assert len(errors()) == 1
    describe(other, encoder={**sonar, "language": "deu_Latn"}, end_of_text=None)
    assert len(errors()) == 1
    for key in ("name", "model", "revision"):
        describe(other, encoder={**sonar, key: "b"}, end_of_text=end)
        assert "all datasets of a run need the same encoder" in errors()[0]
        with pytest.raises(InputError, match="a mixture has one"):
            fit_normalizer([str(one), str(other)])


def test_supervised_datasets_of_a_mixture_need_one_suffix_and_mix_with_plain_ones(two, synthetic_dataset):
    one, other, describe, errors = two

    def supervise(folder, seed):
        shutil.rmtree(folder)
        shutil.copytree(synthetic_dataset(documents=40, embed_dim=16, seed=seed, given=1), folder)

    supervise(other, 4)
    describe(other, supervised={"source_suffix": "[MODEL]:"})
    assert errors() == []
    infos = [open_dataset(path).info for path in (one, other)]
    assert ConceptInfo.of(infos[0], mixed=infos).source_suffix == "[MODEL]:"
    supervise(one, 0)
    (line,) = errors()
    assert line == (
        f"data: sources of {other} end with '[MODEL]:', those of {one} with None; "
        "all datasets of a run need the same source_suffix"
    )
