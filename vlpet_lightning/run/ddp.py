"""What DistributedDataParallel is told of a module before it wraps it."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel


def accumulates(trainer: Trainer) -> bool:
    """Whether several batches may make one step."""
    scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return scheduled or trainer.accumulate_grad_batches > 1


def configure_ddp(module: LightningModule, trainer: Trainer, may_skip_parameters: bool) -> None:
    """Tell DistributedDataParallel what it need not send, and what it can rely on from step to step.

    What the user gave the strategy stands, but for the search for unused parameters where a step may need it. Another
    strategy is left as it is.

    Args:
        module: With everything in it, and frozen as it will be trained.
        trainer: Whose strategy is told.
        may_skip_parameters: Whether a step may leave trained parameters without a gradient.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    told = strategy._ddp_kwargs
    if may_skip_parameters:
        told["find_unused_parameters"] = True
    elif not told.get("find_unused_parameters") and not accumulates(trainer):
        told.setdefault("static_graph", True)  # with accumulation its first step fails (pytorch issue 143580)
    # what is frozen comes from the same files and the same seed on every rank, and no unit changes its buffers
    told.setdefault("broadcast_buffers", False)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*frozen, *buffers])
