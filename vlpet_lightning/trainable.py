"""What is trained, said by named rules over modules; everything else is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from vlpet_lightning.model import VLModel

Named = dict[str, nn.Parameter]


def _below(name: str, module: nn.Module) -> Named:
    return {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}


def _norms(model: VLModel, stack: str) -> Named:
    found: Named = {}
    for name, norm in model.backbone.norms(model.lm, stack).items():
        found |= _below(f"lm.{name}", norm)
    return found


def _biases(model: VLModel) -> Named:
    return {name: p for name, p in model.named_parameters() if name.startswith("lm.") and name.endswith("bias")}


RULES: dict[str, Callable[[VLModel], Named]] = {
    "pet": lambda model: model.unit_parameters(),
    "visual_embedding": lambda model: _below("visual", model.visual),
    "encoder.layer_norm": lambda model: _norms(model, "encoder"),
    "decoder.layer_norm": lambda model: _norms(model, "decoder"),
    "bias": _biases,
    "all": lambda model: dict(model.named_parameters()),
}


def check_rules(rules: Iterable[str]) -> None:
    """Check names before anything is changed.

    Raises:
        ValueError: For an unknown rule; lists the valid ones.
    """
    for rule in rules:
        if rule not in RULES:
            raise ValueError(f"unknown trainable rule {rule!r}: choose from {', '.join(sorted(RULES))}")


def set_trainable(model: VLModel, rules: Iterable[str]) -> dict[str, list[str]]:
    """Freeze the model, then train what the rules name.

    Args:
        model: Changed in place (``requires_grad``).
        rules: Names of :data:`RULES`.

    Returns:
        The names of the parameters that each rule matched.

    Raises:
        ValueError: For an unknown rule, or one that matches nothing in this model; nothing is changed then.
    """
    rules = list(rules)
    check_rules(rules)
    matched = {rule: RULES[rule](model) for rule in rules}
    empty = [rule for rule, found in matched.items() if not found]
    if empty:
        raise ValueError(
            f"trainable rule {empty[0]!r} matches no parameter of this model: remove it"
            + (", or add a placement" if empty[0] == "pet" else "")
        )
    model.requires_grad_(False)
    for found in matched.values():
        for parameter in found.values():
            parameter.requires_grad_(True)
    return {rule: sorted(found) for rule, found in matched.items()}
