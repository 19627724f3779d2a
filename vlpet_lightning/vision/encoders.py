"""Image encoders of open_clip: the model, its preprocessing, and a record of both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import open_clip
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.transforms import Compose, PILToTensor

from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.backbones.visual import pool_grid
from vlpet_lightning.checksums import checksum

CALIBRATION = 256  # images
CALIBRATION_BATCH = 64
PACKAGES = ("open_clip_torch", "timm", "torch", "pillow")  # packages whose versions are recorded
LAYERS = {"grid": "the last grid, before attention pooling", "embedding": "the image embedding, not normalised"}
Features = Literal["grid", "embedding", "projector_input"]
HF = "hf:"  # prefix of models of Hugging Face, whose own towers make the features
Precision = Literal["float32", "bf16"]
Resize = Literal["squash", "shortest", "longest"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of an encoder.

    Args:
        model: Name of an open_clip model, a JSON file with an architecture, or ``hf:NAME``, a model whose own tower
            encodes.
        pretrained: Tag or file of the weights; None for random weights.
        features: ``grid`` for the vectors of all grid positions, ``embedding`` for the one vector of the whole image,
            ``projector_input`` for the output of a model's own tower.
        pool: Side of the grid that grid features are max-pooled to; None keeps the encoder's.
        resize: How an image is made square.
        precision: ``bf16`` computes in bfloat16 where autocast considers it safe.
        seed: Seed of random weights.
        image_settings: Settings of the model of ``hf:NAME`` on which the number of feature vectors depends, as for
            :class:`~vlpet_lightning.VLCausal`, e.g. ``image_size``.
    """

    model: str
    pretrained: str | None = None
    features: Features = "grid"
    pool: int | None = None
    resize: Resize = "squash"
    precision: Precision = "float32"
    seed: int = 0
    image_settings: Mapping[str, Any] = field(default_factory=dict)


def load_model(model: str, pretrained: str | None, seed: int) -> nn.Module:
    """Load an open_clip model in evaluation mode.

    Args:
        model: Name of an open_clip model, or a JSON file with an architecture.
        pretrained: Tag or file of the weights; None for random weights.
        seed: Seed of random weights.

    Raises:
        ValueError: If there is no such model, or it has no such weights.
        FileNotFoundError: If the weights are not available.
    """
    name = model
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise FileNotFoundError(f"no model config {model}: give a JSON file, or a name that open_clip knows")
        open_clip.add_model_config(Path(model))
        name = Path(model).stem
    if name not in open_clip.list_models():
        raise ValueError(f"unknown open_clip model {model!r}: choose from {', '.join(open_clip.list_models())}")
    is_tag = pretrained is not None and not Path(pretrained).is_file()
    if is_tag and pretrained not in open_clip.list_pretrained_tags_by_model(name):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tags"
        raise ValueError(
            f"{name} has no weights {pretrained!r}: give a file, one of {known}, or null for random weights"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if pretrained is None:
                logging.disable(logging.WARNING)  # open_clip warns of random weights, which were asked for
            return open_clip.create_model(
                name, pretrained=pretrained, force_quick_gelu=is_tag and needs_quick_gelu(name, pretrained)
            ).eval()
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the weights {pretrained!r} of {name} cannot be loaded ({error}): give --pretrained a file of "
                "weights for this model, or run where the hub can be reached"
            ) from error
        finally:
            logging.disable(logging.NOTSET)


def needs_quick_gelu(name: str, tag: str | None) -> bool:
    """Whether the weights were trained with the approximate GELU of OpenAI's CLIP.

    open_clip's configs of the same name use the exact GELU and load such weights with only a warning; the features of
    a ViT are then wrong.
    """
    return bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False))


