"""Collect statistics of a model's gates over batches, with a few samples for overlays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlpet_lightning.answers import choice_tokens
from vlpet_lightning.batch import IGNORED, Batch
from vlpet_lightning.compilation import uncompiled
from vlpet_lightning.gates.recording import Gates, Recorded, check_gated, empty_record, recording
from vlpet_lightning.gates.statistics import Moments, PositionMeans, Variation, limits, merged
from vlpet_lightning.model import VLModel
from vlpet_lightning.tasks import task

ALL = "all"  # every real position
Place = tuple[str, str, int]  # task, site, layer


@dataclass(eq=False)
class Example:
    """A sample whose image maps are kept.

    Args:
        rank: Its place in a fixed random order of all ids.
        id: Question id.
        text: Question without the prompt.
        images: Image ids.
        maps: ``(V,)`` means over the channels by site and layer; NaN at masked positions.
    """

    rank: str
    id: str
    text: str
    images: tuple[str, ...]
    maps: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)


class Collector:
    """Statistics of all gates of a model by task, site, layer and kind of token.

    A gate with one factor per sample has no kinds, and neither has one that does not depend on the input: they are
    counted under ``all`` alone, the latter once. For all other gates ``all`` is every real position.

    Args:
        model: Model in evaluation mode.
        tokenizer: Its tokenizer.
        examples: Number of samples per task whose image maps are kept. They are chosen by a hash of their ids, so that
            two models keep the same ones.

    Raises:
        ValueError: If the model has no gates.
    """

    def __init__(self, model: VLModel, tokenizer: Any, examples: int = 4) -> None:
        self.model, self.tokenizer, self.most_examples = model, tokenizer, examples
        self.sources = check_gated(model)
        self.samples: dict[str, int] = {}
        self.moments: dict[tuple[str, str, int, str], Moments] = {}
        self.variation: dict[Place, Variation] = {}
        self.positions: dict[Place, PositionMeans] = {}
        self.examples: dict[str, list[Example]] = {}
        self.axes: dict[Place, tuple[str, ...]] = {}
        self.gates: dict[str, str] = {}  # name of the gate's class by site
        self._rows: dict[int, Example] = {}  # of the current batch

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the model on a batch and add its factors.

        Gates of the decoder see the batch's labels if it has any, else the model's own answers.
        """
        decoder = any(source.site.startswith("decoder.") for source in self.sources)
        batch = with_own_answers(self.model, self.tokenizer, batch) if decoder else batch
        record = empty_record(self.model, batch)
        self._choose(batch)
        with uncompiled(self.model.layers()), recording(self.sources, lambda found: self._take(record, found)):
            if decoder:
                self.model(batch)
            else:
                self.model.encode(batch)
        self.samples[batch.task] = self.samples.get(batch.task, 0) + len(batch)

    def _choose(self, batch: Batch) -> None:
        """Decide which samples of the batch are kept as examples, so far."""
        kept = self.examples.setdefault(batch.task, [])
        found = []
        for row, id in enumerate(batch.ids):
            rank = hashlib.sha256(f"{batch.task} {id}".encode()).hexdigest()
            text = batch.texts[row] if batch.texts else ""
            found.append((row, Example(rank, id, text, batch.images[row] if batch.images else ())))
        best = sorted([*kept, *(example for _, example in found)], key=lambda example: example.rank)
        best = best[: self.most_examples]
        self.examples[batch.task] = best
        self._rows = {row: example for row, example in found if any(example is some for some in best)}

    def _take(self, record: Gates, recorded: Recorded) -> None:
        source, factors, positions = recorded
        place = record.task, source.site, source.layer
        kinds = record.kinds_of(source, positions)
        axes = source.axes(factors, kinds["padding"].shape[1])
        if "token" not in axes and "sample" not in axes and place in self.axes:
            return  # the same for every input
        self.axes[place], self.gates[source.site] = axes, type(source.gate).__name__
        bounds = limits(source.gate)
        if "token" not in axes:
            self._moments(place, ALL, bounds).add(factors)
        else:
            for kind, mask in kinds.items():
                self._moments(place, kind, bounds).add(factors.expand(*mask.shape, -1)[mask])
        if "sample" in axes:
            self.variation.setdefault(place, Variation()).add(factors, ~kinds["padding"])
        if source.stack != "decoder" and "token" in axes:
            self._take_images(place, record, factors, kinds["image"], record.images_among(positions))

    def _moments(self, place: Place, kind: str, bounds: tuple[float, float] | None) -> Moments:
        return self.moments.setdefault((*place, kind), Moments(bounds))

    def _take_images(self, place: Place, record: Gates, factors: Tensor, of_images: Tensor, places: Tensor) -> None:
        means, real = factors.float().mean(dim=-1)[:, places], of_images[:, places]
        self.positions.setdefault(place, PositionMeans(record.images)).add(means, real)
        for row, example in self._rows.items():
            values = means[row].masked_fill(~real[row], float("nan"))
            example.maps[place[1:]] = values.cpu().numpy()

    def cells(self) -> dict[tuple[str, str, int, str], Moments]:
        """Return the statistics by task, site, layer and kind: ``all`` first, kinds without positions left out."""
        found: dict[tuple[str, str, int, str], Moments] = {}
        for place, axes in self.axes.items():
            own = {kind: some for (*at, kind), some in self.moments.items() if tuple(at) == place and some.count}
            if "token" in axes:
                found[(*place, ALL)] = merged(some for kind, some in own.items() if kind != "padding")
            found |= {(*place, kind): some for kind, some in own.items()}
        return found


@torch.no_grad()
def with_own_answers(model: VLModel, tokenizer: Any, batch: Batch) -> Batch:
    """Return a batch whose labels are the model's answers; a batch with labels is returned as it is."""
    if batch.labels is not None:
        return batch
    spec = task(batch.task)
    if spec.generation is None:
        choices = choice_tokens(tokenizer)
        answer = torch.tensor(choices, device=batch.input_ids.device)[model.choose(batch, choices)]
        prefix = torch.tensor(
            model.backbone.answer_prefix(model.lm.config)[1:], device=answer.device, dtype=answer.dtype
        )
        return replace(batch, labels=torch.cat([prefix.expand(len(batch), -1), answer[:, None]], dim=1))
    ids = model.generate(batch, num_beams=spec.generation.num_beams, max_length=spec.generation.max_length)[:, 1:]
    end = ids == model.end_token
    ended = end.cumsum(dim=1)
    real = (ended == 0) | ((ended == 1) & end)
    return replace(batch, labels=ids.masked_fill(~real, IGNORED))
