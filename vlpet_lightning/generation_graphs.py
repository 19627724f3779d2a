"""CUDA graphs for generation: the steps of a search are recorded once per shape of a batch and replayed.

A step of a base-size model launches hundreds of small kernels, which takes a GPU's host longer than the GPU needs to
compute them (docs/performance.md). A graph launches all of them at once. The first graph encodes the batch and makes
the first step. Each of the others makes one more, so that the cache needs no maximum length, and a search ends with the
step in which the last sample is done. Samples that are done earlier stay in the batch.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vlpet_lightning.backbones.folder import first_line
from vlpet_lightning.batch import Batch
from vlpet_lightning.beam_search import SearchRules, SearchState, Step, advance, best_answers, start_search, trimmed
from vlpet_lightning.cuda_graphs import graph_inputs, pad_text

T = TypeVar("T")
MOST = 32  # recordings; batches of further shapes run without one


class Recording(NamedTuple):
    """Graphs of a search.

    Args:
        inputs: Tensors that the graphs read, by name; the next batch is copied to them.
        replays: Replay the graph of each step.
        states: State of the search after each step; the graphs write to these tensors.
    """

    inputs: dict[str, Tensor]
    replays: list[Callable[[], None]]
    states: list[SearchState]

    def search(self, inputs: dict[str, Tensor], rules: SearchRules) -> Tensor:
        """Search for the answers to another batch of the recorded shape; returns what ``beam_search`` returns."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        for replay, state in zip(self.replays, self.states, strict=True):
            replay()
            if bool(state.done.all()):
                break  # no sample has unfinished hypotheses, whose scores would depend on the number of steps
        return trimmed(best_answers(state, len(self.states), rules), rules)


class GenerationGraphs:
    """Replays the graphs of searches; for a single thread, without gradients.

    The first batch of a shape runs without graphs, the second one is recorded. Weights are read at every replay.
    Nothing else that the computation depends on, such as the implementation of attention, may change after a recording.

    Attributes:
        device: Type of the device that graphs are recorded on.

    Args:
        steps: Encodes a batch and returns the decoder's steps, without synchronising.
        search: Searches without graphs.
        context: Context in which the decoder's steps run.
        module: Module whose parameters and buffers are read. If one of them has moved, searches are recorded anew.
        pad: Padding token.
        text: Whether text may be padded, i.e. all positions are computed independently of masked ones.
    """

    def __init__(
        self,
        steps: Callable[[Batch], Step],
        search: Callable[[Batch, SearchRules], Tensor],
        context: Callable[[], AbstractContextManager[Any]],
        module: nn.Module,
        *,
        pad: int,
        text: bool,
    ) -> None:
        self.steps = steps
        self.search = search
        self.context = context
        self.module = module
        self.pad = pad
        self.text = text
        self.device = "cuda"
        self.recordings: dict[Any, Recording | None] = {}  # None for a shape that has occurred once
        self._places: tuple[tuple[int, torch.dtype], ...] = ()
        self._inputs: dict[Any, Tensor] = {}
        self._recorder: Recorder | None = None  # graphs are replayed one at a time, so that all share their memory
        self._full = False  # whether the user knows that there are as many recordings as there may be

    def __call__(self, batch: Batch, rules: SearchRules, variant: Hashable = None) -> Tensor:
        """Search for the answers to a batch.

        Args:
            batch: ``B`` samples on a GPU.
            rules: Settings of the search.
            variant: Anything else that the computation depends on.

        Returns:
            Token ids, as :func:`vlpet_lightning.beam_search.beam_search` returns them.

        Raises:
            RuntimeError: If the model cannot be recorded.
        """
        batch = pad_text(batch, self.pad) if self.text else batch
        self._forget_if_moved()
        inputs = graph_inputs(batch)
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        device = batch.input_ids.device.type
        cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        key = (batch.task, rules, variant, shapes, cast)
        if key not in self.recordings:
            self.recordings[key] = None
            return self.search(batch, rules)
        recording = self.recordings[key]
        if recording is None:
            if sum(found is not None for found in self.recordings.values()) >= MOST:
                self._say_full()
                return self.search(batch, rules)
            recording = self.recordings[key] = self._record(batch, inputs, rules)
        return recording.search(inputs, rules)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out recordings, which belong to the weights of this model in this process."""
        return self.__dict__ | {"recordings": {}, "_places": (), "_inputs": {}, "_recorder": None}

    def _forget_if_moved(self) -> None:
        tensors = chain(self.module.parameters(), self.module.buffers())
        places = tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
        if places != self._places:
            self.recordings.clear()
            self._inputs.clear()
            self._recorder = None  # the memory pool cannot be used again after its last graph
            self._places = places

    def _say_full(self) -> None:
        if not self._full:
            warnings.warn(
                f"generation_graphs: batches of further shapes run without a graph (searches recorded: {MOST})",
                stacklevel=3,
            )
            self._full = True

    def _record(self, batch: Batch, inputs: dict[str, Tensor], rules: SearchRules) -> Recording:
        device = batch.input_ids.device
        if self._recorder is None:
            self._recorder = Recorder(device)
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        # converted weights that an earlier computation has left in autocast's cache do not outlive its context
        cast = torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False)
        try:
            # tensors made in inference mode could not be written to outside of it
            with torch.inference_mode(False), torch.no_grad(), cast:
                static = {name: self._static(name, tensor) for name, tensor in inputs.items()}
                fixed = Batch(task=batch.task, **static)  # type: ignore[arg-type]
                # kernels are loaded and chosen in a first search, in which all samples make all steps
                self._recorder.warm_up(self._calls(fixed, rules))
                recorded = self._recorder.record(self._calls(fixed, rules))
        except BaseException:
            if not any(self.recordings.values()):
                self._recorder = None
            raise
        return Recording(static, [replay for _, replay in recorded], [state for state, _ in recorded])

    def _calls(self, batch: Batch, rules: SearchRules) -> list[Callable[[], SearchState]]:
        """Return the steps of a search."""
        search = _Search(self.steps, self.context, batch, rules)
        return [partial(search.advance, length) for length in range(1, rules.longest)]

    def _static(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor that graphs read for inputs of a name, shape and type."""
        key = name, tensor.shape, tensor.dtype, tensor.device
        if key not in self._inputs:
            self._inputs[key] = tensor.clone()
        return self._inputs[key]


