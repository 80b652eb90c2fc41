"""Generation: what the cache computes is what would be computed anew, and the rules that end it."""

import pytest
import torch

from lcm_ds.generate.autoregressive import END_OF_TEXT, MAX_CONCEPTS, REPEATS, generate
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

NEVER = 2.0  # no cosine is above it


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BaseLCMConfig(
        embed_dim=12,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
        dropout=0.1,
    )
    model = BaseLCM(config).initialize(1)
    # as small and as far from zero as sentence embeddings are
    model.normalizer.set((torch.randn(12) * 0.02).numpy(), (torch.rand(12) * 0.01 + 0.005).numpy())
    return model.eval()


def prompt_of(model, length):
    return model.normalizer.denormalize(torch.randn(length, 12))


def test_the_cache_gives_what_recomputing_everything_gives(model):
    prompts = [prompt_of(model, length) for length in (1, 4, 9)]
    generations = generate(model, prompts, 10, stop_repeat=NEVER)
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.concepts.shape == (10, 12)
        assert generation.concepts.dtype == torch.float32
        seen = prompt
        with torch.inference_mode():
            for concept in generation.concepts:
                anew = model.normalizer.denormalize(model(seen.unsqueeze(0))[0, -1])
                assert torch.allclose(model.normalizer.normalize(anew), model.normalizer.normalize(concept), atol=1e-5)
                seen = torch.cat([seen, concept.unsqueeze(0)])


def test_going_through_raw_space_loses_nothing(model):
    with torch.inference_mode():
        predicted = model(prompt_of(model, 5).unsqueeze(0))[0]
        back = model.normalizer.normalize(model.normalizer.denormalize(predicted))
    assert torch.allclose(back, predicted, atol=1e-5)


def test_a_prompt_goes_on_alike_whatever_comes_with_it(model):
    one, other = prompt_of(model, 3), prompt_of(model, 7)
    together = generate(model, [one, other], 5, stop_repeat=NEVER)
    alone = generate(model, [other], 5, stop_repeat=NEVER)
    assert torch.equal(together[1].concepts, alone[0].concepts)


def test_more_concepts_begin_with_the_fewer(model):
    prompt = prompt_of(model, 3)
    few, many = (generate(model, [prompt], n, stop_repeat=NEVER)[0].concepts for n in (3, 8))
    assert torch.equal(many[:3], few)
    assert not torch.allclose(many[3], many[2], atol=1e-4)


def test_it_ends_with_the_first_concept_near_the_end_of_text(model):
    prompt = prompt_of(model, 3)
    free = generate(model, [prompt], 8, stop_repeat=NEVER)[0]
    assert free.reason == MAX_CONCEPTS
    # twice as long, for only the direction counts
    end = 2 * free.concepts[4]
    cosines = torch.cosine_similarity(free.concepts, end, dim=-1)
    first = int((cosines > 0.9).nonzero()[0])
    stopped = generate(model, [prompt], 8, end_of_text=end, stop_repeat=NEVER)[0]
    assert stopped.reason == END_OF_TEXT
    assert torch.equal(stopped.concepts, free.concepts[: first + 1])
    assert generate(model, [prompt], 8, end_of_text=end, stop_end=NEVER, stop_repeat=NEVER)[0].reason == MAX_CONCEPTS


def test_it_ends_with_the_first_concept_like_the_one_before(model):
    prompt = prompt_of(model, 3)
    free = generate(model, [prompt], 8, stop_repeat=NEVER)[0].concepts
    before = torch.cat([prompt[-1:], free[:-1]])
    cosines = torch.cosine_similarity(free, before, dim=-1)
    # a threshold that the prompt's last concept is below, so that it is a generated one that is repeated
    threshold = float(cosines[1:].max()) - 1e-4
    first = int((cosines > threshold).nonzero()[0])
    stopped = generate(model, [prompt], 8, stop_repeat=threshold)[0]
    assert stopped.reason == REPEATS
    assert torch.equal(stopped.concepts, free[: first + 1])


def test_the_prompts_last_concept_counts_as_the_one_before(model):
    prompt = prompt_of(model, 3)
    first = generate(model, [prompt], 1, stop_repeat=NEVER)[0].concepts[0]
    cosine = float(torch.cosine_similarity(first, prompt[-1], dim=0))
    stopped = generate(model, [prompt], 8, stop_repeat=cosine - 1e-3)[0]
    assert (stopped.reason, len(stopped.concepts)) == (REPEATS, 1)


def test_prompts_of_half_precision_are_taken(model):
    prompt = prompt_of(model, 3).half()
    half, full = (generate(model, [p], 2, stop_repeat=NEVER)[0].concepts for p in (prompt, prompt.float()))
    assert torch.equal(half, full)


@pytest.mark.parametrize(
    ("shape", "max_concepts", "told"),
    [((0, 12), 1, r"not \[0, 12\]"), ((2, 11), 1, r"not \[2, 11\]"), ((12,), 1, r"not \[12\]"), ((2, 12), 0, "not 0")],
)
def test_what_cannot_be_gone_on_from_is_an_error(model, shape, max_concepts, told):
    with pytest.raises(ValueError, match=told):
        generate(model, [torch.zeros(shape)], max_concepts)
