"""Meta's checkpoints, through `lcm-ds import-meta`, compute what Meta's code computed with them."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tolerance import rounding_of

from lcm_ds import BaseLCM
from lcm_ds.convert.base_lcm import import_meta
from lcm_ds.errors import InputError
from lcm_ds.generate.sampler import generate


def weights_of(golden, prefix=""):
    """Meta's state dict, each name with a prefix."""
    names = [name for name in golden if name.startswith("model.")]
    return {prefix + name.removeprefix("model."): golden[name] for name in names}


def agrees(model, golden):
    with torch.inference_mode():
        output = model(golden["input"])
    return torch.allclose(output, golden["output"], atol=1e-4, rtol=0)


def import_on_command_line(*arguments):
    command = [sys.executable, "-m", "lcm_ds.cli", "import-meta", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_golden_inputs_give_golden_outputs_through_the_command_line(golden_path, golden, tmp_path):
    done = import_on_command_line(golden_path, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    model = BaseLCM.from_pretrained(tmp_path / "model").eval()
    # fp32 on both sides: 1e-4 is required, the difference is much smaller
    assert agrees(model, golden)
    assert (model(golden["input"]) - golden["output"]).abs().max() < 2e-5


def test_import_returns_the_model_that_it_wrote(golden_path, golden, tmp_path):
    model = import_meta(golden_path, tmp_path / "model")
    written = BaseLCM.from_pretrained(tmp_path / "model")
    assert agrees(model, golden)
    assert not model.training
    for name, value in written.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_golden_prompts_are_continued_as_in_metas_code(golden_path, golden, tmp_path):
    model = import_meta(golden_path, tmp_path / "model")
    prompts, generated = golden["prompt"], golden["generated"]
    length = generated.shape[1] - prompts.shape[1]
    free = {"stop_end": None, "stop_repeat": None}
    together = generate(model, list(prompts), length, **free)
    for number, (prompt, full) in enumerate(zip(prompts, generated, strict=True)):
        assert torch.equal(full[: len(prompt)], prompt)
        expected = full[len(prompt) :]
        (single,) = generate(model, [prompt], length, **free)
        seen = prompt
        with torch.inference_mode():
            for _ in range(length):
                seen = torch.cat([seen, model(seen.unsqueeze(0))[0, -1:]])
        for found in (together[number].concepts, single.concepts, seen[len(prompt) :]):
            assert torch.allclose(found, expected, atol=length * rounding_of(model.config, len(full)), rtol=0)


def test_golden_prompts_of_unequal_length_are_continued_together_as_in_metas_code(golden_path, golden, tmp_path):
    model = import_meta(golden_path, tmp_path / "model")
    generated = golden["generated"]
    cuts = (6, 9)  # what Meta's code generated is part of the longer prompt
    prompts = [full[:cut] for full, cut in zip(generated, cuts, strict=True)]
    made = generate(model, prompts, 5, stop_end=None, stop_repeat=None)
    for full, cut, generation in zip(generated, cuts, made, strict=True):
        close = 5 * rounding_of(model.config, cut + 5)
        assert torch.allclose(generation.concepts, full[cut : cut + 5], atol=close, rtol=0)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_a_pt_file_is_the_same_with_any_prefix(golden, tmp_path, prefix):
    torch.save({"model": weights_of(golden, prefix), "step": 3}, tmp_path / "meta.pt")
    assert agrees(import_meta(tmp_path / "meta.pt", tmp_path / "model", heads=4), golden)


def test_the_number_of_heads_matters_and_is_taken_from_the_call(golden, tmp_path):
    torch.save({"model": weights_of(golden)}, tmp_path / "meta.pt")
    model = import_meta(tmp_path / "meta.pt", tmp_path / "model", heads=2)
    assert model.config.num_attention_heads == 2
    assert not agrees(model, golden)


def with_normaliser(golden, prefix="", **vectors):
    """Meta's state dict of a model with a normaliser: named as in large_concept_model's LCMFrontend."""
    entries = {f"{prefix}frontend.sonar_normalizer.{name}": vector for name, vector in vectors.items()}
    return {**weights_of(golden, prefix), **entries}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_normaliser_of_metas_frontend_is_imported(golden, tmp_path, prefix):
    center, scale = torch.randn(48), torch.rand(48) + 0.5
    torch.save({"model": with_normaliser(golden, prefix, center=center, scale=scale)}, tmp_path / "meta.pt")
    import_meta(tmp_path / "meta.pt", tmp_path / "model", heads=4)
    model = BaseLCM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(model.normalizer.center, center)
    assert torch.equal(model.normalizer.scale, scale)
    # Meta's forward takes normalised concepts: raw ones give ours the same
    raw = model.normalizer.denormalize(golden["input"])
    assert torch.allclose(model(raw), golden["output"], atol=1e-4, rtol=0)


def test_without_a_normaliser_raw_and_normalised_space_are_one(golden_path, tmp_path):
    model = import_meta(golden_path, tmp_path / "model")
    concepts = torch.randn(3, 48)
    assert torch.equal(model.normalizer.normalize(concepts), concepts)


def lacking(golden):
    weights = weights_of(golden)
    del weights["lcm.layers.1.ffn.inner_proj.bias"]
    return {"model": weights}


def reshaped(golden):
    weights = weights_of(golden)
    weights["postnet.fc.weight"] = torch.zeros(48, 63)
    return {"model": weights}


BAD = {
    "layers.1.mlp.up_proj.bias is missing": lacking,
    "post_net.weight has shape [48, 63] instead of [48, 64]": reshaped,
    "decoder.extra: unknown to Base-LCM": lambda g: {"model": {**weights_of(g), "decoder.extra": torch.zeros(2)}},
    # half a normaliser, or one that clips, is not the model's
    "normalizer.scale is missing": lambda g: {"model": with_normaliser(g, center=torch.zeros(48))},
    "normalizer.clip_min: unknown to Base-LCM": lambda g: {
        "model": with_normaliser(g, center=torch.zeros(48), scale=torch.ones(48), clip_min=torch.zeros(48))
    },
    "pre_net.weight is missing": lambda g: {"model": {"embed.weight": torch.zeros(2, 2)}},
    'has to be {"model": state_dict}': weights_of,
    "has to be {": lambda g: {"model": "weights.bin"},
    "cannot be read as a checkpoint": lambda g: b"not a checkpoint",
    "as a checkpoint: 105": lambda g: b"hi",  # the unpickler's error for a text depends on its characters
    "as a checkpoint: E": lambda g: b"",
}


@pytest.mark.parametrize("expected", BAD)
def test_other_files_are_refused_in_one_line(golden, tmp_path, expected):
    path = tmp_path / "meta.pt"
    content = BAD[expected](golden)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError) as refused:
        import_meta(path, tmp_path / "model", heads=4)
    (line,) = refused.value.errors
    assert line.startswith(f"{path}: ")
    assert expected in line
    assert "\n" not in line
    assert not (tmp_path / "model").exists()


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": print}, tmp_path / "meta.pt")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        import_meta(tmp_path / "meta.pt", tmp_path / "model")


@pytest.mark.parametrize("heads", [3, 0, 64])
def test_heads_that_do_not_divide_the_width_are_refused(golden, tmp_path, heads):
    torch.save({"model": weights_of(golden)}, tmp_path / "meta.pt")
    with pytest.raises(InputError, match=f"--heads {heads}: has to divide the hidden size 64"):
        import_meta(tmp_path / "meta.pt", tmp_path / "model", heads=heads)


def test_unknown_heads_are_asked_for(golden, tmp_path):
    torch.save({"model": weights_of(golden)}, tmp_path / "meta.pt")
    with pytest.raises(InputError, match="--heads: is needed: the number of heads of hidden size 64"):
        import_meta(tmp_path / "meta.pt", tmp_path / "model")


def test_heads_default_to_metas_128_dimensions_each(golden, tmp_path):
    weights = {name: torch.zeros([4 * n if n == 64 else n for n in w.shape]) for name, w in weights_of(golden).items()}
    torch.save({"model": weights}, tmp_path / "meta.pt")
    config = import_meta(tmp_path / "meta.pt", tmp_path / "model").config
    assert (config.hidden_size, config.num_attention_heads) == (256, 2)


@pytest.mark.parametrize("key", ["num_heads", "norm_eps", "rope_theta"])
def test_a_header_that_holds_no_number_is_refused(golden, tmp_path, key):
    save_file(weights_of(golden, "model."), tmp_path / "meta.safetensors", {"num_heads": "4", key: "four"})
    with pytest.raises(InputError, match=f"{key}: 'four' in the header is not a number"):
        import_meta(tmp_path / "meta.safetensors", tmp_path / "model")


def test_the_command_line_prints_errors_without_a_traceback(golden, tmp_path):
    save_file({"input": torch.zeros(2)}, tmp_path / "other.safetensors")
    done = import_on_command_line(tmp_path / "other.safetensors", tmp_path / "model")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "other.safetensors" in done.stderr
    missing = import_on_command_line(tmp_path / "none.pt", tmp_path / "model")
    assert missing.returncode == 2
    assert len(missing.stderr.splitlines()) == 1
