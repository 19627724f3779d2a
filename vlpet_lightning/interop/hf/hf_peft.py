"""Methods of Hugging Face peft as extensions of our models (optional extra ``vlpet-lightning[peft]``)."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from vlpet_lightning.pet import UnitLinear
from vlpet_lightning.pet.extension import Extension, tensors

ADAPTER = "default"  # peft's own name for the only adapter
UNDRIVEN = {  # methods whose layers alone are not the method
    "ADALORA": "reallocates ranks in every step and adds a term to the loss",
    "POLY": "is given the task of every sample",
    "SHADOW": "runs a second model beside the backbone",
    "XLORA": "is a gate over other adapters",
}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "methods of Hugging Face peft need its package: pip install 'vlpet-lightning[peft]'"
        ) from error
    return peft


def _config_class(class_path: str) -> type:
    """Return a configuration class of peft by name; only peft's own table of methods is searched."""
    peft = _peft()
    known = {kind.__name__: kind for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    package, _, name = class_path.rpartition(".")
    if package.split(".")[0] != "peft" or name not in known:
        raise ValueError(f"{class_path!r} is not a method of peft: choose from peft.{', peft.'.join(sorted(known))}")
    return known[name]


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set):
        return sorted(value)
    return value


def peft_settings(config: Any) -> dict[str, Any]:
    """Return ``{class_path, init_args}`` of a ``peft.PeftConfig``, with only the non-default arguments."""
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    default = type(config)()
    given = {name: _plain(getattr(config, name)) for name in sorted(fields) if name != "peft_type"}
    kept = {name: value for name, value in given.items() if value != _plain(getattr(default, name))}
    return {"class_path": f"peft.{type(config).__name__}", "init_args": kept}


class HFPeft(Extension):
    """One adapter of peft in the language model.

    Args:
        method: ``{class_path: peft.LoraConfig, at: [...], init_args: {...}}``, or a ``peft.PeftConfig``. ``at`` lists
            sites of the backbone and replaces ``target_modules``.

    Raises:
        ImportError: Without peft; names the extra.
        ValueError: For an unknown method or setting, or one that adds no layers (prompts).
    """

    def __init__(self, method: Any) -> None:
        data: dict[str, Any] = method if isinstance(method, dict) else peft_settings(method)
        if "positions" in data:
            raise ValueError(
                f"positions is {data['positions']!r} for peft, whose methods act at all positions: omit it, or use a "
                "placement of a unit"
            )
        if "class_path" not in data or set(data) - {"class_path", "at", "init_args"}:
            raise ValueError(
                f"peft must be {{class_path: peft.SomeConfig, at: [...], init_args: {{...}}}}, got {data!r}"
            )
        kind = _config_class(data["class_path"])
        arguments = dict(data.get("init_args") or {})
        known = inspect.signature(kind).parameters
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise ValueError(f"peft.{kind.__name__} has no setting {unknown[0]!r}: it has {', '.join(sorted(known))}")
        self.at = tuple(data.get("at") or ())
        if self.at and arguments.get("target_modules") is not None:
            raise ValueError("peft is placed by at and by target_modules: omit one of them")
        self._settings: dict[str, Any] = {"class_path": f"peft.{kind.__name__}", "init_args": arguments}
        if self.at:
            self._settings["at"] = list(self.at)
        self._check(self.config())

    def config(self) -> Any:
        """Return a new ``peft.PeftConfig``; peft modifies the one that it receives."""
        return _config_class(self._settings["class_path"])(**self._settings["init_args"])

    def settings(self) -> dict[str, Any]:
        return self._settings

    def _check(self, config: Any) -> None:
        if config.is_prompt_learning or config.is_adaption_prompt or config.peft_type not in self._tuners():
            raise ValueError(
                f"{self._settings['class_path']} does not act in layers of the model: use a placement of "
                "vlpet_lightning.pet.Prompt for tokens"
            )
        if config.peft_type.value in UNDRIVEN:
            raise ValueError(
                f"{self._settings['class_path']} {UNDRIVEN[config.peft_type.value]}, which this library "
                "does not support: choose another method"
            )

    @staticmethod
    def _tuners() -> dict[Any, Any]:
        return _peft().PEFT_TYPE_TO_TUNER_MAPPING

    def insert(self, lm: nn.Module, layers: Sequence[str] = ()) -> None:
        """Wrap ``layers``, or those that the config names; peft moves their own weights to ``base_layer.``.

        Equivalent to ``peft.inject_adapter_in_model``, but also supports methods whose layers share tensors (VeRA): the
        layers hold these tensors themselves.

        Raises:
            ValueError: If the config matches no layer or one that holds a unit, or peft keeps parameters elsewhere.
        """
        config = self.config()
        if self.at:
            config.target_modules = set(layers)
        tuner = self._tuners()[config.peft_type](lm, config, adapter_name=ADAPTER)
        inside = {id(tensor) for _, tensor in tensors(lm)}
        outside = [name for name, p in tuner.named_parameters() if id(p) not in inside]
        if outside:
            raise ValueError(
                f"{self._settings['class_path']} keeps parameters outside the language model: {outside[:2]}"
            )
        for name, layer in lm.named_modules():
            if name.endswith(".base_layer") and isinstance(layer, UnitLinear):
                raise ValueError(
                    f"{self._settings['class_path']} and a unit both at {name.removesuffix('.base_layer')!r}: take the "
                    "site out of one of them"
                )

    def enable(self, lm: nn.Module, on: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        trained = {name: p.requires_grad for name, p in lm.named_parameters()}
        for module in lm.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(on)
        for name, parameter in lm.named_parameters():  # peft's switch also freezes; our rules decide
            parameter.requires_grad_(trained[name])
