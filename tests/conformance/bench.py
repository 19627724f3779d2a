"""Fixtures of the suite: tiny backbones with large random weights, models on them, batches and gradients."""

from __future__ import annotations

import copy
import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BartConfig, MBartConfig, T5Config

from vlpet_lightning import Batch
from vlpet_lightning.backbones import BACKBONES, Backbone
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.model import VLModel
from vlpet_lightning.module import VLT5, VLBart, VLMBart, VLModule
from vlpet_lightning.pet import Placement

WIDTH, INNER, LAYERS, HEADS, POSITIONS, VOCABULARY, BUCKETS = 32, 64, 2, 4, 64, 50, 32
FEATURE_DIM, GRID = 16, 2
DEAD = "visual.box.0.weight"  # boxes of grid features are zero, so its gradient is zero, as in the original

ENGLISH = 4  # stands for the code of a language, with which mBART starts its answers


@dataclass(frozen=True)
class Tiny:
    """A tiny language model.

    Args:
        module: The LightningModule for it.
        config: Returns its configuration, given the number of layers.
        first: First token of texts and answers; None if there is no special one.
        ends: Norms of a stack outside its layers: after the embedding (BART), at the end (T5), or both (mBART).
        biases: Whether linear layers and norms have biases, and positions are learned; T5 has relative positions.
        gated: Whether feed-forward sublayers have a third matrix, and the output layer is not tied.
    """

    module: type[VLModule]
    config: Callable[[int], Any]
    first: int | None = None
    ends: int = 1
    biases: bool = True
    gated: bool = False


def bart_config(layers: int, make: Any = BartConfig, **settings: Any) -> Any:
    """Return the configuration of a tiny BART or mBART."""
    return make(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_position_embeddings=POSITIONS,
        **settings,
    )


def t5_config(layers: int, make: Any = T5Config, **settings: Any) -> Any:
    """Return the configuration of a tiny T5."""
    return make(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=INNER,
        num_layers=layers,
        num_heads=HEADS,
        relative_attention_num_buckets=BUCKETS,
        decoder_start_token_id=0,
        **settings,
    )


