"""Decoder-only models small enough for tests, with random weights, and batches of their features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SmolVLMConfig

from tests.data_modules.tiny_data import DIM
from tests.tiny import WORDS as WORDS_OF_THE_WORLD
from vlpet_lightning import Batch
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.backbones.template import Template
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import Placement

PAD, START, END = 0, 7, 2
IMAGE, WORDS = 50, (10, 40)  # token of images, and range of ordinary tokens
TEMPLATE = Template((3, 4), (51, 52), (51,), (5,), (6, START), end=END, pad=PAD)
WIDTH, VALUES, TOWER, SIDE = 32, 16, 24, 32  # of the decoder, its values, the tower and images


def smolvlm(**text: Any) -> SmolVLMConfig:
    """Return the config of a tiny SmolVLM, with two key-value heads for four heads."""
    decoder = {
        "model_type": "llama",
        "vocab_size": 60,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": END,
        "max_position_embeddings": 128,
    }
    tower = {
        "hidden_size": TOWER,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return SmolVLMConfig(text_config=decoder | text, vision_config=tower, scale_factor=2, image_token_id=IMAGE)


CONFIGS = {"smolvlm": smolvlm}


def build(kind: str, placements: list[Placement] | None = None, trainable: tuple[str, ...] = ("all",)) -> VLModel:
    """Build a tiny model whose weights are large enough that every token matters."""
    backbone = BACKBONES[kind].with_template(TEMPLATE)  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = backbone.build(CONFIGS[kind]()).eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        model = VLModel(backbone, lm, feature_dim=TOWER, placements=placements or [], trainable=trainable)
    return model.eval()


def draw(images: int = 1, samples: int = 3, seed: int = 0) -> tuple[Batch, Tensor]:
    """Return a batch without features, whose last sample is the shortest, and its ``(B, N, 3, 32, 32)`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(*WORDS, (samples, 5), generator=generator)
    labels = torch.randint(*WORDS, (samples, 4), generator=generator)
    words[:, -1] = END
    words[-1, 3:] = torch.tensor([END, PAD])
    labels[-1, 2:] = torch.tensor([END, IGNORED])
    pixels = torch.randn(samples, images, 3, SIDE, SIDE, generator=generator)
    task = "vqa" if images == 1 else "nlvr2"
    batch = Batch(task=task, input_ids=words, features=torch.empty(0), labels=labels)
    return batch, pixels


@torch.no_grad()
def extracted(model: VLModel, pixels: Tensor) -> Tensor:
    """Return what the tower gives the projector, ``(B, N, F, D)``."""
    patches = torch.ones(1, SIDE // 8, SIDE // 8, dtype=torch.bool)
    flat = pixels.flatten(0, 1)
    found = model.lm.model.vision_model(flat, patch_attention_mask=patches.expand(len(flat), -1, -1))
    return found.last_hidden_state.unflatten(0, pixels.shape[:2])


def with_features(model: VLModel, batch: Batch, pixels: Tensor) -> Batch:
    """Add the features of the pixels; of one image without an axis for it."""
    features = extracted(model, pixels)
    batch.features = features[:, 0] if pixels.shape[1] == 1 else features
    return batch


def prompt_of(ids: Tensor, images: int, per_image: int = 4) -> list[int]:
    """Return the whole prompt of a sample as the library's own processor would."""
    before, around, after, between, last = (
        list(part)
        for part in (TEMPLATE.before, TEMPLATE.image_before, TEMPLATE.image_after, TEMPLATE.between, TEMPLATE.after)
    )
    pictures = [*around, *[IMAGE] * per_image, *after] * images
    return [*before, *pictures, *between, *[token for token in ids.tolist() if token not in (PAD, END)], *last]


MARKS = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>")


def save_smolvlm(folder: Path) -> Path:
    """Write a tiny SmolVLM that reads the features of tests/data_modules/tiny_data.py, with its tokenizer."""
    words = [*WORDS_OF_THE_WORLD, "User", "Assistant", ":", "What", "colour", "thing", *map(str, range(20))]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<unk>", *MARKS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end_of_utterance>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(MARKS)})
    fast.save_pretrained(folder)
    config = smolvlm(vocab_size=len(fast), pad_token_id=0, eos_token_id=vocabulary["<end_of_utterance>"])
    config.image_token_id = vocabulary["<image>"]
    config.vision_config.hidden_size, config.vision_config.image_size = DIM, 16  # 4 patches
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BACKBONES["smolvlm"].build(config).save_pretrained(folder)
    return folder
