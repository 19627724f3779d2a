"""Compacter (Mahabadi et al., NeurIPS 2021): adapters whose weights are sums of Kronecker products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlpet_lightning.checks import positive
from vlpet_lightning.pet.adapter import Adapter, Flow
from vlpet_lightning.pet.unit import Place

GAIN = math.sqrt(2)  # gain of Xavier uniform initialisation (src/adapters/hypercomplex/inits.py: glorot_uniform)
RULE_STD = 0.01  # --phm_init_range


class Rule(nn.Module):
    """The ``(n, n, n)`` stack of Kronecker factors ``A_i``, optionally shared by all layers.

    Args:
        division: Number of factors ``n``.
    """

    def __init__(self, division: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(division, division, division).normal_(std=RULE_STD))


class PHMLinear(nn.Module):
    """Linear layer ``x H + b`` with ``H = sum_i kron(A_i, W_i)`` (src/adapters/hypercomplex/layers.py: PHMLinear).

    Args:
        inputs: Input width.
        outputs: Output width.
        division: ``n``; must divide both widths. There are ``n`` factors ``A_i`` of shape ``(n, n)`` and ``n`` factors
            ``W_i`` of shape ``(inputs / n, outputs / n)``.
        factor_rank: Factorise each ``W_i`` into two matrices of this rank; None keeps full matrices.
    """

    def __init__(self, inputs: int, outputs: int, *, division: int, factor_rank: int | None = None) -> None:
        super().__init__()
        for name, value in (("width", inputs), ("width", outputs)):
            if value % positive("division", division):
                raise ValueError(f"{name} {value} is not divisible by division {division}")
        self.shape = (inputs, outputs)
        self.rule: Rule | None = Rule(division)
        self._shared_rule: tuple[Rule, ...] = ()  # a tuple, so that nn.Module does not register it a second time
        small = (division, inputs // division, outputs // division)
        if factor_rank is None:
            self.W = nn.Parameter(torch.empty(small))
            self._draw(self.W)
        else:
            self.W_left = nn.Parameter(torch.empty(*small[:2], positive("factor_rank", factor_rank)))
            self.W_right = nn.Parameter(torch.empty(division, factor_rank, small[2]))
            self._draw(self.W_left)
            self._draw(self.W_right)
        self.factor_rank = factor_rank
        self.b = nn.Parameter(torch.zeros(outputs))  # not named "bias": the original applies weight decay to it

    @staticmethod
    def _draw(factors: Tensor) -> None:
        for factor in factors:
            nn.init.xavier_uniform_(factor, gain=GAIN)

    def share(self, rule: Rule) -> None:
        """Use a shared rule in place of the layer's own."""
        self.rule = None
        self._shared_rule = (rule,)

    def matrix(self) -> Tensor:
        """Compute ``H``, of shape ``(inputs, outputs)``."""
        rule = self._shared_rule[0] if self.rule is None else self.rule
        small = self.W if self.factor_rank is None else self.W_left @ self.W_right
        return torch.einsum("iac,ipq->apcq", rule.weight, small).reshape(self.shape)

    @torch.no_grad()
    def silence(self) -> None:
        """Zero the output by zeroing one factor only; with both at zero, neither would receive a gradient."""
        (self.W if self.factor_rank is None else self.W_right).zero_()
        self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix() + self.b

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, factor_rank={self.factor_rank}"


class Compacter(Adapter):
    """An adapter with :class:`PHMLinear` projections.

    The defaults match the benchmark's single_compacter script (``--hypercomplex_division 2 --shared_phm_rule
    False --factorized_phm False``); the paper's Compacter uses ``division=4, factor_rank=1, shared_rule=True``.

    Args:
        width: Number of channels ``d``.
        rank: Bottleneck width.
        division: ``n`` of the Kronecker products.
        factor_rank: Rank of the factorised ``W_i``; None keeps full matrices.
        shared_rule: Share one set of ``A_i`` across all layers instead of one set per projection.
        flow: As in :class:`Adapter`.
        scale: Factor on the adapter's output.
    """

    def __init__(
        self,
        width: int,
        *,
        rank: int = 96,
        division: int = 2,
        factor_rank: int | None = None,
        shared_rule: bool = False,
        flow: Flow = "sequential",
        scale: float = 1.0,
    ) -> None:
        self.division = division
        self.factor_rank = factor_rank
        self.shared_rule = shared_rule
        super().__init__(width, rank=rank, flow=flow, scale=scale)

    def projections(self, width: int, rank: int) -> tuple[nn.Module, nn.Module]:
        settings = {"division": self.division, "factor_rank": self.factor_rank}
        return PHMLinear(width, rank, **settings), PHMLinear(rank, width, **settings)  # type: ignore[arg-type]

    def silence(self) -> None:
        self.up.silence()  # type: ignore[operator]

    def join(self, place: Place, shared: nn.ModuleDict) -> None:
        if not self.shared_rule:
            return
        name = f"phm_rule_{self.division}"
        if name not in shared:
            shared[name] = Rule(self.division)
        for layer in (self.down, self.up):
            layer.share(shared[name])  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"division={self.division}, shared_rule={self.shared_rule}, {super().extra_repr()}"
