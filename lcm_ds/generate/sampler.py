"""Concept by concept: each prediction, back in raw space, is the next input, until a stop rule holds.

Prompts of any lengths go on together, each as it would alone, to rounding; one that has stopped costs nothing more.
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
BATCH = 32  # prompts at a time


@dataclass(frozen=True)
class Generation:
    """What followed one prompt."""

    concepts: Tensor  # fp32 [m, embed_dim], raw space; the one that a stop rule ended it with is its last
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
    """Go on from each prompt, independently of the others, for at most `max_concepts` concepts.

    prompts: each [n, embed_dim] with n ≥ 1, raw space. end_of_text: [embed_dim], raw space. A generation ends with
    the first concept whose cosine in raw space to `end_of_text` is above `stop_end`, or to the concept before it above
    `stop_repeat` (arXiv 2412.08821, section 2.4.2); None: never for that. The model has to be in evaluation mode.

    Raises ValueError for a prompt of another shape and for max_concepts below 1.
    """
    if max_concepts < 1:
        raise ValueError(f"max_concepts has to be at least 1, not {max_concepts}")
    for prompt in prompts:
        if prompt.ndim != 2 or len(prompt) == 0 or prompt.shape[1] != model.config.embed_dim:
            raise ValueError(f"a prompt has to be [n, {model.config.embed_dim}], n ≥ 1, not {list(prompt.shape)}")
    device = model.normalizer.center.device
    end = None if end_of_text is None else end_of_text.to(device).float()
    # prompts of about the same length together, so that little is padded
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: dict[int, Generation] = {}
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        batch = [prompts[number].to(device).float() for number in some]
        found.update(zip(some, _go_on(model, batch, max_concepts, end, stop_end, stop_repeat), strict=True))
    return [found[number] for number in range(len(prompts))]


def _go_on(
    model: BaseLCM,
    prompts: list[Tensor],
    max_concepts: int,
    end: Tensor | None,
    stop_end: float | None,
    stop_repeat: float | None,
) -> list[Generation]:
    """What follows prompts that are computed together."""
    cache = Cache()
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    last = (torch.arange(len(prompts)), lengths - 1)
    padded = pad_sequence(prompts, batch_first=True)
    predicted = model(padded, cache=cache)[last]
    cache.truncate(lengths)  # what stands behind a shorter prompt is padding
    before = padded[last]
    going = list(range(len(prompts)))  # the prompts that have not stopped; a row of the cache each
    made: list[list[Tensor]] = [[] for _ in prompts]
    reasons = [MAX_CONCEPTS] * len(prompts)
    while True:
        concepts = model.normalizer.denormalize(predicted)
        for prompt, concept in zip(going, concepts, strict=True):
            made[prompt].append(concept)
        rules = ((END_OF_TEXT, _above(concepts, end, stop_end)), (REPEATS, _above(concepts, before, stop_repeat)))
        rows = []  # of those that go on
        for row, prompt in enumerate(going):
            reason = next((reason for reason, held in rules if held[row]), None)
            if reason is None:
                rows.append(row)
            else:
                reasons[prompt] = reason
        if not rows or len(made[going[rows[0]]]) == max_concepts:
            break
        if len(rows) < len(going):
            cache.keep(rows)
            going, concepts = [going[row] for row in rows], concepts[rows]
        predicted = model(concepts.unsqueeze(1), cache=cache)[:, 0]
        before = concepts
    return [Generation(torch.stack(some), reason) for some, reason in zip(made, reasons, strict=True)]


def _above(concepts: Tensor, other: Tensor | None, threshold: float | None) -> list[bool]:
    """Which of `concepts` [rows, embed_dim] a rule stops: those too near to `other`, one for all or one each."""
    if other is None or threshold is None:
        return [False] * len(concepts)
    found: list[bool] = (torch.cosine_similarity(concepts, other, dim=-1) > threshold).tolist()
    return found
