"""Loading of a model without its vision tower, which training on stored features does not run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from vlpet_lightning.backbones.folder import WEIGHTS


class Unloaded(nn.Module):
    """A part of a model whose parameters have shapes and names, but no values.

    It stays on the meta device: moving the model or changing its type leaves it as it is.

    Args:
        part: The part, on any device.
        rows: First row of each of its matrices, ``(1, ...)``, by name; they recognise the weights.
    """

    def __init__(self, part: nn.Module, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        part = part.to("meta")
        for name, module in part.named_children():
            self.add_module(name, module)
        for name, parameter in part.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.rows = dict(rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Unloaded:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(NOT_LOADED)


NOT_LOADED = (
    "the vision tower is not loaded, as training and testing read stored features: load the whole model with "
    "load_pet(FOLDER) of an export, or set `loads_whole_backbone` of the module before it is built"
)


def is_whole(lm: nn.Module) -> bool:
    """Return whether all parts of a model are loaded."""
    return not any(isinstance(part, Unloaded) for part in lm.modules())


def weights_or_rows(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module by name; of parts that are not loaded, the first rows of the matrices."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    for path, part in module.named_modules():
        if isinstance(part, Unloaded):
            prefix = f"{path}." if path else ""
            for name, _ in part.named_parameters():
                del found[prefix + name]
            found |= {prefix + name: row for name, row in part.rows.items()}
    return found


def parts_outside(lm: nn.Module, tower: str, kept: str) -> list[str]:
    """Return the names of a tower's largest parts that do not hold another module.

    Args:
        lm: The model.
        tower: Name of the tower.
        kept: Name of the other module, such as the projector.
    """
    if tower == kept:
        return []
    if not kept.startswith(f"{tower}."):
        return [tower]
    children = (f"{tower}.{name}" for name, _ in lm.get_submodule(tower).named_children())
    return [part for child in children for part in parts_outside(lm, child, kept)]


def load_without_tower(
    model_class: Any, tower: str, projector: str, files: Mapping[str, Path], name_or_path: str, **settings: Any
) -> Any:
    """Load a pretrained model without the values of its tower.

    transformers reads the weights of the modules that a model has, so the model gets its tower after the weights.

    Args:
        model_class: Class of the model.
        tower: Name of the tower in the model.
        projector: Name of the projector, which is loaded and may be inside the tower.
        files: File of each tensor, see :func:`safetensors_files`.
        name_or_path: Folder or Hub name.
        settings: Settings of ``from_pretrained``, with ``output_loading_info``.

    Returns:
        The model and transformers' loading info; None if the files lack rows to recognise the tower by.
    """
    taken: dict[str, nn.Module] = {}

    def build(lm: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(lm, *args, **kwargs)
        for name in parts_outside(lm, tower, projector):
            taken[name] = lm.get_submodule(name)
            lm.set_submodule(name, nn.Identity())

    # transformers looks up settings by the class's name and module
    same = {"__init__": build, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    towerless: Any = type(model_class.__name__, (model_class,), same)
    lm, info = towerless.from_pretrained(name_or_path, **settings)
    lm.__class__ = model_class
    for name, part in taken.items():
        rows = first_rows(files, tower.rpartition(".")[2], name.removeprefix(tower).lstrip("."), part)
        if rows is None:
            return None
        lm.set_submodule(name, Unloaded(part, rows).train(lm.training))
    return lm, info


def safetensors_files(name_or_path: str) -> dict[str, Path]:
    """Return the safetensors file of each tensor of a pretrained model; empty if its weights are in other files."""
    single, index = (_file(name_or_path, name) for name in (WEIGHTS, f"{WEIGHTS}.index.json"))
    if single is not None:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    if index is None:
        return {}
    shards = json.loads(index.read_text())["weight_map"]
    paths = {shard: _file(name_or_path, shard) for shard in set(shards.values())}
    return {key: path for key, shard in shards.items() if (path := paths[shard]) is not None}


def _file(name_or_path: str, name: str) -> Path | None:
    try:
        found = cached_file(name_or_path, name)
    except OSError:  # there is no such file
        return None
    return None if found is None else Path(found)


def first_rows(files: Mapping[str, Path], tower: str, path: str, part: nn.Module) -> dict[str, Tensor] | None:
    """Read the first row of each matrix of a part of a tower, without reading the others.

    Names in files may have another beginning, and one more module between the tower and its parts (the ``vision_model``
    of files that older versions of transformers wrote).

    Args:
        files: File of each tensor.
        tower: Last component of the tower's name.
        path: Name of the part in the tower; empty for the tower.
        part: The part, for the shapes.

    Returns:
        Tensors ``(1, ...)`` by their name in the part; None if a matrix is not found once, with its shape.
    """
    keys: dict[str, list[str]] = defaultdict(list)  # by name in the tower
    for key in files:
        _, inside, name = f".{key}".rpartition(f".{tower}.")
        for known in (name, name.partition(".")[2]) if inside else ():
            keys[known].append(key)
    found = {}
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in set(files.values())}
        for name, parameter in part.named_parameters():
            if parameter.dim() < 2:
                continue
            same = keys[f"{path}.{name}" if path else name]
            rows = opened[files[same[0]]].get_slice(same[0]) if len(same) == 1 else None
            if rows is None or tuple(rows.get_shape()) != tuple(parameter.shape):
                return None
            found[name] = rows[:1].clone()  # without the file's memory map
    return found
