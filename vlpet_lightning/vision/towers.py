"""Vision towers of decoder-only models: the inputs of their projectors, from image files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlpet_lightning.backbones import BACKBONES, backbone_of
from vlpet_lightning.backbones.causal import CausalBackbone
from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.vision.encoders import HF, PACKAGES, EncoderSettings, versions

FEATURES = "projector_input"
# settings of the image processor that are recorded
SETTINGS = (
    *("do_resize", "size", "max_image_size", "resample", "do_center_crop", "crop_size", "do_pad"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


class TowerEncoder:
    """Vision tower of a pretrained model with its own image processor; used like :class:`Encoder` of open_clip.

    Args:
        settings: Settings whose model is ``hf:NAME``, a folder or Hub name.
        device: Device that encodes.
        model: The pretrained model, if it is loaded already, on ``device``.

    Raises:
        ValueError: If the model is of another family, or other features are asked for.
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
        if not family.extractable:
            raise ValueError(
                f"--model {settings.model}: features of a {family.kind} model are not extracted here; write the store "
                "with data_modules.store.FeatureWriter (docs/vlm.md)"
            )
        if settings.features != FEATURES or settings.pool is not None:
            raise ValueError(
                f"features of {settings.model} are the inputs of its projector: add --features {FEATURES} --pool null"
            )
        self.processor = load_image_processor(name, **family.processing)
        self.family = family
        if model is None:
            model = family.load(name, family.text_config(family.config(name)).vocab_size, 0.0).to(device).eval()
        self.model = model
        found = self(self.pixels(torch.zeros(3, 64, 64, dtype=torch.uint8))[None])
        self.tokens, self.dim = found.shape[1:]
        self.record = self._record(name)

    def pixels(self, image: Any) -> Tensor:
        """Return the ``(3, H, W)`` float32 pixels of an image, as the model's own processor makes them.

        Args:
            image: RGB image of Pillow, or a ``(3, H, W)`` tensor.
        """
        found = self.processor(images=[image], return_tensors="pt", **self.family.processing)["pixel_values"]
        return found.flatten(0, -4)[0].float()  # the first view is the whole image

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the tower's output.

        Args:
            pixels: ``(B, 3, H, W)``, made by :meth:`pixels`.

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
        names = ("tower_fingerprint", "features", "image_size", "processing")
        found = [name for name in names if extractor.get(name) != self.record[name]]
        if found:
            raise ValueError(
                f"the model was trained on features of {extractor['model']}, and {self.settings.model} differs in "
                f"{', '.join(found)}: give the model of the training as --backbone"
            )

    def _record(self, name: str) -> dict[str, Any]:
        config = json.loads(json.dumps(self.processor.to_dict(), default=str))
        return {
            "model": f"{HF}{Path(name).name if Path(name).is_dir() else name}",
            "revision": getattr(self.model.config, "_commit_hash", None),
            "tower_fingerprint": self.family.tower_fingerprint(self.model),
            "features": FEATURES,
            "layer": "output of the tower, the input of the projector",
            "precision": self.settings.precision,
            "image_size": list(self.pixels(torch.zeros(3, 64, 64, dtype=torch.uint8)).shape[-2:]),
            "processing": {**{key: config.get(key) for key in SETTINGS}, **self.family.processing},
            "versions": versions(*PACKAGES, "transformers"),
        }
