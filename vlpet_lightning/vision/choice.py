"""Choice of the encoder of some settings: open_clip's, or a model's own tower."""

from __future__ import annotations

from typing import Any

from vlpet_lightning.vision.encoders import HF, Encoder, EncoderSettings
from vlpet_lightning.vision.towers import FEATURES, TowerEncoder

AnyEncoder = Any  # Encoder or TowerEncoder, which have the same interface except for calibration


def make_encoder(settings: EncoderSettings, device: str = "cpu") -> AnyEncoder:
    """Build the encoder of some settings.

    Args:
        settings: Settings; a model ``hf:NAME`` is one of Hugging Face.
        device: Device that encodes.

    Raises:
        ValueError: If there is no such model, or it has no such features.
        FileNotFoundError: If files of the model are not available.
    """
    if settings.model.startswith(HF):
        return TowerEncoder(settings, device)
    given = [name for name, value in settings.image_settings.items() if value is not None]
    if given:
        raise ValueError(
            f"--{given[0]} is for models of Hugging Face (--model {HF}NAME): omit it with {settings.model}"
        )
    if settings.features == FEATURES:
        raise ValueError(f"--features {FEATURES} is for models of Hugging Face (--model {HF}NAME)")
    return Encoder(settings, device)