MBART = {"make": MBartConfig, "scale_embedding": True, "decoder_start_token_id": 2, "forced_first_token_id": ENGLISH}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TINY: dict[str, Tiny] = {
    "bart": Tiny(VLBart, bart_config, first=0),
    "mbart": Tiny(VLMBart, partial(bart_config, **MBART), first=ENGLISH, ends=2),
    "t5": Tiny(VLT5, t5_config, biases=False),
    "t5-v1_1": Tiny(VLT5, partial(t5_config, **V1_1), biases=False, gated=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tiny backbones, for formulas of parameter counts.

    Args:
        kind: A key of :data:`TINY`.
        width: Hidden dimension ``d``.
        inner: Inner dimension of the feed-forward sublayers.
        layers: Number of layers of the encoder and of the decoder.
    """

    kind: str
    width: int = WIDTH
    inner: int = INNER
    layers: int = LAYERS

    @property
    def tiny(self) -> Tiny:
        return TINY[self.kind]

    @property
    def norm(self) -> int:
        """Parameters of one norm."""
        return self.width * (2 if self.tiny.biases else 1)

    @property
    def encoder_norms(self) -> int:
        """Two per layer, and those at the ends."""
        return (2 * self.layers + self.tiny.ends) * self.norm

    @property
    def decoder_norms(self) -> int:
        """Three per layer, and those at the ends."""
        return (3 * self.layers + self.tiny.ends) * self.norm

    @property
    def biases(self) -> int:
        """Parameters with "bias" in their name; on T5 only the relative position biases."""
        if not self.tiny.biases:
            return 2 * BUCKETS * HEADS
        linear = self.layers * (4 * self.width + 8 * self.width + 2 * (self.inner + self.width))
        return linear + (5 * self.layers + 2 * self.tiny.ends) * self.width

    @property
    def backbone(self) -> int:
        """Parameters of the whole language model."""
        biases, gated = self.tiny.biases, self.tiny.gated
        matrices = self.layers * (12 * self.width**2 + (6 if gated else 4) * self.width * self.inner)
        norms = self.encoder_norms + self.decoder_norms
        shared_with_biases = (5 * self.layers + 2 * self.tiny.ends) * self.width if biases else 0
        positions = 2 * (POSITIONS + 2) * self.width if biases else 0
        tables = (2 if gated else 1) * VOCABULARY * self.width
        return tables + positions + matrices + norms + self.biases - shared_with_biases


@dataclass(frozen=True)
class Case:
    """One row of the table: a method, its placements and its properties.

    Args:
        name: Name of the row.
        placements: Units and their sites.
        parameters: Formula for the number of trained parameters, excluding the visual embedding.
        start: ``identity``: a fresh unit computes the pretrained function; ``original``: only after
            ``start_as_identity``; ``never``: it cannot.
        trainable: Rules that select the trained parameters.
        tasks: Tasks that the method has parts for; if there are several, a step leaves the parts of all but one
            without a gradient.
        mask_padding: Whether units get the padding mask.
        peft: A method of Hugging Face peft beside the placements.
        impossible: Names of behaviours that the method does not have, and why.
    """

    name: str
    placements: Sequence[Placement]
    parameters: Callable[[Sizes], int]
    start: Literal["identity", "original", "never"] = "original"
    trainable: Sequence[str] = ("pet", "visual_embedding")
    tasks: Sequence[str] = ("vqa",)
    mask_padding: bool = False
    peft: Mapping[str, Any] | None = None
    impossible: Mapping[str, str] = field(default_factory=dict)


def backbone_of(kind: str) -> Backbone:
    """Return the backbone of a kind."""
    return BACKBONES[TINY[kind].module.kind]


def config(kind: str, layers: int = LAYERS) -> Any:
    """Return the config of a tiny language model."""
    return TINY[kind].config(layers)


@cache
def stock(kind: str, layers: int = LAYERS) -> Any:
    """Return a stock language model in evaluation mode; copy it before changing it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return backbone_of(kind).build(config(kind, layers)).eval()


def loud(named: Mapping[str, Tensor]) -> None:
    """Draw weights large enough that every token and unit matters; a tensor depends only on its name."""
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def make_model(case: Case, kind: str, lm: Any) -> VLModel:
    """Build a model with fresh units; all models of a kind have the same weights except for the units."""
    # before the units are made: a pretrained model has its weights by then, and some units start from them
    loud({f"lm.{name}": parameter for name, parameter in lm.named_parameters() if parameter.dim() > 1})
    model = VLModel(
        backbone_of(kind),
        lm,
        feature_dim=FEATURE_DIM,
        grid=GRID,
        placements=case.placements,
        trainable=case.trainable,
        mask_padding=case.mask_padding,
        extension=None if case.peft is None else HFPeft(dict(case.peft)),
    )
    units = model.unit_parameters()
    inputs = {name for name, _ in model.named_parameters() if name.startswith("visual.") and name.endswith("bias")}
    rest = {n: p for n, p in model.named_parameters() if n not in units and not n.startswith("lm.")}
    loud({n: p for n, p in rest.items() if p.dim() > 1 or n in inputs})
    return model.eval()


@cache
def bare(kind: str) -> VLModel:
    """The model without units; nobody may change it."""
    nothing = Case("bare", (), lambda sizes: 0, trainable=("visual_embedding",))
    return make_model(nothing, kind, copy.deepcopy(stock(kind)))


def make_batch(kind: str, task: str, size: int = 3, seed: int = 0) -> Batch:
    """Build a batch of random words and features, whose last sample is shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    special = stock(kind).config
    words = torch.randint(5, VOCABULARY, (size, 6), generator=generator)
    labels = torch.randint(5, VOCABULARY, (size, 4), generator=generator)
    words[:, -1] = labels[:, -1] = special.eos_token_id
    words[-1, 3:] = torch.tensor([special.eos_token_id, special.pad_token_id, special.pad_token_id])
    labels[-1, 2:] = torch.tensor([special.eos_token_id, IGNORED])
    if TINY[kind].first is not None:
        words[:, 0] = labels[:, 0] = TINY[kind].first
    images = (2,) if task == "nlvr2" else ()
    return Batch(
        task=task,
        input_ids=words,
        features=torch.randn(size, *images, GRID**2, FEATURE_DIM, generator=generator),
        labels=labels,
        weights=0.5 + torch.rand(size, generator=generator) if task == "vqa" else None,
    )


def gradients(model: VLModel, batch: Batch, loss: Callable[[Batch], Tensor] | None = None) -> dict[str, Tensor]:
    """Return gradients by name, with the same dropout in every call."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        (model.loss if loss is None else loss)(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpoint_layers(lm: Any) -> None:
    """Switch gradient checkpointing on, under its name in the installed transformers."""
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def trained(model: VLModel) -> dict[str, Tensor]:
    """Return the trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Bench:
    """A case on one backbone.

    Args:
        case: Row of the table.
        kind: A key of :data:`TINY`.
    """

    def __init__(self, case: Case, kind: str) -> None:
        self.case = case
        self.kind = kind
        self.sizes = Sizes(kind)

    def fresh(self, seed: int = 0, layers: int = LAYERS) -> VLModel:
        """Build a model with freshly constructed units."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make_model(self.case, self.kind, copy.deepcopy(stock(self.kind, layers)))

    def on_the_meta_device(self) -> VLModel:
        """Build the model on the meta device, as for counting parameters."""
        with torch.device("meta"):
            return make_model(self.case, self.kind, backbone_of(self.kind).build(config(self.kind)))

    def loud(self, layers: int = LAYERS) -> VLModel:
        """Build a model whose units have large weights, as if trained."""
        model = self.fresh(layers=layers)
        loud(model.unit_parameters())
        return model

    @cached_property
    def model(self) -> VLModel:
        """A shared loud model, not to be modified."""
        return self.loud()

    @property
    def bare(self) -> VLModel:
        """The model without units; nobody may change it."""
        return bare(self.kind)

    def batch(self, task: str | None = None, **settings: Any) -> Batch:
        """Build a batch of the case's first task, or of another task."""
        return make_batch(self.kind, task or self.case.tasks[0], **settings)

    @torch.no_grad()
    def logits(self, model: VLModel, batch: Batch | None = None) -> Tensor:
        """Return the logits of a model in evaluation mode."""
        return model.eval()(self.batch() if batch is None else batch)

    @property
    def prompts_the_decoder(self) -> bool:
        """Whether the method's tokens are in the decoder's cache."""
        return "decoder" in self.model.prompts

    @property
    def has_side_network(self) -> bool:
        """Whether a side network computes the states."""
        return self.model.network is not self.model.backbone

    def module(self, model: VLModel) -> VLModule:
        """Build the LightningModule of this case."""
        module: VLModule = TINY[self.kind].module(
            "tiny",
            placements=list(self.case.placements),
            trainable=list(self.case.trainable),
            feature_dim=FEATURE_DIM,
            grid=GRID,
            mask_padding=self.case.mask_padding,
            peft=None if self.case.peft is None else dict(self.case.peft),
        )
        module.model = model
        return module


def through_a_file(value: Any, *, weights_only: bool) -> Any:
    """Return a copy made by ``torch.save`` and ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)