class _Search:
    """A search whose samples all stay in the batch."""

    def __init__(
        self,
        steps: Callable[[Batch], Step],
        context: Callable[[], AbstractContextManager[Any]],
        batch: Batch,
        rules: SearchRules,
    ) -> None:
        self.steps, self.context, self.batch, self.rules = steps, context, batch, rules
        self.step: Step | None = None
        self.state: SearchState | None = None

    def advance(self, length: int) -> SearchState:
        """Make the step after ``length`` tokens; the first one encodes the batch."""
        if self.step is None or self.state is None:
            self.step = self.steps(self.batch)
            self.state = start_search(len(self.batch), self.rules, self.batch.input_ids.device)
        with self.context():
            self.state = advance(self.step, self.state, None, length, self.rules)
        return self.state


class Recorder:
    """Records graphs that share a memory pool and a stream; replays must be made in the order of recording.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream: Any = torch.cuda.Stream(device)  # freed memory is reused on its own stream only

    def warm_up(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Run the calls on the stream of the graphs."""
        with self._on_stream():
            for call in calls:
                call()

    def record(self, calls: Sequence[Callable[[], T]]) -> list[tuple[T, Callable[[], None]]]:
        """Record the kernels of each call, without running them.

        Returns:
            For each call its result, whose tensors are filled by a replay, and the replay.

        Raises:
            RuntimeError: If a call synchronises, or does anything else that a graph cannot hold.
        """
        gc.collect()  # a graph that was destroyed during the recording would spoil it
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # memory of the warm-up, which a graph cannot use
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with self._on_stream():
                return [self._record(call) for call in calls]
        finally:
            if was_enabled:
                gc.enable()

    def _record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # other threads, such as one that pins memory, may use the GPU meanwhile
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            result = call()
        except BaseException as error:
            with suppress(RuntimeError):  # a consequence of the first error
                graph.capture_end()
            if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"the search cannot be recorded as CUDA graphs: {first_line(error)}; set generation_graphs to false"
            ) from error
        graph.capture_end()
        return result, graph.replay

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
