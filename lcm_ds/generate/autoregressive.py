"""Concept by concept: each prediction, back in raw space, is the next input, until a stop rule holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_ds.model.attention import Cache
from lcm_ds.model.modeling import BaseLCM

END_OF_TEXT, REPEATS, MAX_CONCEPTS = "end of text", "repeats", "max_concepts"


@dataclass(frozen=True)
class Generation:
    """What followed one prompt."""

    concepts: Tensor  # fp32 [m, embed_dim], raw space; the one that a stop rule ended it with is its last
    reason: str  # END_OF_TEXT, REPEATS or MAX_CONCEPTS


@torch.inference_mode()
def generate(
    model: BaseLCM,
    prompts: list[Tensor],
    max_concepts: int,
    end_of_text: Tensor | None = None,
    stop_end: float = 0.9,
    stop_repeat: float = 0.9,
) -> list[Generation]:
    """Go on from each prompt, independently of the others, for at most `max_concepts` concepts.

    prompts: each [n, embed_dim] with n ≥ 1, raw space. end_of_text: [embed_dim], raw space. A generation ends with
    the first concept whose cosine in raw space to `end_of_text` is above `stop_end`, or to the concept before it above
    `stop_repeat` (arXiv 2412.08821, section 2.4.2). The model has to be in evaluation mode.

    Raises ValueError for a prompt of another shape and for max_concepts below 1.
    """
    if max_concepts < 1:
        raise ValueError(f"max_concepts has to be at least 1, not {max_concepts}")
    for prompt in prompts:
        if prompt.ndim != 2 or len(prompt) == 0 or prompt.shape[1] != model.config.embed_dim:
            raise ValueError(f"a prompt has to be [n, {model.config.embed_dim}], n ≥ 1, not {list(prompt.shape)}")
    device = model.normalizer.center.device
    end = None if end_of_text is None else end_of_text.to(device).float()
    return [_go_on(model, prompt.to(device).float(), max_concepts, end, stop_end, stop_repeat) for prompt in prompts]


def _go_on(
    model: BaseLCM, prompt: Tensor, max_concepts: int, end: Tensor | None, stop_end: float, stop_repeat: float
) -> Generation:
    cache = Cache()
    concepts: list[Tensor] = []
    new, before, reason = prompt, prompt[-1], MAX_CONCEPTS
    while len(concepts) < max_concepts:
        predicted = model(new.unsqueeze(0), cache=cache)[0, -1]
        concept = model.normalizer.denormalize(predicted)
        concepts.append(concept)
        if end is not None and _cosine(concept, end) > stop_end:
            reason = END_OF_TEXT
            break
        if _cosine(concept, before) > stop_repeat:
            reason = REPEATS
            break
        new, before = concept.unsqueeze(0), concept
    return Generation(torch.stack(concepts), reason)


def _cosine(one: Tensor, other: Tensor) -> float:
    return torch.cosine_similarity(one, other, dim=0).item()
