"""Model FLOPs of a training step, by formula.

Multiplying a matrix with a token costs 2 operations per element. A step for one sample costs::

    forward   2 (I V + E S + D L) + 4 w (n_e S S + n_d (L L + L S))
    backward  2 (I' V + E' S + D' L) + 8 w (n_e S S + n_d (L L + L S))

with ``V`` visual, ``S`` encoder and ``L`` target tokens. ``I``, ``E`` and ``D`` are the numbers of elements of all
matrices multiplied with those tokens: keys and values of the cross-attention are applied to encoder tokens, and the
vocabulary projection to target tokens. ``w`` is the attention width (heads times head dimension), ``n_e`` and ``n_d``
are the numbers of layers. Attention takes two matrix products in the forward pass (scores, weighted values) and four
in the backward pass.

In the backward pass, a matrix costs its forward cost once for the gradient of its input and once for its own gradient.
With a frozen backbone, ``E' = E (passed) + trained``: activation gradients are needed everywhere above the lowest
trained parameter, weight gradients only for trained matrices. A fully trained model has ``E' = 2 E``, which gives the
usual factor of 3 in total.

Assumptions: element-wise operations, norms, softmax and the optimiser are free. Padding is counted, because it is
computed. The masked half of the decoder's causal attention is counted, too, as is everything else that a kernel might
skip. Recomputation is not counted, so gradient checkpointing does not inflate the result. Units are counted by the
matrices that they hold: for units that generate their weights (Compacter, HyperFormer) the multiplication with the
generated weights is not counted, and for units with one part per task all parts are counted. A decoder prompt is not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlpet_lightning.model import VLModel


@dataclass
class Matrices:
    """Numbers of elements of the matrices that one kind of token is multiplied with.

    Args:
        total: Elements of all matrices.
        trained: Elements of trained matrices.
        passed: Elements of matrices whose input needs a gradient.
    """

    total: int = 0
    trained: int = 0
    passed: int = 0

    def add(self, module: nn.Module, passed: bool) -> None:
        """Count a module's own matrices, except token embeddings, which are look-ups."""
        for parameter in () if isinstance(module, nn.Embedding) else module.parameters(recurse=False):
            if parameter.dim() > 1:
                self.total += parameter.numel()
                self.trained += parameter.numel() * parameter.requires_grad
                self.passed += parameter.numel() * passed

    @property
    def operations(self) -> int:
        """Operations per token in a training step."""
        return 2 * (self.total + self.trained + self.passed)


@dataclass
class Sizes:
    """Model sizes that enter the formula.

    Args:
        width: Number of heads times head dimension, ``w``.
        encoder_layers: ``n_e``.
        decoder_layers: ``n_d``.
        images: Matrices applied to visual tokens before the encoder.
        source: Matrices applied to encoder tokens.
        target: Matrices applied to decoder tokens.
    """

    width: int
    encoder_layers: int
    decoder_layers: int
    images: Matrices = field(default_factory=Matrices)
    source: Matrices = field(default_factory=Matrices)
    target: Matrices = field(default_factory=Matrices)


def training_flops(sizes: Sizes, *, images: int, source: int, target: int) -> int:
    """Return the FLOPs of the forward and backward pass for one sample.

    Args:
        sizes: Model sizes.
        images: ``V``, number of visual tokens.
        source: ``S``, number of encoder tokens, including text, visual, prompt and padding tokens.
        target: ``L``, number of target tokens, including padding.

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
    """Determine the sizes of a model; works on the meta device."""
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
    for name, part in lm.named_modules():  # in execution order
        if f"{name}." == decoder:
            encoder_live, live, in_decoder = live, words, True
        reads_memory = in_decoder and any(leaf in f"{name}." for leaf in memory)
        live = live or (reads_memory and encoder_live)
        (sizes.source if reads_memory or not in_decoder else sizes.target).add(part, passed=live)
        live = live or _trains(part)  # everything after a trained parameter passes gradients back to it
    return sizes
