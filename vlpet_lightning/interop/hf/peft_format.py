"""Export of LoRA in the format of Hugging Face peft, for ``PeftModel.from_pretrained``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vlpet_lightning.checksums import checksum
from vlpet_lightning.interop.export.pet_files import check_exportable, save_pet, tensors_to_save
from vlpet_lightning.interop.export.record import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT,
    WEIGHTS,
    write_record,
)
from vlpet_lightning.interop.hf.adapter import adapter_config, adapter_names, adapter_tensors
from vlpet_lightning.model import VLModel

NOTES = """## This folder is in the format of Hugging Face peft

```python
from peft import PeftModel

model = PeftModel.from_pretrained(language_model, "DIR")
```

`{adapter}` holds only the adapter of the language model. The other trained tensors ({what}) are in
`{weights}`, because peft's format has no place for them; without them the model cannot read images. `load_pet`
reads both files.
"""


def save_peft(model: VLModel, folder: str | Path, *, backbone: str, **record: Any) -> dict[str, Any]:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, and our file with the other tensors.

    Args:
        model: A model with LoRA units or a method of peft.
        folder: Where to write.
        backbone: The backbone's name.
        record: Further arguments of :func:`vlpet_lightning.save_pet`.

    Returns:
        What is in ``pet_config.json``.

    Raises:
        ValueError: For a method that peft has no format for; nothing is written then.
    """
    check_exportable(model)
    tensors, config = adapter_tensors(model), adapter_config(model)
    elsewhere = adapter_names(model)
    rest = {name: tensor for name, tensor in tensors_to_save(model).items() if name not in elsewhere}
    folder = Path(folder)
    written = save_pet(model, folder, backbone=backbone, tensors=rest, **record)
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS)
    written |= {"format": PEFT, "adapter": {"sha256": checksum(folder / ADAPTER_WEIGHTS)}}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": backbone}, indent=2) + "\n")
    notes = NOTES.format(adapter=ADAPTER_WEIGHTS, weights=WEIGHTS, what=", ".join(_parts(rest)))
    write_record(folder, written, notes)
    return written


def _parts(tensors: Iterable[str]) -> list[str]:
    kinds = {
        "the visual embedding": lambda name: name.startswith("visual."),
        "the rows of the added vocabulary": lambda name: "." not in name,
        "trained norms and biases of the language model": lambda name: name.startswith("lm."),
    }
    return [words for words, is_so in kinds.items() if any(is_so(name) for name in tensors)]
