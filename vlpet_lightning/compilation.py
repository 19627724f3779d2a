"""Compilation of a model layer by layer, for training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def compile_layers(layers: Sequence[nn.Module], **options: Any) -> None:
    """Compile each layer in place.

    Layers of the same structure share one compiled graph, which makes start-up much shorter than for the model as a
    whole. A second text or target length makes the graph's length dynamic; further lengths do not compile again.

    Args:
        layers: The layers.
        options: Arguments of :func:`torch.compile`.
    """
    config: Any = torch._dynamo.config
    # units whose layers differ (HyperFormer) have one graph per layer, and each may have a dynamic variant
    config.recompile_limit = max(config.recompile_limit, 4 * len(layers))
    for layer in layers:
        layer.compile(**options)


def uncompiled(layers: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Run layers eagerly, e.g. for generation, where the cache has another length in every step.

    Args:
        layers: The layers; nothing is done if the first of them is not compiled.
    """
    return torch.compiler.set_stance("force_eager") if layers[0]._compiled_call_impl is not None else nullcontext()
