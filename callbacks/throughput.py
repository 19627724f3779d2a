"""Throughput, step time breakdown and device utilisation of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vlpet_lightning.batch import IGNORED, Batch
from vlpet_lightning.device_peaks import arithmetic_of, peak_flops
from vlpet_lightning.flops import Sizes, sizes_of, training_flops
from vlpet_lightning.metrics import gather_objects

PARTS = ("data", "forward", "backward", "optimizer")  # parts of a step, in order


class Clock:
    """Clock that records CUDA events on a GPU, so that reading it does not synchronise with the device.

    Args:
        device: Device of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def now(self) -> Any:
        """Record the current moment, for use with :meth:`seconds`."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, moment: Any) -> None:
        """Wait until the device has reached a moment."""
        if self.on_gpu:
            moment.synchronize()

    def seconds(self, earlier: Any, later: Any) -> float:
        """Return the seconds between two moments that the device has reached."""
        return earlier.elapsed_time(later) / 1000 if self.on_gpu else later - earlier


class Throughput(Callback):
    """Log throughput, step times and device utilisation over windows of ``every_n_steps`` batches.

    The following figures are logged under ``throughput/``:

    - ``samples_per_s``, ``encoder_tokens_per_s``, ``target_tokens_per_s``: totals over all ranks, without padding and
      fillers; ``samples_per_s_rank``: the logging rank only;
    - ``data_ms``, ``forward_ms``, ``backward_ms``, ``optimizer_ms``, ``step_ms``: mean step on rank 0. ``data`` covers
      everything between two steps except validation: reading, copying, logging and checkpoints. ``backward`` includes
      the gradient reduction over ranks; ``optimizer`` includes clipping and the learning rate schedule;
    - ``rank_ms_min``, ``rank_ms_max``: minimum and maximum over ranks of ``data`` plus ``forward``, which contain no
      waiting for other ranks. They reveal a straggler, whereas the step time is equal on all ranks;
    - ``tflops_per_device``: model FLOPs per second (:mod:`vlpet_lightning.flops`), and ``utilisation_percent`` relative
      to the device's published peak, if known;
    - ``peak_memory_gb``: maximum over all ranks (GPUs only).

    The host synchronises with the device once per window, never within a step. The first window includes the warm-up
    and is not logged.

    Args:
        every_n_steps: Number of batches per window.

    Raises:
        ValueError: If ``every_n_steps`` is not positive.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._sizes: Sizes | None = None
        self._clock = Clock(torch.device("cpu"))
        self._warm = False
        self._steps: list[list[Any]] = []
        self._counts: Tensor | None = None
        self._flops = 0
        self._ended: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = Clock(trainer.strategy.root_device)
        self._sizes = sizes_of(pl_module.model)  # type: ignore[arg-type]
        self._warm = False
        self._begin()
        if self._clock.on_gpu:
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def _begin(self) -> None:
        """Start a new window."""
        self._steps = []  # moments of each step: before its data, then at the end of each part
        self._counts = None
        self._flops = 0
        self._ended = self._clock.now()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._steps.append([self._ended, self._clock.now()])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._steps[-1].append(self._clock.now())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps[-1].append(self._clock.now())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        model: Any = pl_module.model
        mask, labels = model.mask(batch), batch.labels
        assert labels is not None
        assert self._sizes is not None
        real = labels != IGNORED
        counts = torch.stack([real.any(dim=1).sum(), mask.sum(), real.sum()])  # stays on the device
        self._counts = counts if self._counts is None else self._counts + counts
        images, source, target = model.visual.tokens(batch.features), mask.shape[1], labels.shape[1]
        self._flops += len(batch) * training_flops(self._sizes, images=images, source=source, target=target)
        self._ended = self._clock.now()
        self._steps[-1].append(self._ended)
        if len(self._steps) == self.every_n_steps:
            if self._warm:
                self._log(trainer)
            self._warm = True
            self._begin()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = self._clock.now()  # exclude validation from the next step's data time

    def _measured(self, device: torch.device) -> dict[str, float]:
        """Measure the current window on this rank."""
        assert self._counts is not None
        self._clock.wait(self._ended)
        parts = [self._split(step) for step in self._steps]
        seconds = {part: sum(step[index] for step in parts) for index, part in enumerate(PARTS)}
        samples, source, target = self._counts.tolist()
        memory = torch.cuda.max_memory_allocated(device) if self._clock.on_gpu else 0
        counted = {"samples": samples, "source": source, "target": target, "flops": self._flops, "memory": memory}
        return seconds | counted

    def _split(self, moments: Sequence[Any]) -> list[float]:
        return [self._clock.seconds(*pair) for pair in pairwise(moments)]

    def _log(self, trainer: Trainer) -> None:
        ranks = gather_objects(self._measured(trainer.strategy.root_device))
        if not trainer.is_global_zero:
            return
        figures = {f"throughput/{name}": value for name, value in self._figures(trainer, ranks).items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def _figures(self, trainer: Trainer, ranks: Sequence[dict[str, float]]) -> dict[str, float]:
        """Compute the logged figures from the measurements of all ranks."""
        mine, steps = ranks[0], len(self._steps)
        own = [sum(rank[part] for part in PARTS) for rank in ranks]
        alone = [1000 * (rank["data"] + rank["forward"]) / steps for rank in ranks]

        def rate(name: str) -> float:
            return sum(rank[name] / seconds for rank, seconds in zip(ranks, own, strict=True))

        figures = {
            "samples_per_s": rate("samples"),
            "samples_per_s_rank": mine["samples"] / own[0],
            "encoder_tokens_per_s": rate("source"),
            "target_tokens_per_s": rate("target"),
            "step_ms": 1000 * own[0] / steps,
            **{f"{part}_ms": 1000 * mine[part] / steps for part in PARTS},
            "rank_ms_min": min(alone),
            "rank_ms_max": max(alone),
            "tflops_per_device": rate("flops") / len(ranks) / 1e12,
        }
        device = trainer.strategy.root_device
        if device.type == "cuda":
            figures["peak_memory_gb"] = max(rank["memory"] for rank in ranks) / 1e9
            peak = peak_flops(torch.cuda.get_device_name(device), arithmetic_of(str(trainer.precision)))
            if peak is not None:
                figures["utilisation_percent"] = 100 * 1e12 * figures["tflops_per_device"] / peak
        return figures
