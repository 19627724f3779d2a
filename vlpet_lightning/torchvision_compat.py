"""Make ``import torchvision`` work beside a CPU-only torch.

The registry's torchvision wheels are linked against CUDA. On a CPU-only torch their compiled part does not load, the
operator schemas it would have registered are missing, and importing torchvision (which lightning, torchmetrics, timm,
open_clip and transformers all do) raises ``operator torchvision::nms does not exist``. Nothing here uses those two
operators, so declaring their schemas is enough. Where the compiled part loads, this module does nothing.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_library: torch.library.Library | None = None  # a Library undoes its definitions when it is collected


def compiled_part_loads() -> bool:
    """True if torchvision's compiled operators load beside this torch (or there is no torchvision)."""
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
    """Declare the schemas that torchvision's import needs and its compiled part did not bring.

    Returns:
        The names that were declared; empty where the compiled part loads.
    """
    global _library
    if compiled_part_loads():
        return []
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = _library or torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _library.define(SCHEMAS[name])
    return missing


define_missing_operators()