class Encoder:
    """Image encoder with its preprocessing.

    Args:
        settings: Settings of the encoder.
        device: Device that encodes.

    Raises:
        ValueError: If there is no such model or weights, or the model has no such features or cannot pool them to this
            size.
        FileNotFoundError: If the weights are not available.
    """

    def __init__(self, settings: EncoderSettings, device: str = "cpu") -> None:
        self.settings = settings
        self.device = device
        self.model = load_model(settings.model, settings.pretrained, settings.seed).to(device)
        preprocessing = open_clip.get_model_preprocess_cfg(self.model)
        size, mean, std = preprocessing["size"], preprocessing["mean"], preprocessing["std"]
        self.interpolation = preprocessing.get("interpolation", "bicubic")
        self.image_size = tuple(size) if isinstance(size, tuple | list) else (size, size)
        self.mean, self.std = list(mean), list(std)
        self.transform: Compose = open_clip.image_transform(
            size, is_train=False, mean=mean, std=std, resize_mode=settings.resize, interpolation=self.interpolation
        )
        # the last two transforms convert to float and normalise; __call__ does so per batch, from 1/4 of the bytes
        self.pixels = Compose([*self.transform.transforms[:-2], PILToTensor()])
        self.record = self._record()
        try:
            self.tokens, self.dim = self(torch.zeros(1, 3, *self.image_size, dtype=torch.uint8)).shape[1:]
        except (RuntimeError, TypeError, AttributeError, AssertionError) as error:  # raised by open_clip, e.g. for CoCa
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{settings.model} has no {settings.features} features ({reason}): choose another model or other "
                "--features"
            ) from error

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: ``(B, 3, H, W)`` uint8, made by :attr:`pixels`.

        Returns:
            ``(B, tokens, dim)`` float32 on the CPU. Grid features are a ResNet's grid before attention pooling, or a
            ViT's patch tokens after the last norm, row by row; embedding features are one token, the image embedding.
        """
        white, mean, std = (
            torch.tensor(value, device=self.device).view(-1, 1, 1) for value in (255.0, self.mean, self.std)
        )
        images = pixels.to(self.device).float().div_(white).sub_(mean).div_(std)  # bit-identical to the transform
        kind = torch.device(self.device).type
        with (
            torch.autocast(kind, torch.bfloat16, enabled=self.settings.precision == "bf16"),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # cuDNN uses TF32 (10 bits) otherwise
        ):
            if self.settings.features == "embedding":
                return self.model.encode_image(images)[:, None].float().cpu()  # type: ignore[operator]
            output: Any = self.model.forward_intermediates(  # type: ignore[operator]
                image=images, image_indices=1, intermediates_only=True, normalize_intermediates=True
            )
            grid = output["image_intermediates"][-1].flatten(2).transpose(1, 2)
            return pool_grid(grid, self.settings.pool).float().cpu()

    @property
    def needs_calibration(self) -> bool:
        """Whether the weights are random and there are batch norms; see :meth:`calibrate`."""
        return self.settings.pretrained is None and bool(self._norms)

    def calibrate(self, images: Sequence[Tensor]) -> None:
        """Set the batch norm statistics of random weights from images; does nothing without batch norms.

        Without this, the features of an untrained ResNet are so small that float16 can hardly distinguish them.

        Args:
            images: ``(3, H, W)`` uint8 each, made by :attr:`pixels`.
        """
        if not self.needs_calibration or not images:
            return
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average over batches
            norm.train()
        for start in range(0, len(images), CALIBRATION_BATCH):
            self(torch.stack(list(images[start : start + CALIBRATION_BATCH])))
        self.model.eval()

    def save_calibration(self, path: Path) -> None:
        """Save the batch norm statistics."""
        statistics = {name: value for name, value in self.model.state_dict().items() if ".running_" in name}
        with atomic_write(path) as file:
            file.write(save({name: value.cpu().contiguous() for name, value in statistics.items()}))

    def load_calibration(self, path: Path) -> None:
        """Load statistics saved by :meth:`save_calibration`."""
        self.model.load_state_dict(load_file(path), strict=False)

    @property
    def _norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def _record(self) -> dict[str, Any]:
        model, pretrained = self.settings.model, self.settings.pretrained
        config = Path(model) if model.endswith(".json") else None
        weights = Path(pretrained) if pretrained is not None and Path(pretrained).is_file() else None
        grid = self.settings.features == "grid"
        return {
            "model": model if config is None else config.stem,
            "config_sha256": None if config is None else hashlib.sha256(config.read_bytes()).hexdigest(),
            "pretrained": pretrained if weights is None else weights.name,
            "weights_sha256": None if weights is None else checksum(weights),
            "quick_gelu": pretrained is not None and weights is None and needs_quick_gelu(model, pretrained),
            "seed": self.settings.seed if pretrained is None else None,
            "features": self.settings.features,
            "layer": LAYERS[self.settings.features],
            "pool": self.settings.pool if grid else None,
            "precision": self.settings.precision,
            "image_size": list(self.image_size),
            "mean": self.mean,
            "std": self.std,
            "resize": self.settings.resize,
            "interpolation": self.interpolation,
            "versions": versions(*PACKAGES),
        }


def versions(*packages: str) -> str:
    """Return the versions of those packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def evenly(items: Sequence[Item], count: int = CALIBRATION) -> list[Item]:
    """Return ``count`` evenly spaced items; items repeat if there are fewer."""
    return [items[int(place)] for place in torch.linspace(0, len(items) - 1, count)] if items else []
