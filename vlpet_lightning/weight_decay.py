"""Kinds of parameters that are exempt from weight decay."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

from torch import Tensor

from vlpet_lightning.model import VLModel
from vlpet_lightning.optim import spared_by_the_original

NoDecay = Literal["bias", "norm", "gate", "vector", "prompt"]


def exemption(model: VLModel, kinds: Collection[NoDecay]) -> Callable[[str, Tensor], bool]:
    """Build the predicate that selects the parameters without weight decay.

    Args:
        model: The model that owns the parameters.
        kinds: Exempt kinds; ``bias`` is matched by name, as in the original, and ``vector`` is a one-dimensional
            parameter of a unit.

    Returns:
        A function of a parameter's name and the parameter that returns True if it is exempt.
    """
    norms = {id(p) for m in model.modules() if m.__class__.__name__.endswith("Norm") for p in m.parameters()}
    gates = {id(p) for place in model.injected for p in place.unit.gate_parameters()}
    vectors = {id(p) for p in model.unit_parameters().values() if p.dim() == 1}
    prompts = {id(p) for p in model.prompts.parameters()}
    members = {"norm": norms, "gate": gates, "vector": vectors, "prompt": prompts}
    spared = {one for kind, ids in members.items() if kind in kinds for one in ids}

    def exempt(name: str, parameter: Tensor) -> bool:
        return id(parameter) in spared or ("bias" in kinds and spared_by_the_original(name))

    return exempt
