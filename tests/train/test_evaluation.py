"""The evaluation of a real run: the model and its baselines on the same targets, in a readable report."""

import json

from runs import finish, run_dir, start


def test_the_table_has_the_model_and_its_baselines(trained, concepts, call, tmp_path):
    run = run_dir(trained(2))
    code, out, err = finish(start("evaluate", run, "--json", tmp_path / "figures.json"))
    assert code == 0, err
    assert "tensorboard --logdir" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == json.loads((run / "evaluation.json").read_text())
    scores = figures["scores"]
    assert all(name in out for name in scores)
    assert len(scores) == 8
    documents = [json.loads(line) for line in (concepts["validation"] / "shards.jsonl").read_text().splitlines()]
    held = sum(shard["concepts"] for shard in documents)
    # The first concept of each segment is not a target, and a document has one segment or more.
    assert figures["documents"] == sum(shard["documents"] for shard in documents)
    assert 0.5 * held < figures["targets"] < held - figures["documents"] + 1
    # The documents' language is a rotation: copying the last concept is useless, a linear map is exact.
    mse = {name: by["normalised"]["mse"] for name, by in scores.items()}
    assert mse["ridge from the last"] < mse["mean concept"] < mse["copy of the last"]
    assert mse["Base-LCM"] < mse["mean concept"]
    assert figures["baselines"]["best"].startswith("ridge from")
    for by in scores.values():
        for space in ("normalised", "raw"):
            assert {"mse", "l2", "cosine", "ca", "variance_ratio"} <= set(by[space])
            assert 0 <= by[space]["ca"] <= 1

    # A second call reports the first and does not evaluate again.
    before = (run / "evaluation.json").stat().st_mtime_ns
    code, out, err = call("evaluate", run)
    assert code == 0, err
    assert "already evaluated at step 40" in out
    assert all(name in out for name in scores)
    assert (run / "evaluation.json").stat().st_mtime_ns == before


def test_input_errors_end_with_2(trained, synthetic_dataset, call, tmp_path):
    run = run_dir(trained(2))
    for arguments, expected in (
        ((tmp_path / "no_run",), ["no run here"]),
        ((run, "--dataset", synthetic_dataset(documents=10, embed_dim=24)), ["embed_dim 24", "rotation-24"]),
        ((run, "--dataset", tmp_path), ["not a finished dataset"]),
    ):
        code, _, err = call("evaluate", *arguments)
        assert code == 2
        lines = err.splitlines()
        assert len(lines) == len(expected)
        assert all(words in line for words, line in zip(expected, lines, strict=True))
