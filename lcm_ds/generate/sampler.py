"""Autoregressive generation: each predicted concept, in raw space, is the next input, until a stop rule applies.

Prompts of different lengths are computed together, each as it would be on its own, to rounding; a prompt that has
stopped costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lcm_ds.model.attention import Cache
from lcm_ds.model.modeling import BaseLCM

END_OF_TEXT, REPEATS, MAX_CONCEPTS = "end of text", "repeats", "max_concepts"
BATCH = 32  # prompts that are computed together


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt."""

    concepts: Tensor  # fp32 [m, embed_dim], raw space; the concept that a stop rule applied to is the last
    reason: str  # END_OF_TEXT, REPEATS or MAX_CONCEPTS


@torch.inference_mode()
def generate(
    model: BaseLCM,
    prompts: Sequence[Tensor],
    max_concepts: int,
    end_of_text: Tensor | None = None,
    stop_end: float | None = 0.9,
    stop_repeat: float | None = 0.9,
) -> list[Generation]:
    """Continue each prompt independently (arXiv 2412.08821, section 2.4.2).

    Args:
        model: in evaluation mode.
        prompts: [n, embed_dim] each, n ≥ 1, raw space.
        max_concepts: to generate for each prompt, at most.
        end_of_text: the end-of-text concept, [embed_dim], raw space.
        stop_end: stop after a concept whose cosine to `end_of_text` is above this; None: do not.
        stop_repeat: stop after a concept whose cosine to the concept before it is above this; None: do not.

    Raises:
        ValueError: for a prompt of another shape, and for max_concepts below 1.
    """
    if max_concepts < 1:
        raise ValueError(f"max_concepts has to be at least 1, not {max_concepts}")
    for prompt in prompts:
        if prompt.ndim != 2 or len(prompt) == 0 or prompt.shape[1] != model.config.embed_dim:
            raise ValueError(f"a prompt has to be [n, {model.config.embed_dim}], n ≥ 1, not {list(prompt.shape)}")
    device = model.normalizer.center.device
    end = None if end_of_text is None else end_of_text.to(device).float()
    # Prompts of similar lengths together, to pad little.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: dict[int, Generation] = {}
    for first in range(0, len(order), BATCH):
        indices = order[first : first + BATCH]
        batch = [prompts[i].to(device).float() for i in indices]
        generated = _generate_batch(model, batch, max_concepts, end, stop_end, stop_repeat)
        results.update(zip(indices, generated, strict=True))
    return [results[i] for i in range(len(prompts))]


def _generate_batch(
    model: BaseLCM,
    prompts: list[Tensor],
    max_concepts: int,
    end: Tensor | None,
    stop_end: float | None,
    stop_repeat: float | None,
) -> list[Generation]:
    """Continue prompts that are computed together."""
    cache = Cache()
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    last = (torch.arange(len(prompts)), lengths - 1)
    padded = pad_sequence(prompts, batch_first=True)
    predicted = model(padded, cache=cache)[last]
    cache.truncate(lengths)  # removes the padding of shorter prompts
    before = padded[last]
    active = list(range(len(prompts)))  # prompts that have not stopped; each has a row of the cache
    generated: list[list[Tensor]] = [[] for _ in prompts]
    reasons = [MAX_CONCEPTS] * len(prompts)
    while True:
        concepts = model.normalizer.denormalize(predicted)
        for prompt, concept in zip(active, concepts, strict=True):
            generated[prompt].append(concept)
        rules = ((END_OF_TEXT, _above(concepts, end, stop_end)), (REPEATS, _above(concepts, before, stop_repeat)))
        rows = []  # that stay active
        for row, prompt in enumerate(active):
            reason = next((reason for reason, stops in rules if stops[row]), None)
            if reason is None:
                rows.append(row)
            else:
                reasons[prompt] = reason
        if not rows or len(generated[active[rows[0]]]) == max_concepts:
            break
        if len(rows) < len(active):
            cache.keep(rows)
            active, concepts = [active[row] for row in rows], concepts[rows]
        predicted = model(concepts.unsqueeze(1), cache=cache)[:, 0]
        before = concepts
    return [Generation(torch.stack(each), reason) for each, reason in zip(generated, reasons, strict=True)]


def _above(concepts: Tensor, other: Tensor | None, threshold: float | None) -> list[bool]:
    """Whether the cosine of each concept, [rows, embed_dim], to `other` (one, or one each) is above the threshold."""
    if other is None or threshold is None:
        return [False] * len(concepts)
    above: list[bool] = (torch.cosine_similarity(concepts, other, dim=-1) > threshold).tolist()
    return above
