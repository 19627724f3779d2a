"""Full-size models with random weights for benchmarks: this library's, and the plain way to train the same method.

The plain way is a stock Hugging Face model, the units as ordinary modules on forward hooks, eager execution,
``torch.optim.AdamW``, text padded to the longest of a random batch, and the logits and loss of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from data_modules.batches.length_buckets import LengthBuckets, sort_key
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.batch import IGNORED, Batch
from vlpet_lightning.model import VLModel
from vlpet_lightning.optim import HFAdamW, decay_groups, spared_by_the_original
from vlpet_lightning.pet import Context, Place
from vlpet_lightning.pet.placement import Placement, Site
from vlpet_lightning.pet.serialization import placements_from_plain

KINDS = ("bart", "t5")
SIZES = {"bart": "facebook/bart-base", "t5": "t5-base"}
METHODS = {
    "VL-PET-large": "vlpet_large",
    "VL-PET-small": "vlpet_small",
    "VL-Adapter": "vl_adapter",
    "LoRA": "lora",
    "Compacter": "compacter",
    "HyperFormer": "hyperformer",
}
FULL, LST = "full fine-tuning", "LST"
OVERLAYS = METHODS | {LST: "lst"}  # the plain loop has no side networks
IMAGE_TOKENS, FEATURE_DIM = 36, 2048
CLIP = 5.0  # gradient clipping of the recipe
TINY: dict[str, int] = {
    **dict.fromkeys(("d_model",), 64),
    **dict.fromkeys(("d_kv",), 16),
    **dict.fromkeys(("d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4),
    "vocab_size": 1000,
}
EXPERIMENTS = Path(__file__).parents[2] / "experiments/pet"


def recipe(kind: str, method: str) -> tuple[list[Placement], list[str]]:
    """Return the placements and rules of a method, as its experiment file has them."""
    if method == FULL:
        return [], ["all"]
    path = EXPERIMENTS / f"{OVERLAYS[method]}{'_t5' if kind == 't5' else ''}.yaml"
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]
    return placements_from_plain(settings["placements"], source=path.name), list(settings["trainable"])


def config_of(kind: str, tiny: bool, changes: dict[str, float] | None = None) -> Any:
    """Return a backbone's configuration with the benchmark's vocabulary."""
    backbone = BACKBONES[kind]
    config = backbone.config(SIZES[kind])
    config.vocab_size += backbone.added_vocabulary
    for name in backbone.dropouts:
        setattr(config, name, 0.1)
    for name, value in ((TINY if tiny else {}) | (changes or {})).items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def our_model(kind: str, method: str, *, tiny: bool = False, changes: dict[str, float] | None = None) -> VLModel:
    """Build this library's model with random weights."""
    backbone = BACKBONES[kind]
    placements, rules = recipe(kind, method)
    torch.manual_seed(0)
    return VLModel(
        backbone,
        backbone.build(config_of(kind, tiny, changes)),
        placements=placements,
        trainable=rules,
        added_vocabulary=backbone.added_vocabulary,
        grid=None,
    ).train()


