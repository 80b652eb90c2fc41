"""Predictions as text: the sentences of the validation dataset that are nearest to them.

The same prompts at every validation of a run; no decoder is needed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.distributed.collectives import from_first
from lcm_ds.errors import InputError
from lcm_ds.train.step import Stepper

logger = logging.getLogger("lcm_ds.train")

CANDIDATES = 4096  # predictions are compared with this many concepts at the start of the dataset
MAX_PROMPT = 8  # concepts
SHOWN = 3  # sentences of a prompt


@dataclass(frozen=True)
class Sample:
    """A prompt, its true continuation, and the prediction."""

    document: str
    context: list[str]  # the last sentences of the prompt
    truth: str
    nearest: str  # the candidate with the highest cosine to the prediction, raw space
    cosine: float
    cosine_of_truth: float
    rank_of_truth: int  # among the candidates, from 1


@dataclass(frozen=True)
class _Prompt:
    """The first concepts of a document among the candidates."""

    document: str
    first: int  # index of its first concept among the candidates
    length: int  # the concept after the prompt is the truth


class Samples:
    """Fixed prompts from a run's validation dataset; rank 0 reads them, all ranks predict."""

    def __init__(self, stepper: Stepper, dataset: Dataset, count: int) -> None:
        """Take up to `count` prompts from the first documents that have sentences and are long enough."""
        self.stepper = stepper
        longest = min(MAX_PROMPT, stepper.job.config.data.row_length - 1, stepper.job.config.data.max_segment - 1)
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
        self._inputs = from_first(prompts)  # all ranks take part in each prediction

    @torch.no_grad()
    def predict(self) -> list[Sample]:
        """The model's current predictions, on rank 0; empty on the others. All ranks call this."""
        self.stepper.engine.eval()
        rows = self.stepper.job.config.batch.micro_batch_rows
        predicted = []
        for first in range(0, len(self._inputs), rows):
            batch = self._batch(self._inputs[first : first + rows])
            predictions, _, _ = self.stepper.predict(self.stepper.prepare(batch))
            predicted.append(self.stepper.engine.module.normalizer.denormalize(predictions.float()).cpu())
        if not self._prompts:
            return []
        predictions = torch.cat(predicted)
        return [self._sample(prompt, predictions[row, prompt.length - 1]) for row, prompt in enumerate(self._prompts)]

    def _read(self, dataset: Dataset, longest: int, count: int) -> list[np.ndarray]:
        """Concepts of the first documents that have sentences, in fp32; CANDIDATES at most."""
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
                length = min(longest, len(sentences) - 2)  # the truth must not be the end of the text
                if length > 0 and len(self._prompts) < count:
                    self._prompts.append(_Prompt(str(meta["id"]), len(self._sentences), length))
                self._sentences += sentences
                read.append(shard.concepts(document, 0, len(sentences)).astype(np.float32))
        return read

    def _batch(self, inputs: list[Tensor]) -> Batch:
        """Prompts as rows of a batch with the shape of training batches."""
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
