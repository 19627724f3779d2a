"""A SmolVLM small enough to train on a laptop, with a word-level tokenizer and an image processor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)

from vlpet_lightning.backbones.small import check_heads, word_level

PAD, END, IMAGE = "<pad>", "<end_of_utterance>", "<image>"
SPECIALS = (PAD, END, "<unk>", "<|im_start|>", "<fake_token_around_image>", "<global-img>", IMAGE)
TOWER = {  # of 64 patches, of which four are one token
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
}
SCALE = 2  # patches on the side of an image token


def chat_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a lower-casing word-level tokenizer with the special tokens of SmolVLM's prompt.

    Args:
        texts: Texts whose words form the vocabulary, including those of the prompt; other words become ``<unk>``.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=word_level(texts, SPECIALS), eos_token=END, pad_token=PAD, unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIALS[3:])})
    return fast


def small_smolvlm(
    tokenizer: Any, *, width: int, layers: int, heads: int, positions: int = 256
) -> SmolVLMForConditionalGeneration:
    """Build a SmolVLM with random weights, whose images are 128 x 128 pixels and 16 tokens.

    Args:
        tokenizer: Its tokenizer, made by :func:`chat_tokenizer`.
        width: Hidden dimension ``d`` of the decoder.
        layers: Number of layers of the decoder.
        heads: Number of attention heads; two heads share their keys and values.
        positions: Maximum length of a sequence in tokens.

    Raises:
        ValueError: If ``heads`` does not divide ``width``.
    """
    check_heads(width, heads)
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": positions,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
            "eos_token_id": tokenizer.eos_token_id,
            "initializer_range": width**-0.5,
        },
        vision_config=TOWER | {"initializer_range": TOWER["hidden_size"] ** -0.5},
        scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    return SmolVLMForConditionalGeneration(config)


def image_processor() -> SmolVLMImageProcessor:
    """Return the image processor of :func:`small_smolvlm`."""
    side = {"longest_edge": TOWER["image_size"]}
    return SmolVLMImageProcessor(size=side, max_image_size=side, do_image_splitting=False)