class PlainModel(nn.Module):
    """The same method on a stock Hugging Face model, written without this library's model.

    Args:
        kind: ``bart`` or ``t5``.
        method: Key of :data:`METHODS`, or :data:`FULL`.
        tiny: Use the sizes of :data:`TINY`.
        trained: Names of the language model's parameters to train, in addition to units and visual embedding.
    """

    def __init__(self, kind: str, method: str, *, tiny: bool, trained: Sequence[str]) -> None:
        super().__init__()
        backbone = BACKBONES[kind]
        torch.manual_seed(0)
        self.lm: Any = backbone.build(config_of(kind, tiny))
        self.visual = backbone.visual_embedding(self.lm, FEATURE_DIM, None)
        self.units = nn.ModuleList()
        self._entered: dict[int, Tensor] = {}
        for name, parameter in self.lm.named_parameters():
            parameter.requires_grad_(name in trained)
        shared = nn.ModuleDict()
        for placement in recipe(kind, method)[0]:
            for name in placement.at:
                site = backbone.sites[name]
                assert isinstance(site, Site)
                layers = backbone.layers(self.lm)[site.stack]
                for index, layer in enumerate(layers):
                    self._hang(layer, site, placement, Place(name, site.stack, index, len(layers)), shared)
        self.shared = shared
        for module in self.modules():
            if getattr(module, "needs_context", False):
                module.context = Context("vqa")  # type: ignore[assignment]

    def _hang(self, layer: nn.Module, site: Site, placement: Placement, place: Place, shared: nn.ModuleDict) -> None:
        enters, leaves = layer.get_submodule(site.enters), layer.get_submodule(site.leaves)
        unit: Any = placement.unit(leaves.weight.shape[0])  # type: ignore[union-attr, arg-type, index]
        unit.join(place, shared)
        self.units.append(unit)
        key = id(leaves)

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._entered[key] = args[0]

        def leave(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return unit(self._entered.pop(key), output)

        enters.register_forward_pre_hook(enter)
        leaves.register_forward_hook(leave)

    def loss(self, batch: Batch) -> Tensor:
        embedding = self.lm.get_input_embeddings()
        visual = self.visual(batch.features, None, embedding.weight)
        inputs = torch.cat([embedding(batch.input_ids), visual], dim=1)
        text = batch.input_ids != self.lm.config.pad_token_id
        mask = torch.cat([text, text.new_ones(visual.shape[:2])], dim=1)
        return self.lm(inputs_embeds=inputs, attention_mask=mask, labels=batch.labels, use_cache=False).loss


def plain_model(kind: str, method: str, *, tiny: bool = False, peft: bool = False) -> PlainModel:
    """Build the plain counterpart of :func:`our_model`.

    Args:
        kind: ``bart`` or ``t5``.
        method: Key of :data:`METHODS`, or :data:`FULL`.
        tiny: Use the sizes of :data:`TINY`.
        peft: LoRA by Hugging Face peft on the same layers.

    Raises:
        ImportError: If peft is requested but not installed.
    """
    with torch.device("meta"):
        ours = our_model(kind, method, tiny=tiny)
    units = ours.unit_parameters()
    trained = [name[3:] for name, p in ours.named_parameters() if p.requires_grad and name not in units]
    model = PlainModel(kind, FULL if peft else method, tiny=tiny, trained=trained)
    if peft:
        from peft import LoraConfig, inject_adapter_in_model

        targets = r".*(q_proj|v_proj|\.q|\.v)" if kind == "t5" else r".*(self_attn|encoder_attn)\.(q_proj|v_proj)"
        rank, alpha = 128, 32  # experiments/pet/lora.yaml
        lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.1, target_modules=targets)
        inject_adapter_in_model(lora, model.lm)
        for name, parameter in model.lm.named_parameters():
            parameter.requires_grad_("lora_" in name or name.replace(".base_layer.", ".") in trained)
    return model.train()


