"""Floating point operations of a training step, by formula: what a perfect implementation would have to compute.

A matrix that is multiplied with a token costs 2 operations an element and token. A step of one sample costs::

    forward   2 (I V + E S + D L) + 4 w (n_e S S + n_d (L L + L S))
    backward  2 (I' V + E' S + D' L) + 8 w (n_e S S + n_d (L L + L S))

with ``V`` visual, ``S`` encoder and ``L`` target tokens; ``I``, ``E``, ``D`` the elements of all matrices that are
multiplied with those tokens (keys and values of the cross-attention read encoder tokens, the vocabulary is read for
target tokens); ``w`` the attention's width (heads times head size) and ``n`` the layers. Attention is two matrix
products forward (scores, weighted values) and four backward.

The backward pass costs a matrix once for the gradient of its input and once for its own. So with a frozen backbone
``E' = E (passed) + trained``: activations' gradients everywhere above the lowest trained parameter, weights' gradients
only where something is trained. A fully trained model has ``E' = 2 E``, the usual factor of 3 in all.

Assumptions: element-wise operations, norms, softmax and the optimiser are free; padding counts, it is computed; the
causal half of the decoder's attention counts, too, as do all other matrices that a kernel might skip. Nothing is
recomputed (gradient checkpointing does not make a run look better). Units are the matrices that they hold: of those
that make their weights (Compacter, HyperFormer) the multiplication itself is not counted, and of units with a part for
each task all parts are. A decoder's prompt is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlpet_lightning.model import VLModel


@dataclass
class Matrices:
    """Elements of the matrices that one kind of token is multiplied with.

    Args:
        total: Of all of them.
        trained: Of those that are trained.
        passed: Of those whose input needs a gradient.
    """

    total: int = 0
    trained: int = 0
    passed: int = 0

    def add(self, module: nn.Module, passed: bool) -> None:
        """Count those that a module holds itself; a token embedding is looked up, not multiplied with."""
        for parameter in () if isinstance(module, nn.Embedding) else module.parameters(recurse=False):
            if parameter.dim() > 1:
                self.total += parameter.numel()
                self.trained += parameter.numel() * parameter.requires_grad
                self.passed += parameter.numel() * passed

    @property
    def operations(self) -> int:
        """Of a step, for one token."""
        return 2 * (self.total + self.trained + self.passed)


@dataclass
class Sizes:
    """What the formula needs to know of a model.

    Args:
        images: Matrices that visual tokens are multiplied with before they enter the encoder.
        source: The same of encoder tokens.
        target: The same of decoder tokens.
        width: Heads times head size.
        encoder_layers: ``n_e``.
        decoder_layers: ``n_d``.
    """

    width: int
    encoder_layers: int
    decoder_layers: int
    images: Matrices = field(default_factory=Matrices)
    source: Matrices = field(default_factory=Matrices)
    target: Matrices = field(default_factory=Matrices)


def training_flops(sizes: Sizes, *, images: int, source: int, target: int) -> int:
    """Operations of the forward and backward pass of one sample.

    Args:
        sizes: Of the model.
        images: ``V``, visual tokens.
        source: ``S``, encoder tokens: text, visual, prompt, padding.
        target: ``L``, target tokens and padding.

    >>> training_flops(Sizes(8, 1, 1, source=Matrices(100, 100, 100)), images=0, source=2, target=0)
    1584
    """
    linear = sizes.images.operations * images + sizes.source.operations * source + sizes.target.operations * target
    encoder = 4 * sizes.width * sizes.encoder_layers * source * source
    decoder = 4 * sizes.width * sizes.decoder_layers * target * (target + source)
    return linear + encoder * (3 if sizes.source.passed else 1) + decoder * (3 if sizes.target.passed else 1)


def _trains(module: nn.Module, *, recurse: bool = False) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=recurse))


def sizes_of(model: VLModel) -> Sizes:
    """Measure a model; works on the meta device."""
    backbone, lm = model.backbone, model.lm
    sites: dict[str, Any] = dict(backbone.sites)
    layers = backbone.layers(lm)
    query: Any = layers["encoder"][0].get_submodule(sites["encoder.attn.query"].leaves)
    sizes = Sizes(query.out_features, len(layers["encoder"]), len(layers["decoder"]))
    for part in model.visual.feature.modules():
        sizes.images.add(part, passed=False)  # features need no gradient
    memory = [f".{sites[f'decoder.cross.{kind}'].leaves}." for kind in ("key", "value")]
    decoder = f"{backbone.stack_path('decoder')}."
    words = backbone.token_embedding(lm).requires_grad
    encoder_live = live = words or _trains(model.visual, recurse=True) or _trains(model.prompts, recurse=True)
    in_decoder = False
    for name, part in lm.named_modules():  # in the order in which they act
        if f"{name}." == decoder:
            encoder_live, live, in_decoder = live, words, True
        reads_memory = in_decoder and any(leaf in f"{name}." for leaf in memory)
        live = live or (reads_memory and encoder_live)
        (sizes.source if reads_memory or not in_decoder else sizes.target).add(part, passed=live)
        live = live or _trains(part)  # what comes behind a trained parameter hands a gradient down to it
    return sizes
