"""Named rules that select the trained parameters; all others are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch import nn

from vlpet_lightning.backbones import Backbone

Named = dict[str, nn.Parameter]


class Tunable(Protocol):
    """The parts of a model that the rules read: its backbone, language model, visual embedding and units."""

    backbone: Backbone
    lm: Any

    def unit_parameters(self) -> Named: ...

    def visual_parameters(self) -> Named: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


Rule = Callable[[Tunable], Named]


def _below(name: str, module: nn.Module) -> Named:
    return {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}


def _norms(stack: str, place: str = "") -> Rule:
    def found(model: Tunable) -> Named:
        endings = model.backbone.norm_endings(model.lm, place) if place else ""
        norms = model.backbone.norms(model.lm, stack)
        chosen = {name: norm for name, norm in norms.items() if name.endswith(endings)}
        return {key: p for name, norm in chosen.items() for key, p in _below(f"lm.{name}", norm).items()}

    return found


def _biases(stack: str = "") -> Rule:
    def found(model: Tunable) -> Named:
        root = f"lm.{model.backbone.stack_path(stack)}." if stack else "lm."
        # every name that contains "bias", as in the original; in T5 that is only relative_attention_bias
        return {name: p for name, p in model.named_parameters() if name.startswith(root) and "bias" in name}

    return found


def _token_embedding(model: Tunable) -> Named:
    shared = model.backbone.token_embedding(model.lm)
    return {name: p for name, p in model.named_parameters() if p is shared}


RULES: dict[str, Rule] = {
    "pet": lambda model: model.unit_parameters(),
    "visual_embedding": lambda model: model.visual_parameters(),
    "encoder.layer_norm": _norms("encoder"),
    "decoder.layer_norm": _norms("decoder"),
    "decoder.layer_norm.embedding": _norms("decoder", "embedding"),
    "decoder.layer_norm.attn": _norms("decoder", "attn"),
    "decoder.layer_norm.cross": _norms("decoder", "cross"),
    "decoder.layer_norm.ffn": _norms("decoder", "ffn"),
    "bias": _biases(),
    "encoder.bias": _biases("encoder"),
    "decoder.bias": _biases("decoder"),
    "token_embedding": _token_embedding,
    "language_model": lambda model: _below("lm", model.lm),
    "all": lambda model: dict(model.named_parameters()),
}


def check_rules(rules: Iterable[str]) -> None:
    """Check the names of rules.

    Raises:
        ValueError: For an unknown rule; the message lists the valid ones.
    """
    for rule in rules:
        if rule not in RULES:
            raise ValueError(f"unknown trainable rule {rule!r}: choose from {', '.join(sorted(RULES))}")


def set_trainable(model: Tunable, rules: Iterable[str]) -> dict[str, list[str]]:
    """Freeze all parameters except those selected by the rules.

    Args:
        model: Model whose ``requires_grad`` flags are set in place.
        rules: Names of :data:`RULES`.

    Returns:
        Names of the parameters matched by each rule.

    Raises:
        ValueError: For an unknown rule, or one that matches no parameter of this model. The model is not changed then.
    """
    rules = list(rules)
    check_rules(rules)
    unread = {id(p) for part in model.backbone.unread(model.lm) for p in part.parameters()}
    found_by = {rule: RULES[rule](model) for rule in rules}
    # parameters that no output depends on stay frozen
    matched = {rule: {name: p for name, p in found.items() if id(p) not in unread} for rule, found in found_by.items()}
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
