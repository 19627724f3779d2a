"""Modules inserted into the language model by another library, alongside or instead of units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Extension:
    """Interface to a method of another library; an extension holds settings but no tensors.

    Attributes:
        at: Names of sites where the method acts; empty if its own settings name the layers.
    """

    at: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return plain data from which the extension can be rebuilt."""
        raise NotImplementedError

    def insert(self, lm: nn.Module, layers: Sequence[str] = ()) -> None:
        """Insert the modules into the language model in place, and freeze everything the method does not train.

        Args:
            lm: Language model.
            layers: Names of the linear layers at the sites :attr:`at`.
        """
        raise NotImplementedError

    def enable(self, lm: nn.Module, on: bool) -> None:
        """Enable the inserted modules, or disable them so that the language model runs without them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Inserted:
    """Tensors added by an extension, named relative to the language model.

    Args:
        trained: Parameters trained by the method.
        state: The trained parameters and all other tensors of the method that a weights file must contain.
    """

    trained: tuple[str, ...] = ()
    state: tuple[str, ...] = ()


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over named parameters and buffers, without duplicates."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _mark(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def insert_extension(lm: nn.Module, extension: Extension, layers: Sequence[str] = ()) -> Inserted:
    """Insert an extension into a language model, at the ``layers`` of its sites.

    Raises:
        ValueError: If the extension adds no trainable parameter, or changes weights of the language model.
    """
    before = {id(tensor): (name, _mark(tensor)) for name, tensor in tensors(lm)}
    kept = [tensor for _, tensor in tensors(lm)]  # holds references, so that no new tensor reuses an old id
    with torch.no_grad():
        extension.insert(lm, layers)
    after = dict(tensors(lm))
    found = {id(tensor): _mark(tensor) for tensor in after.values()}
    changed = [before[id(tensor)][0] for tensor in kept if found.get(id(tensor)) != before[id(tensor)][1]]
    if changed:
        raise ValueError(
            f"{extension.settings()['class_path']} changes {len(changed)} tensors of the language model, e.g. "
            f"{changed[:2]}: the backbone must stay unchanged; choose settings that do not modify its weights"
        )
    saved = set(lm.state_dict())
    new = {name: tensor for name, tensor in after.items() if id(tensor) not in before}
    trained = tuple(name for name, tensor in after.items() if tensor.requires_grad)
    if not trained:
        raise ValueError(f"{extension.settings()['class_path']} adds nothing to train")
    return Inserted(trained, tuple(name for name in new if name in saved))
