"""Operations of a network: the tokens that its matrices multiply, in the order of execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import nn

# `source` are the encoder's tokens: text, image and prompt tokens; `text` are those without image tokens; `patches` are
# the vectors that a vision tower computes
Tokens = Literal["patches", "images", "text", "source", "target"]


class Applied(NamedTuple):
    """A module whose own matrices are multiplied with tokens.

    Activations have names, so that it can be determined which of them need a gradient. The inputs of a model are
    ``words``, ``images`` and ``prompt``; a stack has one name for all activations of its layers.

    Args:
        module: The module; modules inside it are operations of their own.
        tokens: Kind of tokens.
        reads: Names of the activations that its input is computed from.
        writes: Name of the activations that its output becomes part of.
    """

    module: nn.Module
    tokens: Tokens
    reads: tuple[str, ...]
    writes: str


class Attention(NamedTuple):
    """An attention in every layer of a stack.

    Args:
        width: Number of heads times head dimension.
        layers: Number of layers.
        queries: Kind of tokens that attend.
        keys: Kind of tokens that are attended to.
        reads: Name of the stack's activations.
    """

    width: int
    layers: int
    queries: Tokens
    keys: Tokens
    reads: str


class AttentionInImage(NamedTuple):
    """The attention in one layer of a vision tower, within each image.

    Args:
        work: Width times the pairs of vectors that attend.
        reads: Name of the tower's activations.
    """

    work: int
    reads: str


class Activations(NamedTuple):
    """Output of an encoder, as a decoder reads it.

    Args:
        name: Their name.
        tokens: Kind of tokens.
    """

    name: str
    tokens: Tokens


Operations = Iterator[Applied | Attention | AttentionInImage]
