"""Checks and settings for distributed and bf16 runs."""

from __future__ import annotations

from datetime import timedelta

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from vlpet_lightning.run.ranks import set_timeout


def bf16_problem(trainer: Trainer) -> str | None:
    """Explain why this device cannot run the trainer's bf16 precision; None if it can, or if bf16 is not used."""
    if "bf16" not in str(trainer.precision):
        return None
    device = trainer.strategy.root_device
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} has no bf16 arithmetic: set trainer.precision to 32-true (or 16-mixed), or run on Ampere or newer"
        )
    if device.type == "mps":
        return "bf16 is not dependable on Apple's mps: set trainer.precision to 32-true"
    return None


class Distributed(Callback):
    """Check bf16 support, log batch sizes, compress gradients and set the timeout between ranks.

    The batch size is that of the recipe for any number of devices: each rank gets its share of every batch, and a loss
    is divided by the count of the whole batch (see :meth:`vlpet_lightning.module.VLModule.training_step`).

    Args:
        bf16_gradients: Reduce gradients over ranks in bfloat16, on GPUs: half the traffic, at the cost of rounding.
        timeout: Seconds after which an unresponsive rank counts as lost and the run ends. The timeout applies from the
            first step on; start-up and data loading use Lightning's half hour.

    Raises:
        ValueError: If the timeout is not positive.
    """

    def __init__(self, bf16_gradients: bool = False, timeout: float = 600.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
        self.bf16_gradients = bf16_gradients
        self.timeout = timedelta(seconds=timeout)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        problem = bf16_problem(trainer)
        if problem is not None:
            raise ValueError(problem)
        if self.bf16_gradients and stage == "fit":
            self._check_compression(trainer)

    def _check_compression(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, DDPStrategy):
            raise ValueError(
                f"bf16_gradients needs DistributedDataParallel, the strategy is {type(strategy).__name__}: "
                "set trainer.strategy to ddp, or bf16_gradients to false"
            )
        if strategy.root_device.type != "cuda":  # torch implements the bf16 reduction for NCCL only
            raise ValueError(
                f"bf16_gradients needs GPUs, the run is on {strategy.root_device.type}: set bf16_gradients to false"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bf16_gradients:
            trainer.strategy.model.register_comm_hook(None, bf16_compress_hook)  # type: ignore[union-attr, operator]
        if not trainer.is_global_zero:
            return
        sizes = getattr(trainer.datamodule, "sizes_of_batches", {})  # type: ignore[attr-defined]
        figures = {f"batch/{task}": size * trainer.accumulate_grad_batches for task, size in sizes.items()}
        figures["batch/ranks"] = trainer.world_size
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_timeout(self.timeout)

    on_validation_start = on_test_start = on_predict_start = on_train_start
