"""Generation: the cache gives the same results as recomputing, and the stop rules."""

import pytest
import torch
from tolerance import rounding_of

import lcm_ds.generate.sampler as module
from lcm_ds.generate.sampler import END_OF_TEXT, MAX_CONCEPTS, REPEATS, generate
from lcm_ds.model.attention import Cache
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

FREE = {"stop_end": None, "stop_repeat": None}


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


def recomputed(model, prompt, concepts):
    """The predictions that gave `concepts`, without a cache, normalised space."""
    with torch.inference_mode():
        return model(torch.cat([prompt, concepts[:-1]]).unsqueeze(0))[0, len(prompt) - 1 :]


def agree(model, some, others):
    """Tolerance in normalised space; errors accumulate over concepts."""
    difference = model.normalizer.normalize(some) - model.normalizer.normalize(others)
    return some.shape == others.shape and bool(difference.abs().max() < len(some) * rounding_of(model.config, 16))


@pytest.mark.parametrize("lengths", [(5,), (7, 7), (1, 4, 9), (9, 70, 130, 2)])
def test_the_cache_gives_what_recomputing_everything_gives(model, lengths):
    prompts = [prompt_of(model, length) for length in lengths]
    # enough for the cache to grow twice
    generations = generate(model, prompts, 150, **FREE)
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.concepts.shape == (150, 12)
        assert generation.concepts.dtype == torch.float32
        expected = recomputed(model, prompt, generation.concepts)
        close = rounding_of(model.config, len(prompt) + 150)
        assert torch.allclose(expected, model.normalizer.normalize(generation.concepts), atol=close)


def test_concepts_may_come_several_at_a_time_behind_rows_of_unequal_length(model):
    rows = [prompt_of(model, length) for length in (9, 12)]
    cache, close = Cache(), rounding_of(model.config, 13)
    with torch.inference_mode():
        full = [model(row.unsqueeze(0))[0] for row in rows]
        model(torch.stack([rows[0][:5], rows[1][:5]]), cache=cache)
        cache.truncate(torch.tensor([2, 5]))
        parts = model(torch.stack([rows[0][2:9], rows[1][5:12]]), cache=cache)
        assert cache.lengths.tolist() == [9, 12]
        assert torch.allclose(parts[0], full[0][2:], atol=close)
        assert torch.allclose(parts[1], full[1][5:], atol=close)
        cache.keep([1])
        more = prompt_of(model, 1)
        expected = model(torch.cat([rows[1], more]).unsqueeze(0))[0, -1]
        assert torch.allclose(model(more.unsqueeze(0), cache=cache)[0, 0], expected, atol=close)


def test_a_new_concept_costs_no_copy_of_those_before_it(model):
    cache, places = Cache(), set()
    with torch.inference_mode():
        for _ in range(400):
            model(prompt_of(model, 1).unsqueeze(0), cache=cache)
            places.add(cache._layers[0][0].data_ptr())
    assert len(places) <= 4  # 64, 128, 256 and 512 concepts


def test_going_through_raw_space_loses_nothing(model):
    with torch.inference_mode():
        predicted = model(prompt_of(model, 5).unsqueeze(0))[0]
        back = model.normalizer.normalize(model.normalizer.denormalize(predicted))
    assert torch.allclose(back, predicted, atol=1e-5)


def test_a_prompt_goes_on_alike_whatever_comes_with_it(model, monkeypatch):
    prompts = [prompt_of(model, length) for length in (3, 7, 1, 3, 5)]
    separate = [generate(model, [prompt], 4, **FREE)[0] for prompt in prompts]
    for batch in (2, 32):  # also in several batches
        monkeypatch.setattr(module, "BATCH", batch)
        for one, other in zip(generate(model, prompts, 4, **FREE), separate, strict=True):
            assert agree(model, one.concepts, other.concepts)


def test_prompts_that_stop_leave_the_others_as_they_are(model):
    prompts = [prompt_of(model, length) for length in (3, 8, 5, 2, 5, 1)]
    free = [generation.concepts for generation in generate(model, prompts, 6, **FREE)]
    end = torch.stack(free).flatten(0, 1).mean(0)
    threshold = float(torch.cosine_similarity(torch.cat(free), end, dim=-1).quantile(0.8))
    rules = {"end_of_text": end, "stop_end": threshold, "stop_repeat": None}
    separate = [generate(model, [prompt], 6, **rules)[0] for prompt in prompts]
    assert len({len(generation.concepts) for generation in separate}) > 2, "they have to stop at different times"
    for one, other in zip(generate(model, prompts, 6, **rules), separate, strict=True):
        assert one.reason == other.reason
        assert agree(model, one.concepts, other.concepts)


def test_more_concepts_begin_with_the_fewer(model):
    prompt = prompt_of(model, 3)
    few, many = (generate(model, [prompt], n, **FREE)[0].concepts for n in (3, 8))
    assert torch.equal(many[:3], few)
    assert not torch.allclose(many[3], many[2], atol=1e-4)


def test_it_ends_with_the_first_concept_near_the_end_of_text(model):
    prompt = prompt_of(model, 3)
    free = generate(model, [prompt], 8, **FREE)[0]
    assert free.reason == MAX_CONCEPTS
    # twice as long, for only the direction counts
    end = 2 * free.concepts[4]
    cosines = torch.cosine_similarity(free.concepts, end, dim=-1)
    first = int((cosines > 0.9).nonzero()[0])
    stopped = generate(model, [prompt], 8, end_of_text=end, stop_repeat=None)[0]
    assert stopped.reason == END_OF_TEXT
    assert torch.equal(stopped.concepts, free.concepts[: first + 1])
    assert generate(model, [prompt], 8, end_of_text=end, **FREE)[0].reason == MAX_CONCEPTS


def test_it_ends_with_the_first_concept_like_the_one_before(model):
    prompt = prompt_of(model, 3)
    free = generate(model, [prompt], 8, **FREE)[0].concepts
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
    first = generate(model, [prompt], 1, **FREE)[0].concepts[0]
    cosine = float(torch.cosine_similarity(first, prompt[-1], dim=0))
    stopped = generate(model, [prompt], 8, stop_repeat=cosine - 1e-3)[0]
    assert (stopped.reason, len(stopped.concepts)) == (REPEATS, 1)


def test_prompts_of_half_precision_are_taken(model):
    prompt = prompt_of(model, 3).half()
    half, full = (generate(model, [p], 2, **FREE)[0].concepts for p in (prompt, prompt.float()))
    assert torch.equal(half, full)


@pytest.mark.parametrize(
    ("shape", "max_concepts", "told"),
    [((0, 12), 1, r"not \[0, 12\]"), ((2, 11), 1, r"not \[2, 11\]"), ((12,), 1, r"not \[12\]"), ((2, 12), 0, "not 0")],
)
def test_what_cannot_be_gone_on_from_is_an_error(model, shape, max_concepts, told):
    with pytest.raises(ValueError, match=told):
        generate(model, [torch.zeros(shape)], max_concepts)
