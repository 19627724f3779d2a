"""Make ``import torchvision`` work beside a CPU-only torch.

The registry's torchvision wheels are linked against CUDA. With a CPU-only torch their compiled extension does not load,
so the operator schemas that it registers are missing. Importing torchvision (which lightning, torchmetrics, timm,
open_clip and transformers all do) then raises ``operator torchvision::nms does not exist``. This library uses neither
of the two operators, so declaring their schemas is enough. If the extension loads, this module does nothing.

The schemas are declared when torchvision is first imported, so that importing this package does not import torch.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_library: Any = None  # a torch.library.Library undoes its definitions when it is collected


def compiled_part_loads() -> bool:
    """Return whether torchvision's compiled operators load beside this torch, or torchvision is not installed."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    folder = str(Path(spec.origin).parent)
    details = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(folder, details).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


def define_missing_operators() -> list[str]:
    """Declare the schemas that torchvision's import needs and its compiled part did not register.

    Returns:
        The names that were declared; empty where the compiled part loads.
    """
    global _library
    import torch

    if compiled_part_loads():
        return []
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = _library or torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _library.define(SCHEMAS[name])
    return missing


class _BeforeTorchvision:
    """Import hook that declares the operators when torchvision is first looked for; it finds no module itself."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            define_missing_operators()


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _BeforeTorchvision())
