"""Memory of a training step, from a run on fake tensors: no weights, no data, no GPU.

The **activation memory** of a step is the number of bytes that autograd holds at the end of the forward pass: the
storages of all tensors saved for the backward pass, each counted once, without those of the model's parameters and
buffers. Copies of weights that autocast makes, and weights that a unit generates, are saved tensors and counted; they
do not grow with the batch.

Not counted: workspaces of kernels, temporary tensors (the loss computes up to 512 MB of logits at a time on a GPU,
several times over), gradients of activations during the backward pass, fragmentation of the allocator, the pools of
CUDA graphs, the CUDA context, and the savings of ``compile_model``.

A CPU saves other tensors than a GPU, by default those of :mod:`vlpet_lightning.cpu_kernels`. :class:`GPUKernels` makes
the run save what a GPU would: attention in one kernel, which keeps its inputs and output instead of the probabilities;
the output of a ReLU; one byte per element of a dropout mask; and norms in float32 under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlpet_lightning.batch import Batch
from vlpet_lightning.cpu_kernels import torch_kernels
from vlpet_lightning.model import VLModel

PRECISIONS: dict[str, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
ALIGNED = 8  # the kernel needs rows of the mask that start at multiples of this


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Create tensors on the CPU that have a shape, a type and a storage, but no values.

    Truncated normal distributions (of SigLIP) are not drawn: torch draws again until it finds all values in bounds.
    """
    undrawn = patch.object(nn.init, "_no_grad_trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    with FakeTensorMode(), torch.device("cpu"), undrawn:
        yield


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def make_batch(
    task: str, samples: int, *, text: int, target: int, features: tuple[int, ...], width: int, weighted: bool = False
) -> Batch:
    """Make a batch without padding; inside :func:`fake_tensors`, without values.

    Args:
        task: Name of the task.
        samples: ``B``.
        text: ``T``.
        target: ``L``.
        features: ``(F,)``, or ``(N, F)`` for several images.
        width: ``D``.
        weighted: Whether samples have weights.
    """
    batch = Batch(
        task=task,
        input_ids=torch.full((samples, text), 5),
        features=torch.zeros(samples, *features, width),
        labels=torch.full((samples, target), 5),
        weights=torch.ones(samples) if weighted else None,
    )
    batch._targets = torch.arange(samples * target)  # fake labels have no values to find them by
    return batch


def saved_for_backward(model: VLModel, batch: Batch, *, precision: str = "32-true", gpu: bool = True) -> int:
    """Measure the activation memory of a training step, on real or fake tensors on the CPU.

    Args:
        model: A model in training mode.
        batch: Its input, with labels.
        precision: Of :data:`PRECISIONS`.
        gpu: Save what a GPU's kernels would; if False, what the CPU's do. Needs fake tensors.

    Returns:
        Bytes.

    Raises:
        ValueError: If the precision is unknown.
    """
    dtype = autocast_type(precision)
    own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}  # holds references, so that no storage reuses the key of another

    def pack(tensor: Tensor) -> Tensor:
        held[_key(tensor)] = tensor.untyped_storage()
        return tensor.detach()  # an output that its own operation saves would refer to itself and never be freed

    kernels: AbstractContextManager[Any] = GPUKernels() if gpu else nullcontext()
    saving: AbstractContextManager[Any] = torch_kernels() if gpu else nullcontext()
    autocast = torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast, kernels, saving:
        loss = model.loss(batch)
    found = sum(storage.nbytes() for key, storage in held.items() if key not in own)
    del loss  # it holds the graph
    return found


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def autocast_type(precision: str) -> torch.dtype | None:
    """Return the type that autocast computes in; None without autocast.

    Raises:
        ValueError: If the precision is unknown.
    """
    names = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    name = names.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not supported here: choose from {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def optimizer_bytes(make: Callable[[Any], torch.optim.Optimizer], trained: list[nn.Parameter]) -> int | None:
    """Measure the optimiser's state after its first step; inside :func:`fake_tensors`.

    Args:
        make: Factory of the optimiser, called with parameter groups.
        trained: Trained parameters; their gradients are discarded.

    Returns:
        Bytes; None if the optimiser's step needs the values of tensors before it has made its state.
    """
    optimizer = make([{"params": trained}])
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except DataDependentOutputException:  # raised by Adafactor, for instance, when its state is complete
        if len(optimizer.state) < len(trained):
            return None
    finally:
        for parameter in trained:
            parameter.grad = None
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(size(value) for value in states if isinstance(value, Tensor))


class GPUKernels(TorchFunctionMode):
    """Run the functions that save other tensors on a CPU as a GPU would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return INSTEAD.get(func, func)(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Apply dropout with a mask of one byte per element."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _layer_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalise in float32, as autocast does on a GPU but not on a CPU."""
    return F.layer_norm(input.float() if torch.is_autocast_enabled("cpu") else input, *args, **kwargs)


def _softmax(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute in float32, as autocast does on a GPU but not on a CPU."""
    return torch.softmax(input.float() if torch.is_autocast_enabled("cpu") else input, *args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with the memory-efficient kernel (aten/src/ATen/native/transformers/attention.cpp)."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = attn_mask
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        mask = mask.to(query.dtype)
        length = mask.shape[-1]
        if length % ALIGNED:
            mask = F.pad(mask, (0, -length % ALIGNED))[..., :length]
        mask = mask.expand(*query.shape[:-1], length)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]


INSTEAD: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
}