def our_optimizer(model: VLModel) -> torch.optim.Optimizer:
    """Return the recipe's optimiser for the trained parameters."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return HFAdamW(decay_groups(named, lambda name, _: spared_by_the_original(name), 0.01), lr=1e-4)


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's AdamW for the trained parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def training_pass(
    loss_of: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    bf16: bool = False,
) -> Callable[[], None]:
    """Return the work of one training step per batch: forward, backward, clipping, optimiser."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    autocast: Any = partial(torch.autocast, device, torch.bfloat16) if bf16 else nullcontext

    def work() -> None:
        for batch in batches:
            with autocast():
                loss = loss_of(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return work


# batches -------------------------------------------------------------------------------------------------------------


def question_lengths(count: int, generator: torch.Generator) -> Tensor:
    """Draw ``(count,)`` text lengths like VQA's: 4 to 20 tokens, log-normal around 10 (special tokens included)."""
    drawn = torch.exp(2.3 + 0.3 * torch.randn(count, generator=generator))
    return drawn.round().long().clamp(4, 20)


def caption_lengths(count: int, generator: torch.Generator) -> Tensor:
    """Draw ``(count,)`` target lengths like COCO's captions: 9 to 20 tokens, most of them near 13."""
    drawn = 13 + 2.2 * torch.randn(count, generator=generator)
    return drawn.round().long().clamp(9, 20)


@dataclass(frozen=True)
class Pool:
    """Random samples, divided into batches.

    Args:
        texts: ``(n,)`` text lengths.
        targets: ``(n,)`` target lengths.
        ids: ``(n, T)`` tokens of the texts, padded.
        labels: ``(n, L)`` tokens of the targets, padded.
        rows: Samples of each batch.
        generator: Source of the features.
    """

    texts: Tensor
    targets: Tensor
    ids: Tensor
    labels: Tensor
    rows: Sequence[Tensor]
    generator: torch.Generator

    def padded(self) -> list[tuple[int, int]]:
        """Return the longest text and the longest target of each batch."""
        return [(int(self.texts[rows].max()), int(self.targets[rows].max())) for rows in self.rows]

    def spread(self, count: int) -> list[int]:
        """Choose batches that represent all of them.

        They are evenly spaced in the order of padded length. Of the possible choices, the one is taken whose mean
        length is closest to that of all batches.

        Args:
            count: Number of batches to choose.

        Returns:
            Their numbers, from short to long.
        """
        lengths = torch.tensor([float(sum(pair)) for pair in self.padded()])
        order, step = lengths.argsort(stable=True), len(lengths) // count
        choices = [order[first::step][:count] for first in range(step)]
        return min(choices, key=lambda chosen: abs(float(lengths[chosen].mean() - lengths.mean()))).tolist()

    def batches(
        self, chosen: Sequence[int] | None = None, *, images: int = IMAGE_TOKENS, device: str = "cpu"
    ) -> list[Batch]:
        """Make batches, with new random features.

        Args:
            chosen: Numbers of the batches; all if None.
            images: Image tokens per sample.
            device: Where to put the batches.
        """
        padded = self.padded()
        found = []
        for number in range(len(self.rows)) if chosen is None else chosen:
            rows, (text, target) = self.rows[number], padded[number]
            batch = Batch(
                task="vqa",
                input_ids=self.ids[rows, :text],
                features=torch.rand(len(rows), images, FEATURE_DIM, generator=self.generator),
                labels=self.labels[rows, :target],
                weights=torch.ones(len(rows)),
            )
            found.append(batch.to(device))
        return found


def draw_pool(
    kind: str,
    sizes: Sequence[int],
    *,
    text: int | str = 20,
    target: int | str = 5,
    sort: bool = False,
    vocabulary: int = 1000,
    seed: int = 1,
) -> Pool:
    """Draw random samples, which do not depend on ``sort``.

    Args:
        kind: Determines the padding token.
        sizes: Samples of each batch.
        text: Text length, or ``vqa`` for :func:`question_lengths`.
        target: Target length, or ``caption`` for :func:`caption_lengths`.
        sort: Divide the samples into batches of similar length, as ``length_buckets`` does with this number of batches,
            which must have one size.
        vocabulary: Number of different tokens.
        seed: Seed of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    texts = question_lengths(count, generator) if text == "vqa" else torch.full((count,), int(text))
    targets = caption_lengths(count, generator) if target == "caption" else torch.full((count,), int(target))
    ids = torch.randint(5, vocabulary, (count, int(texts.max())), generator=generator)
    labels = torch.randint(5, vocabulary, (count, int(targets.max())), generator=generator)
    pad = {"bart": 1, "t5": 0}[kind]
    ids = ids.where(torch.arange(ids.shape[1]) < texts.unsqueeze(1), pad)
    labels = labels.where(torch.arange(labels.shape[1]) < targets.unsqueeze(1), IGNORED)
    order = np.arange(count)
    if sort:
        buckets = LengthBuckets(sort_key(texts.numpy(), targets.numpy()), len(sizes))
        order = buckets.arranged(order, sizes[0], seed)
    return Pool(texts, targets, ids, labels, torch.from_numpy(order).split(list(sizes)), generator)


def make_batches(
    kind: str, sizes: Sequence[int], *, images: int = IMAGE_TOKENS, device: str = "cpu", **samples: Any
) -> list[Batch]:
    """Make batches of random samples.

    Args:
        kind: Determines the padding token.
        sizes: Samples of each batch.
        images: Image tokens per sample.
        device: Where to put the batches.
        **samples: Other arguments of :func:`draw_pool`.
    """
    return draw_pool(kind, sizes, **samples).batches(images=images, device=device)
