"""VL-PET's gates made visible: recording, statistics, figures and a page."""

from vlpet_lightning.gates.recording import Gates, encode_with_gates

__all__ = ["Gates", "encode_with_gates"]
