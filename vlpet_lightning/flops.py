"""Model FLOPs of a training step, by formula.

Multiplying a matrix with a token costs 2 operations per element. A step for one sample costs::

    forward   2 (I V + X T + E S + D L) + 4 sum(w n Q K)
    backward  2 (I' V + X' T + E' S + D' L) + 8 sum(w n Q K, where a gradient passes)

with ``V`` visual, ``S`` encoder and ``L`` target tokens, and the ``T = S - V`` encoder tokens of the text. ``I``,
``X``, ``E`` and ``D`` are the numbers of elements of all matrices multiplied with those tokens: keys and values of the
cross-attention are applied to encoder tokens, and the vocabulary projection to target tokens. The sum is over the
attentions: ``w`` is the width (heads times head dimension), ``n`` the number of layers, and ``Q`` and ``K`` are the
numbers of tokens that attend and are attended to, which are ``S`` and ``S`` in the encoder, ``L`` and ``L`` as well as
``L`` and ``S`` in the decoder. Attention takes two matrix products in the forward pass (scores, weighted values) and
four in the backward pass.

``X`` is 0 unless the model has a side network, whose backbone reads text alone: it counts the matrices of that
backbone's encoder, the keys and values of its cross-attention, and the projections of its layers' outputs, and its
attentions are over ``T`` instead of ``S`` tokens. Matrices and attentions of both networks add up. Each network says
which tokens its matrices multiply (:mod:`vlpet_lightning.pet.operations`).

In the backward pass, a matrix costs its forward cost once for the gradient of its input and once for its own gradient.
With a frozen backbone, ``E' = E (passed) + trained``: activation gradients are needed everywhere above the lowest
trained parameter, weight gradients only for trained matrices. A fully trained model has ``E' = 2 E``, which gives the
usual factor of 3 in total. A vision tower that runs adds its own matrices, times the ``F`` vectors of each image, and
the attentions of its layers within images; like other frozen layers, it costs no backward pass below its lowest trained
parameter. No gradient passes through the backbone beside a side network, except through the vocabulary projection,
whose input is the side network's output.

Assumptions: element-wise operations, norms, softmax and the optimiser are free. Padding is counted, because it is
computed. The masked half of the decoder's causal attention is counted, too, as is everything else that a kernel might
skip. Recomputation is not counted, so gradient checkpointing does not inflate the result. Units are counted by the
matrices that they hold: for units that generate their weights (Compacter, HyperFormer) the multiplication with the
generated weights is not counted, and for units with one part per task all parts are counted. A prompt in the cache of
an encoder-decoder's decoder is not counted. Units of a decoder-only model that are limited to the positions before the
answer, or to image tokens, are multiplied with ``S`` or ``V`` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from vlpet_lightning.model import VLModel
from vlpet_lightning.pet.operations import Applied, Attention, AttentionInImage, Operations, Tokens


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
        matrices: Matrices by the kind of tokens that they are applied to.
        attentions: All attentions, each with whether a gradient passes through it.
        vectors: Vectors that a vision tower computes for an image; 0 if none runs.
        per_image: Image tokens of an image, if a vision tower runs.
    """

    matrices: Mapping[Tokens, Matrices] = field(default_factory=dict)
    attentions: list[tuple[Attention | AttentionInImage, bool]] = field(default_factory=list)
    vectors: int = 0
    per_image: int = 1


def training_flops(sizes: Sizes, *, images: int, source: int, target: int) -> int:
    """Return the FLOPs of the forward and backward pass for one sample.

    Args:
        sizes: Model sizes.
        images: ``V``, number of visual tokens.
        source: ``S``, number of encoder tokens, including text, visual, prompt and padding tokens.
        target: ``L``, number of target tokens, including padding.

    >>> encoder = Attention(width=8, layers=1, queries="source", keys="source", reads="encoder")
    >>> sizes = Sizes({"source": Matrices(100, 100, 100)}, [(encoder, True)])
    >>> training_flops(sizes, images=0, source=2, target=0)
    1584
    """
    pictures = images // sizes.per_image
    lengths: dict[Tokens, int] = {
        "patches": pictures * sizes.vectors,
        "images": images,
        "text": source - images,
        "source": source,
        "target": target,
    }
    linear = sum(matrices.operations * lengths[tokens] for tokens, matrices in sizes.matrices.items())
    attention = 0
    for one, passed in sizes.attentions:
        if isinstance(one, AttentionInImage):
            work = pictures * one.work
        else:
            work = one.width * one.layers * lengths[one.queries] * lengths[one.keys]
        attention += 4 * work * (3 if passed else 1)
    return linear + attention


def tower_flops(model: VLModel) -> int:
    """Return the FLOPs of the model's vision tower for one image, which stored features save in every step.

    These are the forward pass of a frozen tower: ``2 P F + 4 sum(w Q K)`` with the ``P`` elements of its matrices, the
    ``F`` vectors of an image, and the attentions of its layers, in the tower's windows.

    Args:
        model: The model; also on the meta device.
    """
    matrices = Matrices()
    for part in model.backbone.tower_parts(model.lm):
        for module in part.modules():
            matrices.add(module, passed=False)
    if not matrices.total:
        return 0
    vectors = model.backbone.tower_vectors(model.lm.config)
    return 2 * matrices.total * vectors + 4 * sum(model.backbone.tower_attentions(model.lm.config))


def _trains(module: nn.Module, *, recurse: bool = False) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=recurse))


def _operations(model: VLModel) -> Operations:
    """Yield the operations of the model in the order of execution."""
    yield from model.backbone.visual_operations(model.lm, model.visual)
    states = "features"
    for operation in model.network.operations(model.lm):
        states = operation.writes if isinstance(operation, Applied) else operation.reads
        yield operation
    for part in model.backbone.vocabulary_projection(model.lm)[0].modules():
        yield Applied(part, "target", (states,), states)


def sizes_of(model: VLModel) -> Sizes:
    """Determine the sizes of a model; works on the meta device."""
    matrices: dict[Tokens, Matrices] = {tokens: Matrices() for tokens in get_args(Tokens)}
    attentions = []
    visual = model.backbone.visual_parameters(model.lm, model.visual)
    tower = model.backbone.tower_parts(model.lm)
    live = {  # names of the activations that need a gradient
        name
        for name, trained in (
            ("words", model.backbone.token_embedding(model.lm).requires_grad),
            ("images", any(p.requires_grad for p in visual.values()) or any(_trains(p, recurse=True) for p in tower)),
            ("prompt", _trains(model.prompts, recurse=True)),
        )
        if trained
    }
    for operation in _operations(model):
        if not isinstance(operation, Applied):
            attentions.append((operation, operation.reads in live))
            continue
        passed = not live.isdisjoint(operation.reads)
        matrices[operation.tokens].add(operation.module, passed)
        if passed or _trains(operation.module):  # everything after a trained parameter passes gradients back to it
            live.add(operation.writes)
    if not model.backbone.reads_pixels:
        return Sizes(matrices, attentions)
    images: Any = model.visual
    return Sizes(matrices, attentions, model.backbone.tower_vectors(model.lm.config), images.per_image)
