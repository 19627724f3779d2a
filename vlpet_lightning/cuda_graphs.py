"""CUDA graphs for training: the kernels of a forward and backward pass are recorded once per shape and replayed.

A training step of a base-size model launches thousands of small kernels. Below a batch of several hundred samples,
launching them takes longer than computing them (docs/performance.md). A graph launches all of them at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.batch import Batch

TEXT_MULTIPLE, TARGET_MULTIPLE = 8, 4  # lengths are padded to multiples of these, so that few graphs are needed
MOST = 128  # graphs; batches of further shapes run without one
INPUTS = ("input_ids", "features", "text_mask", "feature_mask", "boxes")


def check_trainer(trainer: Any) -> None:
    """Check that a Lightning trainer can train with graphs.

    Raises:
        ValueError: If it runs without a GPU, on several of them, or accumulates gradients over batches.
    """
    device = trainer.strategy.root_device.type
    if device != "cuda":
        raise ValueError(f"cuda_graphs needs a GPU, but the trainer runs on {device}: set cuda_graphs to false")
    if trainer.world_size > 1:
        raise ValueError(
            f"cuda_graphs supports a single GPU, but the trainer has {trainer.world_size}: set cuda_graphs to false, "
            "or trainer.devices to 1"
        )
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            "cuda_graphs overwrites the gradients of the previous batch, but trainer.accumulate_grad_batches is "
            f"{trainer.accumulate_grad_batches}: set it to 1, or cuda_graphs to false"
        )


def pad_text(batch: Batch, pad: int) -> Batch:
    """Pad text to a multiple of :data:`TEXT_MULTIPLE`.

    Args:
        batch: Batch.
        pad: Padding token, which the model masks if the batch has no text mask.
    """
    added = -batch.input_ids.shape[1] % TEXT_MULTIPLE
    if not added:
        return batch
    mask = None if batch.text_mask is None else F.pad(batch.text_mask, (0, added), value=False)
    return replace(batch, input_ids=F.pad(batch.input_ids, (0, added), value=pad), text_mask=mask)


def graph_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch that encoder and decoder read, by name."""
    return {name: getattr(batch, name) for name in INPUTS if getattr(batch, name) is not None}


class TrainingGraphs:
    """Replays graphs of a function from a batch to the decoder's states, forward and backward.

    The gradients of a replay are valid until the next one.

    Args:
        compute: Computes ``(B, L, d)`` states from a batch and ``(B, L)`` decoder inputs, on a GPU, without
            synchronising.
        parameters: Parameters that need gradients. They must stay where they are in memory.
        pad: Padding token.
        text: Whether text may be padded, i.e. all positions are computed independently of masked ones.
    """

    def __init__(
        self,
        compute: Callable[[Batch, Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        *,
        pad: int,
        text: bool,
    ) -> None:
        self.compute = compute
        self.parameters = list(parameters)
        self.pad = pad
        self.text = text
        self.graphs: dict[Any, Callable[..., Tensor]] = {}
        self._full = False  # whether the user knows that there are as many graphs as there may be
        self._inputs: dict[Any, Tensor] = {}
        self._pool: Any = None  # graphs are replayed one at a time, so that all of them share their memory

    def __getstate__(self) -> dict[str, Any]:
        """Leave out graphs, which belong to the weights of this model in this process."""
        return self.__dict__ | {"graphs": {}, "_inputs": {}, "_pool": None}

    def __call__(self, batch: Batch, decoder_inputs: Tensor) -> Tensor:
        """Compute the states; the first batch of a shape is recorded."""
        length = decoder_inputs.shape[1]
        batch = pad_text(batch, self.pad) if self.text else batch
        # no target attends to later positions
        decoder_inputs = F.pad(decoder_inputs, (0, -length % TARGET_MULTIPLE), value=self.pad)
        given = graph_inputs(batch)
        tensors = (*given.values(), decoder_inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        key = (batch.task, tuple(given), shapes, torch.is_autocast_enabled("cuda"))
        graph = self.graphs.get(key)
        if graph is None:
            if len(self.graphs) >= MOST:
                if not self._full:
                    warnings.warn(
                        f"cuda_graphs: batches of further shapes run without a graph ({MOST} exist)", stacklevel=2
                    )
                    self._full = True
                return self.compute(batch, decoder_inputs)[:, :length]
            graph = self.graphs[key] = self._record(batch.task, tuple(given), tensors)
        return graph(*tensors)[:, :length]

    def _record(self, task: str, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        module = _Computation(self.compute, self.parameters, task, names)
        dtype = torch.get_autocast_dtype("cuda")
        cast = torch.autocast("cuda", dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)
        inputs = [
            self._inputs.setdefault((name, tensor.shape, tensor.dtype), tensor.clone())
            for name, tensor in zip((*names, "decoder_inputs"), tensors, strict=True)
        ]
        # recording must not change the random numbers of the steps, and converted weights must not outlive it
        with torch.random.fork_rng(devices=[tensors[0].device]), cast:
            graph: Any = torch.cuda.make_graphed_callables(
                module, tuple(inputs), allow_unused_input=True, pool=self._pool
            )
        return graph


class _Computation(nn.Module):
    """The function, as a module of tensors and trained parameters.

    Args:
        compute: The function.
        parameters: Parameters that need gradients.
        task: Task of the batches.
        names: Names of the batch's tensors, in the order of the arguments.
    """

    def __init__(
        self,
        compute: Callable[[Batch, Tensor], Tensor],
        parameters: list[nn.Parameter],
        task: str,
        names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.compute = compute
        self.trained = nn.ParameterList(parameters)
        self.task = task
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        batch = Batch(task=self.task, **dict(zip(self.names, tensors[:-1], strict=True)))  # type: ignore[arg-type]
        return self.compute(batch, tensors[-1])
