"""Vision towers of decoder-only models: the inputs of their projectors, from image files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlpet_lightning.backbones import BACKBONES, backbone_of
from vlpet_lightning.backbones.causal import CausalBackbone
from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.backbones.pixels import PixelReader, processing_record
from vlpet_lightning.vision.encoders import HF, PACKAGES, EncoderSettings, versions

FEATURES = "projector_input"


def recorded_settings(name: str, extractor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image settings of a model in a record of its features."""
    return {setting: extractor.get(setting) for setting in getattr(backbone_of(name), "image_settings", ())}


class TowerEncoder:
    """Vision tower of a pretrained model with its own image processor; used like :class:`Encoder` of open_clip.

    Args:
        settings: Settings whose model is ``hf:NAME``, a folder or Hub name.
        device: Device that encodes.
        model: The :class:`~vlpet_lightning.model.VLModel` of the pretrained model, if it is loaded already, on
            ``device``; its image settings replace those of ``settings``.

    Raises:
        ValueError: If the model is of another family, an image setting does not apply or is missing, or other features
            are asked for.
        FileNotFoundError: If the model or its image processor is not available.
    """

    needs_calibration = False

    def __init__(self, settings: EncoderSettings, device: str = "cpu", model: Any = None) -> None:
        name = settings.model.removeprefix(HF)
        self.settings, self.device = settings, device
        family = backbone_of(name)
        if not isinstance(family, CausalBackbone):
            known = ", ".join(sorted(kind for kind, one in BACKBONES.items() if isinstance(one, CausalBackbone)))
            raise ValueError(f"--model {settings.model}: {name!r} has no vision tower; choose a model of {known}")
        if settings.features != FEATURES or settings.pool is not None:
            raise ValueError(
                f"features of {settings.model} are the inputs of its projector: add --features {FEATURES} --pool null"
            )
        self.family = family.with_sizes(settings.image_settings) if model is None else model.backbone
        self.config = family.config(name)
        self.family.vectors(self.config)  # raises if an image setting is missing or does not fit
        self.processor = load_image_processor(name, **self.family.processing)
        pixels = self.pixels(Image.new("RGB", (64, 64)))
        if model is None:
            vocabulary = family.text_config(self.config).vocab_size
            self.model = family.load(name, vocabulary, 0.0).to(device).eval()
        else:
            self.model = model.lm
        self.tokens, self.dim = self(pixels[None]).shape[1:]
        self.record = self._record(name, pixels)

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the tower's input for an RGB image, as the model's own processor makes it, without the batch axis."""
        return self.family.pixels(self.config, self.processor, image)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the tower's output.

        Args:
            pixels: ``(B, ...)``, made by :meth:`pixels`.

        Returns:
            ``(B, F, D)`` float32 on the CPU.
        """
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self.family.tower_output(self.model, pixels.to(self.device)).float().cpu()

    def check(self, extractor: Mapping[str, Any]) -> None:
        """Check that the features of a record are those of this tower and image processor.

        Args:
            extractor: ``extractor`` in the ``meta.json`` of a feature store.

        Raises:
            ValueError: If they differ; names what differs.
        """
        names = ("tower_fingerprint", "features", "image_size", "processing", *self.family.image_settings)
        _check_same(extractor, self.record, names, self.settings.model)

    def _record(self, name: str, pixels: Tensor) -> dict[str, Any]:
        return {
            "model": f"{HF}{Path(name).name if Path(name).is_dir() else name}",
            "revision": getattr(self.model.config, "_commit_hash", None),
            "tower_fingerprint": self.family.tower_fingerprint(self.model),
            "features": FEATURES,
            "layer": "output of the tower, the input of the projector",
            "precision": self.settings.precision,
            "image_size": list(pixels.shape[-2:]),
            **self.family.recorded_settings(),
            "processing": processing_record(self.family, self.processor),
            "versions": versions(*PACKAGES, "transformers"),
        }


class PixelEncoder:
    """Pixels of images for a model that runs its own vision tower; used like :class:`TowerEncoder`.

    Args:
        name: Folder or Hub name of the pretrained model.
        model: Its :class:`~vlpet_lightning.model.VLModel`.

    Raises:
        FileNotFoundError: If the image processor is not available.
    """

    needs_calibration = False

    def __init__(self, name: str, model: Any) -> None:
        self.pixels = PixelReader(model.backbone, model.lm.config, name)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the ``(B, F, D)`` pixels as they are."""
        return pixels

    def check(self, extractor: Mapping[str, Any]) -> None:
        """Check that images are processed as those of a record.

        Args:
            extractor: ``extractor`` in the record.

        Raises:
            ValueError: If they are not; names what differs.
        """
        _check_same(
            extractor, self.pixels.record(), ("processing", *self.pixels.backbone.image_settings), self.pixels.name
        )


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Sequence[str], model: str) -> None:
    found = [name for name in names if theirs.get(name) != ours[name]]
    if found:
        raise ValueError(
            f"the model was trained on features of {theirs['model']}, and {model} differs in "
            f"{', '.join(found)}: give the model of the training as --backbone"
        )
