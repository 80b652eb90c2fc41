"""Checkpoints of fairseq2's SONAR, through `lcm-ds import-sonar`, compute what fairseq2 computed with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_sonar import TEXT, save_tiny_sonar
from torch import Tensor
from transformers import M2M100ForConditionalGeneration
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from lcm_ds.cli import main
from lcm_ds.config import EncoderConfig
from lcm_ds.convert.sonar import TOKEN_ORDER, TOKENIZER, import_sonar
from lcm_ds.encoders.sonar import SonarDecoder, SonarEncoder, embed
from lcm_ds.errors import InputError

GOLDEN = Path(__file__).parents[1] / "fixtures" / "sonar_text_fairseq2.safetensors"
TEXTS = ["It rains in the mountains.", "My name is SONAR.", "Who knows what 1,234 sentences sound like?"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden file's models, imported on the command line; the file holds both."""
    output = tmp_path_factory.mktemp("imported") / "sonar"
    assert main(["import-sonar", str(GOLDEN), str(GOLDEN), str(output)]) == 0
    return output


def weights_of(golden: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """fairseq2's state dict of one part."""
    return {name.removeprefix(f"{part}."): t for name, t in golden.items() if name.startswith(f"{part}.")}


def saved(golden: dict[str, Tensor], folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Meta's checkpoints as .pt files; changes: of one part's state dict; None removes a weight."""
    for part in ("encoder", "decoder"):
        weights = {**weights_of(golden, part), **changes.get(part, {})}
        torch.save({"model": {name: w for name, w in weights.items() if w is not None}}, folder / f"{part}.pt")
    return folder / "encoder.pt", folder / "decoder.pt"


def renumbered(ids: Tensor) -> Tensor:
    """fairseq2's token ids as transformers'."""
    return torch.tensor([TOKEN_ORDER.index(row) for row in range(4)] + list(range(4, 128)))[ids.long()]


def test_the_encoder_is_fairseq2s(imported: Path, golden: dict[str, Tensor]) -> None:
    encoder = M2M100Encoder.from_pretrained(imported / "encoder").eval()
    mask = torch.arange(golden["input_ids"].shape[1])[None] < golden["input_lengths"][:, None]
    with torch.no_grad():
        concepts = embed(encoder, renumbered(golden["input_ids"]), mask)
    torch.testing.assert_close(concepts, golden["sentence_embeddings"], atol=1e-6, rtol=1e-5)


def test_the_decoder_is_fairseq2s(imported: Path, golden: dict[str, Tensor]) -> None:
    decoder = M2M100ForConditionalGeneration.from_pretrained(imported / "decoder").eval()
    with torch.no_grad():
        logits = decoder(
            encoder_outputs=(golden["sentence_embeddings"][:, None],),
            decoder_input_ids=renumbered(golden["prefix_ids"]),
        ).logits
    # logits come in the order of tokens, too
    reordered = torch.cat([golden["logits"][..., list(TOKEN_ORDER)], golden["logits"][..., 4:]], dim=-1)
    torch.testing.assert_close(logits, reordered, atol=1e-5, rtol=1e-5)


def test_files_of_torch_are_the_same(imported: Path, golden: dict[str, Tensor], tmp_path: Path) -> None:
    import_sonar(*saved(golden, tmp_path), tmp_path / "sonar", heads=4)
    for part in ("encoder", "decoder"):
        for name in ("model.safetensors", "README.md"):
            one, other = ((folder / part / name).read_bytes() for folder in (tmp_path / "sonar", imported))
            assert one == other or name == "README.md"
        assert "license: cc-by-nc-4.0" in (imported / part / "README.md").read_text()


# --- with a tokenizer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """Checkpoints and a sentencepiece model that fit together: transformers' models under fairseq2's names.

    Gives (encoder.pt, decoder.pt, sentencepiece.model, the folder with transformers' models).
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "text").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spm"), vocab_size=120, model_type="bpe",
        unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
    )  # fmt: skip
    # as in fairseq2: a <pad> in front of the pieces, 202 languages and 3 marks behind them
    paths = save_tiny_sonar(folder / "transformers", vocab_size=1 + 120 + 202 + 3)
    for part, path in zip(("encoder", "decoder"), paths, strict=True):
        with safe_open(path / "model.safetensors", "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        torch.save({"model": fairseq2_names(found, part)}, folder / f"{part}.pt")
    return folder / "encoder.pt", folder / "decoder.pt", folder / "spm.model", folder / "transformers"


def fairseq2_names(found: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """transformers' weights of one part under fairseq2's names, the other way round."""
    named = {}
    for name, tensor in found.items():
        if name in ("model.shared.weight", "embed_tokens.weight"):
            embedding = torch.empty_like(tensor)
            embedding[list(TOKEN_ORDER)], embedding[4:] = tensor[:4], tensor[4:]
            named[f"{part}_frontend.embed.weight"] = embedding
        elif part == "encoder" or name.startswith("model.decoder."):
            name = name.removeprefix("model.decoder.").replace(".self_attn.out_proj.", ".self_attn.output_proj.")
            name = name.replace(".encoder_attn.out_proj.", ".encoder_attn.output_proj.")
            for old, new in (("fc1", "ffn.inner_proj"), ("fc2", "ffn.output_proj")):
                name = name.replace(f".{old}.", f".{new}.")
            name = name.replace(".final_layer_norm.", ".ffn_layer_norm.")
            name = name.replace(".encoder_attn", ".encoder_decoder_attn")
            own = name.startswith("layers.") or part == "decoder"
            named[f"{part}.{name}" if own else name] = tensor
    return named


@pytest.fixture(scope="module")
def ready(checkpoints: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same imported with its tokenizer."""
    output = tmp_path_factory.mktemp("ready") / "sonar"
    import_sonar(checkpoints[0], checkpoints[1], output, tokenizer=str(checkpoints[2]), heads=4)
    return output


def test_imports_with_a_tokenizer_encode_and_decode_as_transformers_models(
    ready: Path, checkpoints: tuple[Path, ...]
) -> None:
    settings = {"name": "sonar", "dtype": "float32", "device": "cpu"}
    encoder = SonarEncoder(EncoderConfig.model_validate({**settings, "model": str(ready / "encoder")}))
    concepts = encoder.encode(TEXTS)
    model = M2M100Encoder.from_pretrained(checkpoints[3] / "encoder").eval()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoints[2]))
    for text, concept in zip(TEXTS, concepts, strict=True):
        # by the numbers of fairseq2: pieces behind a <pad> of their own, English the 47th of the languages
        ids = [1 + 120 + 46, *(id + 1 if id > 0 else 3 for id in pieces.encode(text)), 2]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(concept, expected, atol=1e-5)
    decoder = SonarDecoder(str(ready / "decoder"), "fra_Latn", dtype="float32", device="cpu")
    full = M2M100ForConditionalGeneration.from_pretrained(checkpoints[3] / "decoder").eval()
    decoded = decoder.decode(concepts, max_new_tokens=8)
    decoder._model = full
    assert decoded == decoder.decode(concepts, max_new_tokens=8)


def test_a_tokenizers_folder_serves_as_its_sentencepiece_model_does(
    ready: Path, checkpoints: tuple[Path, ...], tmp_path: Path
) -> None:
    import_sonar(checkpoints[0], checkpoints[1], tmp_path / "sonar", tokenizer=str(ready / "encoder"), heads=4)
    one, other = ((folder / "decoder" / "tokenizer.json").read_text() for folder in (tmp_path / "sonar", ready))
    assert one == other


def test_without_a_tokenizer_its_source_is_printed(imported: Path, tmp_path: Path, capsys: Any) -> None:
    import_sonar(GOLDEN, GOLDEN, tmp_path / "sonar")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert f"--tokenizer {TOKENIZER}" in lines[1]
    with pytest.raises(InputError, match="files are missing"):
        SonarDecoder(str(imported / "decoder"))


# --- refused ------------------------------------------------------------------------------------------------------


def test_all_errors_are_reported_at_once_and_nothing_is_written(
    golden: dict[str, Tensor], checkpoints: tuple[Path, ...], tmp_path: Path
) -> None:
    encoder = {"encoder.layers.1.ffn.inner_proj.bias": None, "pooler.weight": torch.zeros(2)}
    decoder = {"final_proj.weight": golden["decoder.final_proj.weight"] + 1}
    paths = saved(golden, tmp_path, encoder=encoder, decoder=decoder)
    (tmp_path / "sonar").mkdir()
    (tmp_path / "sonar" / "mine").touch()
    with pytest.raises(InputError) as refused:
        import_sonar(*paths, tmp_path / "sonar", heads=4)
    errors = "\n".join(refused.value.errors)
    assert len(refused.value.errors) == 4
    assert "sonar: is there already" in errors
    assert "encoder.pt: layers.1.fc1.bias is missing" in errors
    assert "encoder.pt: pooler.weight: unknown to SONAR's encoder" in errors
    assert "decoder.pt: final_proj.weight differs from decoder_frontend.embed.weight" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.pt", "encoder.pt", "sonar"]


@pytest.mark.parametrize("tokenizer", ["spm", "text", "gone"])
def test_a_tokenizer_that_does_not_fit_is_refused(
    checkpoints: tuple[Path, ...], tmp_path: Path, tokenizer: str
) -> None:
    (tmp_path / "text").write_text("no sentencepiece model")
    name = str({"spm": checkpoints[2], "text": tmp_path / "text", "gone": tmp_path / "gone"}[tokenizer])
    with pytest.raises(InputError, match=re.escape(name)) as refused:
        import_sonar(GOLDEN, GOLDEN, tmp_path / "sonar", tokenizer=name)
    assert all("--tokenizer" in line and "\n" not in line for line in refused.value.errors)
    if tokenizer == "spm":
        assert refused.value.errors == [f"--tokenizer {name}: is for a vocabulary of 326 tokens, the encoder has 128"]
    assert not (tmp_path / "sonar").exists()


def test_swapped_parts_are_refused_and_unknown_heads_asked_for(golden: dict[str, Tensor], tmp_path: Path) -> None:
    encoder, decoder = saved(golden, tmp_path)
    with pytest.raises(InputError) as refused:
        import_sonar(decoder, encoder, tmp_path / "sonar", heads=4)
    assert [f"not SONAR's text {part}: " in line for part, line in
            zip(("encoder", "decoder"), refused.value.errors, strict=True)] == [True, True]  # fmt: skip
    with pytest.raises(InputError, match="--heads: is needed: the number of heads of hidden size 32"):
        import_sonar(encoder, decoder, tmp_path / "sonar")
    with pytest.raises(InputError, match="--heads 5: has to divide the hidden size 32"):
        import_sonar(encoder, decoder, tmp_path / "sonar", heads=5)
    (tmp_path / "other.pt").write_bytes(b"no checkpoint")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "other.pt", tmp_path / "other.safetensors"):
        with pytest.raises(InputError, match=f"{path.name}: "):
            import_sonar(path, decoder, tmp_path / "sonar", heads=4)
