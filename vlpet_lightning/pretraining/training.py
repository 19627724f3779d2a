"""Training on pairs of texts with Lightning, and scoring on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.backbones.base import plain_search
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.optim import linear_schedule
from vlpet_lightning.pretraining.pairs import Pair, Pairs

WARMUP = 0.05
SCORED = 400  # held-out pairs per kind
GENERATED = ("vqa", "gqa", "nlvr2", "tvqa", "how2qa")  # kinds with one right answer, scored by exact match
MAX_ANSWER = 20

Results = dict[str, dict[str, float]]


class TextModule(LightningModule):
    """Language model trained to generate the target of each source; an encoder-decoder.

    Args:
        lm: The language model.
        lr: Peak learning rate.
    """

    def __init__(self, lm: Any, lr: float) -> None:
        super().__init__()
        self.lm = lm
        self.lr = lr

    def losses(self, sources: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``(B, L)`` token losses, 0 on padding, and whether each target token is the most likely one."""
        decoder_inputs = BACKBONES["bart"].decoder_inputs(self.lm, labels)
        mask = sources != self.lm.config.pad_token_id
        logits = self.lm(
            input_ids=sources, attention_mask=mask, decoder_input_ids=decoder_inputs, use_cache=False
        ).logits
        return token_losses(logits, labels), logits.argmax(dim=-1) == labels

    def answers(self, prompts: Tensor) -> Tensor:
        """Decode ``(B, T)`` answers greedily."""
        settings = BACKBONES["bart"].generation(self.lm.config, num_beams=1, max_length=MAX_ANSWER)
        mask = prompts != int(self.lm.config.pad_token_id)
        return self.lm.generate(input_ids=prompts, attention_mask=mask, generation_config=settings)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the mean loss per target token."""
        losses, _ = self.losses(*batch)
        loss = losses.sum() / (batch[1] != IGNORED).sum()
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(losses))
        return loss

    def configure_optimizers(self) -> Any:
        """Configure AdamW without weight decay, which would shrink embedding rows that no text trains."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0, fused=True)
        schedule = linear_schedule(optimizer, int(self.trainer.max_steps), WARMUP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CausalTextModule(TextModule):
    """Decoder-only vision-and-language model trained on text alone: of the whole model, the decoder."""

    def __init__(self, lm: Any, lr: float) -> None:
        super().__init__(lm, lr)
        lm.requires_grad_(False)
        for part in (lm.model.text_model, lm.lm_head):
            part.requires_grad_(True)

    def losses(self, sources: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # padding on the right: no real position attends to it
        logits = self.lm(input_ids=sources, use_cache=False).logits[:, :-1]
        return token_losses(logits, labels[:, 1:]), logits.argmax(dim=-1) == labels[:, 1:]

    def answers(self, prompts: Tensor) -> Tensor:
        config = self.lm.config.get_text_config()
        settings = plain_search(
            1, prompts.shape[1] + MAX_ANSWER, config.bos_token_id, config.eos_token_id, config.pad_token_id
        )
        mask = prompts != config.pad_token_id
        found = self.lm.generate(input_ids=prompts, attention_mask=mask, generation_config=settings)
        return found[:, prompts.shape[1] :]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the ``(B, L)`` losses of ``(B, L, vocabulary)`` logits, 0 on ignored labels."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels)


def fit(module: TextModule, pairs: Pairs, *, steps: int, batch_size: int, seed: int) -> None:
    """Train for a number of steps, on a GPU if available."""
    batches: Any = pairs.order(batch_size, steps, seed)
    trainer = Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[RichProgressBar(refresh_rate=10)],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=pairs.batch))
    module.cpu()


@torch.no_grad()
def score(
    module: TextModule,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Callable[[Sequence[Pair]], Pairs],
    batch_size: int,
) -> Results:
    """Score the first :data:`SCORED` held-out pairs of each kind.

    Args:
        module: The trained model.
        pairs: Held-out pairs.
        tokenizer: Its tokenizer.
        tokenized: Tokenises pairs as in training.
        batch_size: Number of pairs in a batch.

    Returns:
        ``loss`` and ``token_accuracy`` (percent, teacher forcing) by kind, and ``exact_match`` (percent, greedy
        decoding) for kinds with one right answer.
    """
    module.eval()
    kinds = {kind: [pair for pair in pairs if pair.kind == kind][:SCORED] for kind in sorted({p.kind for p in pairs})}
    results: Results = {}
    for kind in track(kinds, description="scoring held-out text"):
        table = tokenized(kinds[kind])
        loss, right, tokens, matches = 0.0, 0, 0, 0
        for start in range(0, len(table), batch_size):
            rows = range(start, min(start + batch_size, len(table)))
            sources, labels = table.batch(rows)
            losses, hits = module.losses(sources, labels)
            loss, right, tokens = loss + float(losses.sum()), right + int(hits.sum()), tokens + int((labels >= 0).sum())
            if kind in GENERATED:
                said = tokenizer.batch_decode(module.answers(table.prompts(rows)), skip_special_tokens=True)
                wanted = tokenizer.batch_decode([table.targets[row] for row in rows], skip_special_tokens=True)
                matches += sum(map(str.__eq__, said, wanted))
        results[kind] = {"pairs": len(table), "loss": loss / tokens, "token_accuracy": 100 * right / tokens}
        if kind in GENERATED:
            results[kind]["exact_match"] = 100 * matches / len(table)
    return results
