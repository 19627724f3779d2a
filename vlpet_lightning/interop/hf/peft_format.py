"""LoRA in the format of Hugging Face peft, so that its ``PeftModel.from_pretrained`` loads it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vlpet_lightning.interop.export.pet_files import WEIGHTS, check_exportable, save_pet, tensors_to_save, write_record
from vlpet_lightning.interop.hf.hf_peft import ADAPTER, HFPeft
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import LoRA, PromptSite, UnitLinear

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # peft's names of layers begin with its own two wrappers

NOTES = """## This folder is in the format of Hugging Face peft

```python
from peft import PeftModel

model = PeftModel.from_pretrained(language_model, "DIR")
```

`{adapter}` holds the adapter of the language model alone. peft's format has no place for what else belongs to the
model: `{weights}` holds it by our names ({what}). Without it the language model reads no images. `load_pet` does not
read this folder: export without `--format peft` for that.
"""


def _host_names(model: VLModel) -> dict[int, str]:
    return {
        id(m.unit): name for name, m in model.lm.named_modules() if isinstance(m, UnitLinear) and m.unit is not None
    }


def _lora_units(model: VLModel) -> dict[str, LoRA]:
    """LoRA units by the name of their layer below the language model.

    Raises:
        ValueError: If there is none, another unit, or one that reads something else than its layer does.
    """
    names = _host_names(model)
    found: dict[str, LoRA] = {}
    for place in model.injected:
        unit, site = place.unit, model.backbone.sites[place.site]
        if type(unit) is not LoRA:
            raise ValueError(
                f"peft has no format for {type(unit).__name__} at {place.site!r}: of our methods only LoRA exports "
                "with --format peft; leave --format away"
            )
        if isinstance(site, PromptSite) or site.side == "input" or site.enters != site.leaves:
            raise ValueError(
                f"LoRA at {place.site!r} does not read the input of the layer it is added to: peft's does; place it at "
                "a projection, e.g. encoder.attn.query"
            )
        found[names[id(unit)]] = unit
    if not found:
        raise ValueError("nothing to export in peft's format: this model has no LoRA")
    return found


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _lora(model: VLModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    units = _lora_units(model)
    ranks = {name: unit.lora_A.out_features for name, unit in units.items()}
    alphas = {name: unit.alpha for name, unit in units.items()}
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    config = {
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
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(unit, part).weight
        for name, unit in units.items()
        for part in ("lora_A", "lora_B")
    }
    return tensors, config


def _extension(model: VLModel, extension: HFPeft) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if model.injected:
        raise ValueError(
            "peft's format has no place for the units beside a method of peft: export without --format peft"
        )
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model.lm, adapter_name=ADAPTER)
    config = model.lm.peft_config[ADAPTER]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain |= {"inference_mode": True, "task_type": "SEQ_2_SEQ_LM"}
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, plain


def save_peft(model: VLModel, folder: str | Path, *, backbone: str, **record: Any) -> dict[str, Any]:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, and beside them what peft has no place for.

    Args:
        model: With LoRA units, or a method of peft.
        folder: Where to write.
        backbone: The backbone's name.
        record: Passed on to :func:`vlpet_lightning.save_pet`.

    Returns:
        What is in ``pet_config.json``.

    Raises:
        ValueError: For a method that peft has no format for; nothing is written then.
    """
    check_exportable(model)
    extension = model.extension
    tensors, config = _extension(model, extension) if isinstance(extension, HFPeft) else _lora(model)
    adapters = set(model.unit_parameters()) | {f"lm.{name}" for name in model.inserted.state}
    rest = {name: tensor for name, tensor in tensors_to_save(model).items() if name not in adapters}
    folder = Path(folder)
    written = save_pet(model, folder, backbone=backbone, tensors=rest, **record)
    # a record that load_pet would refuse: the units' tensors are in peft's file
    written |= {"format": "peft"}
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": backbone}, indent=2) + "\n")
    notes = NOTES.format(adapter=ADAPTER_WEIGHTS, weights=WEIGHTS, what=", ".join(_parts(rest)))
    write_record(folder, written, notes, loadable=False)
    return written


def _parts(tensors: Iterable[str]) -> list[str]:
    kinds = {
        "the visual embedding": lambda name: name.startswith("visual."),
        "the rows of the added vocabulary": lambda name: "." not in name,
        "trained norms and biases of the language model": lambda name: name.startswith("lm."),
    }
    return [words for words, is_so in kinds.items() if any(is_so(name) for name in tensors)]
