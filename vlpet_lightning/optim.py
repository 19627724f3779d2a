"""Optimiser and learning rate schedule of the original's recipe."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class HFAdamW(Optimizer):
    """AdamW of transformers 4.2.1 (src/transformers/optimization.py), vectorised over the tensors of a group.

    It differs from ``torch.optim.AdamW`` in two ways: weight decay is applied after the update, and ``eps`` is added
    before the bias correction of the second moment.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moments.
        eps: Term added to the root of the second moment.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The value of the closure, or None.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            # the step count of a parameter without a gradient (a module of another task) does not advance
            by_step: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step[self._advance(parameter)].append(parameter)
            for step, parameters in by_step.items():
                self._update(group, step, parameters)
        return result

    def _advance(self, parameter: nn.Parameter) -> int:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return int(state["step"])

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_add_(denominator, group["eps"])
        size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        torch._foreach_addcdiv_(parameters, first, denominator, value=-size)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])


def linear_schedule(optimizer: Optimizer, steps: int, warmup_ratio: float) -> LambdaLR:
    """Linear warm-up from 0, then linear decay to 0 (transformers: get_linear_schedule_with_warmup).

    The first step has a learning rate of 0, as in the original.

    Args:
        optimizer: Optimiser whose learning rates are the peak values.
        steps: Number of optimiser steps of the whole run.
        warmup_ratio: Fraction of the steps used for warm-up, rounded down.
    """
    warmup = int(steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return LambdaLR(optimizer, factor)


def spared_by_the_original(name: str) -> bool:
    """Whether the original exempts a parameter of this name from weight decay (src/trainer_base.py: ``no_decay``).

    Its second pattern does not match the norms of BART and T5, which are called ``layer_norm``.
    """
    return "bias" in name or "LayerNorm.weight" in name


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], exempt: Callable[[str, Tensor], bool], weight_decay: float
) -> list[dict[str, Any]]:
    """Split parameters into groups with and without weight decay, omitting empty groups.

    Args:
        named: Trainable parameters by name.
        exempt: Returns whether the parameter with this name is exempt from weight decay.
        weight_decay: Weight decay of all other parameters.
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in named:
        groups[exempt(name, parameter)]["params"].append(parameter)
    return [group for group in groups if group["params"]]
