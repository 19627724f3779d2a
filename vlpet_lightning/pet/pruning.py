"""Structured pruning of a language model's layers, to initialise narrower ones.

This follows the released code of Ladder Side-Tuning (VL-T5/src/pruning/pruning_methods.py: pruning_v2). Layers are
visited in the order of computation. The columns of a matrix are those that the layer before it has kept; its rows are
the ones with the largest total importance. Matrices that read the same input (query, key and value) are cut at the same
rows, chosen by the product of their importances. Norms and biases follow the layer before them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlpet_lightning.checksums import weights_digest

FORMAT = "importance"  # mark of an importance file
PARTS = {"model", "channels", "weights"}
COMMAND = "`python -m vlpet_lightning importance`"


@dataclass(frozen=True)
class Importance:
    """Importance of a language model's weights.

    Args:
        channels: ``(d,)`` importance of each channel of the token embedding.
        of: Returns the importance of a weight by its name in the language model, in the shape of the weight.
    """

    channels: Tensor
    of: Callable[[str], Tensor]

    @classmethod
    def magnitude(cls, weights: Mapping[str, Tensor], embedding: Tensor) -> Importance:
        """Use the magnitude of the weights themselves.

        Args:
            weights: Parameters of the language model by name.
            embedding: ``(vocabulary, d)`` token embedding.
        """
        return cls(embedding.abs().sum(dim=0), lambda name: weights[name].abs())

    @classmethod
    def read(cls, file: str | Path, weights: Mapping[str, Tensor]) -> Importance:
        """Open a file written by :func:`write_importance`.

        Args:
            file: The file.
            weights: Parameters of the language model by name.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is damaged, or belongs to other weights.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"no importance file {file}: write it with {COMMAND}, or set importance to null to prune by the "
                "magnitude of the weights"
            )
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises several kinds
            raise ValueError(f"{file} is no importance file: write one with {COMMAND}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT or not found.keys() >= PARTS:
            raise ValueError(f"{file} is no importance file: write one with {COMMAND}")
        if found["model"] != weights_digest(weights):
            raise ValueError(
                f"{file} was measured on other weights than those of this backbone: write one with {COMMAND}"
            )
        return cls(found["channels"], found["weights"].__getitem__)


def write_importance(
    file: str | Path, weights: Mapping[str, Tensor], channels: Tensor, found: Mapping[str, Tensor], samples: int
) -> None:
    """Write an importance file.

    Args:
        file: The file.
        weights: Parameters of the language model by name.
        channels: ``(d,)`` importance of the token embedding's channels.
        found: Importance of the pruned weights by name.
        samples: Number of samples that it was measured on.
    """
    content = {"format": FORMAT, "model": weights_digest(weights), "samples": samples}
    part = Path(f"{file}.part")
    torch.save(content | {"channels": channels, "weights": dict(found)}, part)
    os.replace(part, file)


def pruned_names(chains: Sequence[Sequence[tuple[str, ...]]], weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the matrices in the chains, whose importance :func:`prune` reads."""
    names = [f"{module}.weight" for chain in chains for group in chain for module in group]
    return [name for name in names if weights[name].dim() == 2]


def most_important(scores: Tensor, reduction: int) -> Tensor:
    """Return the indices of the largest scores, one in ``reduction``; the last ones of equal scores.

    They are in the order of a Python set of integers, as in the original (``select_weights``), which is not ascending.
    The order of the kept rows decides to which head a row of a query, key or value belongs.
    """
    count = len(scores)
    pruned = scores.argsort(stable=True)[: count - count // reduction].tolist()
    return torch.tensor(list(set(range(count)) - set(pruned)), device=scores.device)


def prune(
    weights: Mapping[str, Tensor],
    importance: Importance,
    chains: Sequence[Sequence[tuple[str, ...]]],
    reduction: int,
) -> dict[str, Tensor]:
    """Cut the layers of a language model to a fraction of their widths.

    Args:
        weights: Parameters of the language model by name.
        importance: Their importance.
        chains: Layers in the order of computation, as names of modules; modules in one group read the same input. The
            first layer of a chain reads the token embedding.
        reduction: Divisor of all widths.

    Returns:
        Weights, biases and norms of the layers, by name.
    """
    pruned: dict[str, Tensor] = {}
    for chain in chains:
        kept = most_important(importance.channels, reduction)
        for group in chain:
            if weights[f"{group[0]}.weight"].dim() == 2:
                columns = kept
                scores = torch.stack([importance.of(f"{module}.weight")[:, columns].double() for module in group])
                kept = most_important(scores.prod(dim=0).abs().sum(dim=1), reduction)
                for module in group:
                    pruned[f"{module}.weight"] = weights[f"{module}.weight"][kept][:, columns]
            else:  # a norm
                pruned[f"{group[0]}.weight"] = weights[f"{group[0]}.weight"][kept]
            for module in group:
                if f"{module}.bias" in weights:
                    pruned[f"{module}.bias"] = weights[f"{module}.bias"][kept]
    return pruned
