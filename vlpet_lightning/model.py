"""A frozen encoder-decoder language model that reads image features beside text, with PET units put into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from vlpet_lightning.backbones import Backbone, VisualEmbedding
from vlpet_lightning.batch import IGNORED, Batch
from vlpet_lightning.pet import Context, Injected, Placement, inject
from vlpet_lightning.tasks import task
from vlpet_lightning.trainable import set_trainable


class VLModel(nn.Module):
    """Language model + joint encoder + losses + generation; a plain module without a framework around it.

    Args:
        backbone: What is known about the language model's kind.
        lm: The language model; changed in place (units are put into it, parameters frozen).
        feature_dim: ``D``, width of the image features.
        grid: Side of the grid that features are pooled to; None keeps them all.
        placements: Units and where they go.
        trainable: Rules of :mod:`vlpet_lightning.trainable`.
        added_vocabulary: Rows of the token embedding that the pretrained model did not have.
        mask_padding: Hand units the padding mask (corrected protocol); otherwise they see padding as the original did.
    """

    def __init__(
        self,
        backbone: Backbone,
        lm: Any,
        *,
        feature_dim: int = 2048,
        grid: int | None = 6,
        placements: Sequence[Placement] = (),
        trainable: Sequence[str] = ("visual_embedding",),
        added_vocabulary: int = 0,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.lm = lm
        # generate() fills what it is not told from this: keep the checkpoint's own settings out of it
        lm.generation_config = backbone.generation(lm.config, num_beams=1, max_length=20)
        self.visual: VisualEmbedding = backbone.visual_embedding(lm.config, feature_dim, grid)
        self.mask_padding = mask_padding
        added = added_vocabulary * backbone.token_embedding(lm).shape[1]
        self.backbone_parameters = sum(p.numel() for p in lm.parameters()) - added
        self.injected: list[Injected] = inject(backbone.layers(lm), backbone.sites, placements)
        self._context_readers = [m for m in lm.modules() if getattr(m, "needs_context", False)]
        self.trainable = set_trainable(self, trainable)

    def unit_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the injected units by name."""
        units = {id(p) for place in self.injected for p in place.unit.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) in units}

    def start_as_identity(self) -> None:
        """Re-initialise the units so that the first forward computes the pretrained function."""
        for place in self.injected:
            place.unit.start_as_identity()

    def mask(self, batch: Batch) -> Tensor:
        """``(B, S)`` bool: real text tokens, and every image token."""
        text = batch.input_ids != self.lm.config.pad_token_id if batch.text_mask is None else batch.text_mask
        return torch.cat([text, text.new_ones(len(text), self.visual.tokens(batch.features))], dim=1)

    def encode(self, batch: Batch) -> Tensor:
        """Encoder states ``(B, S, d)`` of ``[text, image tokens]``."""
        mask = self.mask(batch)
        self._hand_context(Context(batch.task, mask if self.mask_padding else None))
        visual = self.visual(batch.features, batch.boxes, self.backbone.token_embedding(self.lm))
        return self.backbone.encode(self.lm, batch.input_ids, visual, mask)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(B, L, vocabulary)`` of the batch's labels under teacher forcing."""
        return self.decode(batch, self.backbone.decoder_inputs(self.lm, self._labels(batch)))

    def decode(self, batch: Batch, decoder_inputs: Tensor) -> Tensor:
        """Logits ``(B, L, vocabulary)`` behind given decoder inputs ``(B, L)``."""
        return self.lm(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encode(batch)),
            attention_mask=self.mask(batch),
            decoder_input_ids=decoder_inputs,
            use_cache=False,
        ).logits

    def loss(self, batch: Batch) -> Tensor:
        """The task's loss over the batch, a scalar."""
        total, count = self.loss_terms(batch)
        return total / count

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss as a sum and what to divide it by, so that ranks can divide by the count of the whole batch.

        A sample without any label counts as absent (a rank's filler).

        Returns:
            ``(total, count)``, scalars: the sum of losses, and the number of samples (token losses: of target tokens).
        """
        labels = self._labels(batch)
        logits = self(batch)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
        losses = losses.view_as(labels)
        real = labels != IGNORED
        kind = task(batch.task).loss
        if kind == "token":
            return losses.sum(), real.sum().clamp(min=1)
        tokens = real.sum(dim=1)
        samples = losses.sum(dim=1) / tokens.clamp(min=1)
        if kind == "weighted_sample" and batch.weights is not None:
            samples = samples * batch.weights
        return samples.sum(), (tokens > 0).sum().clamp(min=1)

    @torch.no_grad()
    def generate(self, batch: Batch, *, num_beams: int, max_length: int) -> Tensor:
        """Decode answers.

        Returns:
            ``(B, at most max_length)`` token ids behind and including the decoder's start token, right-padded.
        """
        return self.lm.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encode(batch)),
            attention_mask=self.mask(batch),
            generation_config=self.backbone.generation(self.lm.config, num_beams, max_length),
        )

    @torch.no_grad()
    def choose(self, batch: Batch, choices: Sequence[int]) -> Tensor:
        """Answer by the first token alone: which of ``choices`` has the largest logit (src/multitask_model.py, NLVR).

        Returns:
            ``(B,)`` indices into ``choices``; ties go to the first.
        """
        prefix = self.backbone.answer_prefix(self.lm.config)
        decoder_inputs = torch.tensor([prefix], device=batch.input_ids.device).expand(len(batch), -1)
        logits = self.decode(batch, decoder_inputs)[:, -1]
        return logits[:, list(choices)].argmax(dim=1)

    def _hand_context(self, context: Context) -> None:
        for module in self._context_readers:
            module.context = context

    @staticmethod
    def _labels(batch: Batch) -> Tensor:
        if batch.labels is None:
            raise ValueError(
                f"a batch of task {batch.task!r} without labels: there is nothing to learn or to compare with"
            )
        return batch.labels
