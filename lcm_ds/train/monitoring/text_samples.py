"""What a model predicts, in words: sentences of the validation dataset that are nearest to its predictions.

Promises: the same prompts at every validation of a run; nothing but the dataset's own sentences is needed, no decoder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from lcm_ds.data.format import Dataset
from lcm_ds.data.loader import Batch
from lcm_ds.data.shard import open_shard
from lcm_ds.errors import InputError
from lcm_ds.train.step import Stepper

logger = logging.getLogger("lcm_ds.train")

CANDIDATES = 4096  # concepts that predictions are compared with: the first ones of the dataset
PROMPT = 8  # concepts of a document that a prompt has, at most
SHOWN = 3  # of its sentences


@dataclass(frozen=True)
class Sample:
    """A prompt, what comes after it, and what was predicted."""

    document: str
    context: list[str]  # the last sentences of the prompt
    truth: str
    nearest: str  # of all candidates, the sentence whose concept has the highest cosine with the prediction; raw space
    cosine: float  # of that one
    cosine_of_truth: float
    rank_of_truth: int  # among the candidates, 1 where no other is nearer


@dataclass(frozen=True)
class _Prompt:
    """The first concepts of a document among the candidates."""

    document: str
    first: int  # its first concept, counted over the candidates
    length: int  # of the prompt; the concept after it is the truth


class Samples:
    """Fixed prompts from a run's validation dataset; rank 0 reads them, all ranks predict."""

    def __init__(self, stepper: Stepper, dataset: Dataset, count: int) -> None:
        """Take `count` prompts of the dataset's first documents, fewer where few have sentences or are long enough."""
        self.stepper = stepper
        longest = min(PROMPT, stepper.job.config.data.row_length - 1, stepper.job.config.data.max_segment - 1)
        self._sentences: list[str] = []
        self._prompts: list[_Prompt] = []
        read = [np.zeros((0, dataset.embed_dim), np.float32)]
        if stepper.env.rank == 0:
            try:
                read += self._read(dataset, longest, count)
            except InputError as error:
                logger.error("no samples: %s", error)
                self._prompts = []
        candidates = torch.from_numpy(np.concatenate(read))
        prompts = [candidates[prompt.first : prompt.first + prompt.length] for prompt in self._prompts]
        self._candidates = normalize(candidates, dim=-1) if prompts else candidates[:0]
        shared = [prompts]
        dist.broadcast_object_list(shared, 0)  # so that all ranks predict as often
        self._inputs = shared[0]

    @torch.no_grad()
    def predict(self) -> list[Sample]:
        """What the model predicts now, on rank 0; nothing on the others. All ranks call this."""
        self.stepper.engine.eval()
        rows = self.stepper.job.config.batch.micro_batch_rows
        predicted = []
        for first in range(0, len(self._inputs), rows):
            batch = self._batch(self._inputs[first : first + rows])
            predictions, _, _ = self.stepper.predict(batch, self.stepper.layout(batch))
            predicted.append(self.stepper.engine.module.normalizer.denormalize(predictions.float()).cpu())
        if not self._prompts:
            return []
        every = torch.cat(predicted)
        return [self._sample(prompt, every[row, prompt.length - 1]) for row, prompt in enumerate(self._prompts)]

    def _read(self, dataset: Dataset, longest: int, count: int) -> list[np.ndarray]:
        """Concepts of the first documents that have sentences, in fp32, CANDIDATES at most."""
        read: list[np.ndarray] = []
        for index in range(len(dataset.shards)):
            shard = open_shard(dataset, index)
            for document in range(len(shard)):
                if len(self._sentences) + int(shard.lengths[document]) > CANDIDATES and self._prompts:
                    return read
                meta = shard.meta(document)
                sentences = [str(sentence) for sentence in meta["sentences"]][:CANDIDATES]
                if not sentences:
                    continue
                length = min(longest, len(sentences) - 2)  # the truth is not the end of the text
                if length > 0 and len(self._prompts) < count:
                    self._prompts.append(_Prompt(str(meta["id"]), len(self._sentences), length))
                self._sentences += sentences
                read.append(shard.concepts(document, 0, len(sentences)).astype(np.float32))
        return read

    def _batch(self, inputs: list[Tensor]) -> Batch:
        """Prompts as rows of a batch of the size that the model is used to."""
        config = self.stepper.job.config
        concepts = torch.zeros(config.batch.micro_batch_rows, config.data.row_length, inputs[0].shape[-1])
        segments = torch.full(concepts.shape[:2], -1, dtype=torch.int32)
        for row, prompt in enumerate(inputs):
            concepts[row, : len(prompt)] = prompt
            segments[row, : len(prompt)] = 0
        return Batch(concepts, segments, step=0, index=0, first_lane=0)

    def _sample(self, prompt: _Prompt, prediction: Tensor) -> Sample:
        cosines = self._candidates @ normalize(prediction, dim=-1)
        truth, best = prompt.first + prompt.length, int(cosines.argmax())
        return Sample(
            document=prompt.document,
            context=self._sentences[max(prompt.first, truth - SHOWN) : truth],
            truth=self._sentences[truth],
            nearest=self._sentences[best],
            cosine=cosines[best].item(),
            cosine_of_truth=cosines[truth].item(),
            rank_of_truth=1 + int((cosines > cosines[truth]).sum()),
        )
