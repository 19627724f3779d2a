"""Loading and comparing tensors computed by the original implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import BartConfig, T5Config

from vlpet_lightning.batch import Batch
from vlpet_lightning.interop import model_from_original, original_tensors
from vlpet_lightning.model import VLModel

FOLDER = Path(__file__).parent / "testdata" / "original"
MORE = Path(__file__).parents[2] / "shared" / "parity"  # further files, if they are next to the project


def parity_files(pattern: str = "*.safetensors") -> list[Path]:
    """Return the files with computed tensors of a model (testdata/original/README.md)."""
    found = {path.name: path for folder in (MORE, FOLDER) for path in folder.glob(pattern) if _is_of_a_model(path)}
    return [found[name] for name in sorted(found)]


def _is_of_a_model(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return "flags" in (file.metadata() or {})


def tiny_bart() -> BartConfig:
    """Return the config of the BART files' language model, see testdata/original/README.md."""
    return BartConfig(
        vocab_size=80,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        activation_function="gelu",
    )


def tiny_t5(**other: int) -> T5Config:
    """Return the config of the T5 files' language model; ``other`` sizes are those of a file's metadata."""
    sizes = {"vocab_size": 80, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5Config(**sizes | other, decoder_start_token_id=0)


class Parity:
    """Tensors and metadata of one file, with our model and batch."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.metadata: dict[str, Any] = dict(file.metadata())
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        self.flags: list[str] = json.loads(self.metadata["flags"])
        sizes = json.loads(self.metadata.get("config", "{}"))
        config = {"bart": tiny_bart, "t5": tiny_t5}[self.metadata["backbone"]](**sizes)
        self.model: VLModel = model_from_original(self.group("weight"), self.flags, config)

    def group(self, name: str) -> dict[str, Tensor]:
        """Return the tensors whose key starts with ``name.``, without that prefix."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")}

    def batch(self, task: str | None = None) -> Batch:
        """Build a batch from the file's inputs, for its task or another."""
        inputs = self.group("input")
        name = task or {"nlvr": "nlvr2"}.get(self.metadata["task"], self.metadata["task"])
        return Batch(
            task=name,
            input_ids=inputs["input_ids"],
            features=inputs["vis_feats"],
            boxes=inputs.get("boxes"),
            labels=inputs.get("target_ids"),
            weights=inputs.get("scores"),
        )

    def gradients(self) -> dict[str, Tensor]:
        """Return our gradients by the original's names."""
        ours = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return dict(original_tensors(list(self.group("weight")), ours))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference."""
    return (ours - theirs).abs().max().item()
