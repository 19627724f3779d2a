"""DDP options derived from the module: unused parameters and static graph."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel


def accumulates(trainer: Trainer) -> bool:
    """Whether a step may accumulate gradients over several batches."""
    scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return scheduled or trainer.accumulate_grad_batches > 1


def configure_ddp(module: LightningModule, trainer: Trainer, may_skip_parameters: bool) -> None:
    """Set the options of DistributedDataParallel: tensors it need not send, and whether the graph is static.

    Options that the user gave to the strategy are kept, except that ``find_unused_parameters`` is switched on if a step
    may need it. Other strategies are left unchanged.
    strategy is left as it is.

    Args:
        module: Complete module, with parameters already frozen.
        trainer: Trainer whose strategy is configured.
        may_skip_parameters: Whether a step may leave trained parameters without a gradient.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    told = strategy._ddp_kwargs
    if may_skip_parameters:
        told["find_unused_parameters"] = True
    elif not told.get("find_unused_parameters") and not accumulates(trainer):
        told.setdefault("static_graph", True)  # with accumulation, the first step fails (pytorch issue 143580)
    # frozen parameters come from the same files and seed on every rank, and no unit changes its buffers
    told.setdefault("broadcast_buffers", False)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*frozen, *buffers])
