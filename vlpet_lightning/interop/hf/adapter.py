"""A model's adapter (LoRA units or a peft method) under Hugging Face peft's names and config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vlpet_lightning.interop.hf.hf_peft import ADAPTER, HFPeft
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import LoRA, Site, UnitLinear

PREFIX = "base_model.model."  # peft's names of layers begin with its own two wrappers


def _host_names(model: VLModel) -> dict[int, str]:
    return {
        id(m.unit): name for name, m in model.lm.named_modules() if isinstance(m, UnitLinear) and m.unit is not None
    }


def _lora_units(model: VLModel) -> dict[str, LoRA]:
    """Return the LoRA units by the name of their layer in the language model.

    Raises:
        ValueError: If there is no LoRA, another unit, or a LoRA whose input is not that of its layer.
    """
    names = _host_names(model)
    found: dict[str, LoRA] = {}
    for place in model.injected:
        unit, site = place.unit, model.backbone.sites[place.site]
        if type(unit) is not LoRA:
            raise ValueError(
                f"peft has no format for {type(unit).__name__} at {place.site!r}: of our methods only LoRA exports "
                "with --format peft; omit --format"
            )
        if not isinstance(site, Site) or site.side == "input" or site.enters != site.leaves:
            raise ValueError(
                f"LoRA at {place.site!r} does not read the input of the layer it is added to: peft's does; place it at "
                "a projection, such as that of the query"
            )
        if unit.positions != "all":
            raise ValueError(
                f"peft has no format for LoRA at {unit.positions} positions only, as at {place.site!r}: omit --format"
            )
        found[names[id(unit)]] = unit
    if not found:
        raise ValueError("nothing to export in peft's format: this model has no LoRA")
    projector = [name for name, p in model.visual_parameters().items() if p.requires_grad]
    if projector and projector[0].startswith("lm."):
        raise ValueError(
            "peft's format would leave out the trained projector, without which the model computes something else: "
            "omit --format"
        )
    return found


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _lora_config(model: VLModel) -> dict[str, Any]:
    units = _lora_units(model)
    ranks = {name: unit.lora_A.out_features for name, unit in units.items()}
    alphas = {name: unit.alpha for name, unit in units.items()}
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _usual(unit.dropout.p for unit in units.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(units),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _extension_config(model: VLModel) -> dict[str, Any]:
    config = model.lm.peft_config[ADAPTER]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return plain | {"inference_mode": True, "task_type": "SEQ_2_SEQ_LM"}


def adapter_names(model: VLModel) -> set[str]:
    """Return our names of the tensors that are in peft's file."""
    return set(model.unit_parameters()) | {f"lm.{name}" for name in model.inserted.state}


def adapter_tensors(model: VLModel) -> dict[str, Tensor]:
    """Return the adapter's tensors under peft's names; they share memory with the model.

    Raises:
        ValueError: For a method that peft has no format for.
    """
    if not isinstance(model.extension, HFPeft):
        return {
            f"{PREFIX}{name}.{part}.weight": getattr(unit, part).weight.detach()
            for name, unit in _lora_units(model).items()
            for part in ("lora_A", "lora_B")
        }
    if model.injected:
        raise ValueError(
            "peft's format has no place for the units beside a method of peft: export without --format peft"
        )
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model.lm, adapter_name=ADAPTER)
    return {f"{PREFIX}{name}": tensor.detach() for name, tensor in found.items()}


def adapter_config(model: VLModel) -> dict[str, Any]:
    """Return ``adapter_config.json`` of the adapter, without the backbone's name.

    Raises:
        ValueError: For a method that peft has no format for.
    """
    return _extension_config(model) if isinstance(model.extension, HFPeft) else _lora_config(model)
