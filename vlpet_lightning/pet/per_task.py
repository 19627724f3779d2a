"""One unit per task instead of one for all tasks (VL-Adapter, section 3.2: multiple, half-shared, single adapters)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlpet_lightning.pet.unit import Place, Unit, UnitFactory


class PerTask(Unit):
    """Set of units with one unit per task, selected by the batch's task.

    Args:
        width: Number of channels ``d``.
        unit: Factory of one task's unit.
        tasks: Names of the tasks; a batch of any other task is an error.
        share: Names of submodules shared by all tasks, e.g. ``[down]`` for half-shared adapters
            (``--share_down_sampler``).
    """

    needs_context = True
    may_skip_parameters = True
    unmergeable = "it holds a unit a task"

    def __init__(self, width: int, *, unit: UnitFactory, tasks: Sequence[str], share: Sequence[str] = ()) -> None:
        super().__init__()
        if len(set(tasks)) != len(tasks) or not tasks:
            raise ValueError(f"tasks must be different names, at least one, got {list(tasks)}")
        self.tasks = tuple(tasks)
        self.units = nn.ModuleDict({task: unit(width) for task in tasks})
        first, *others = self.units.values()
        for name in share:
            if name not in dict(first.named_modules()):
                parts = ", ".join(part for part, _ in first.named_children())
                raise ValueError(f"{type(first).__name__} has no part {name!r} to share: choose from {parts}")
            parent, _, leaf = name.rpartition(".")
            for other in others:
                setattr(other.get_submodule(parent), leaf, first.get_submodule(name))
        self.share = tuple(share)
        self.adds_tokens = bool(first.adds_tokens)

    def map_to(self, width: int) -> None:
        if self.share:
            super().map_to(width)
        for unit in self.units.values():
            unit.map_to(width)  # type: ignore[operator]

    def current(self) -> Unit:
        """Return the unit of the current batch's task.

        Raises:
            RuntimeError: If no batch is being processed.
            ValueError: If the batch's task has no unit; the message lists the tasks that have one.
        """
        if self.context is None:
            raise RuntimeError("PerTask was called without a batch: call the whole model")
        if self.context.task not in self.units:
            raise ValueError(f"no unit for task {self.context.task!r}: there are {', '.join(self.units)}")
        return self.units[self.context.task]  # type: ignore[return-value]

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.current()(x, h)

    @property
    def length(self) -> int:
        """Number of tokens added by the units, if they are prompts."""
        return next(iter(self.units.values())).length  # type: ignore[return-value]

    def tokens(self) -> Tensor:
        """Compute the ``(P, d)`` tokens of the current task, if the units are prompts."""
        return self.current().tokens()  # type: ignore[operator]

    def join(self, place: Place, shared: nn.ModuleDict) -> None:
        for unit in self.units.values():
            unit.join(place, shared)  # type: ignore[operator]

    @property
    def is_identity(self) -> bool:
        return all(unit.is_identity for unit in self.units.values())

    def start_as_identity(self) -> None:
        for unit in self.units.values():
            unit.start_as_identity()  # type: ignore[operator]

    def gate_parameters(self) -> list[nn.Parameter]:
        found = {id(p): p for unit in self.units.values() for p in unit.gate_parameters()}  # type: ignore[operator]
        return list(found.values())

    def extra_repr(self) -> str:
        return f"share={list(self.share)}"
