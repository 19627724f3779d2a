"""Backbones small enough for tests: two layers, a word-level vocabulary, saved in the real formats."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = """
    vqa gpa gqa nlvr caption : ? . a the is what which color shape red blue green circle square triangle big small left
    right image of in there yes no true false one two both images show how many picture
""".split()
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # BART's ids 0 to 4
WIDTH = 32


def save_tokenizer(folder: Path) -> int:
    """Write a word-level tokenizer and return its size."""
    vocabulary = {word: index for index, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_backbone(folder: Path, seed: int = 0, dropout: float = 0.1) -> Path:
    """Write a random two-layer BART with its tokenizer."""
    vocabulary = save_tokenizer(folder)
    config = BartConfig(
        vocab_size=vocabulary,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_position_embeddings=64,
        dropout=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


T5_SPECIALS = ["<pad>", "</s>", "<unk>"]  # T5's ids 0 to 2


def save_t5_tokenizer(folder: Path) -> int:
    """Write a word-level tokenizer with T5's special tokens and return its size."""
    pieces = T5_SPECIALS + WORDS + [f"<extra_id_{i}>" for i in reversed(range(100))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_t5_backbone(folder: Path, seed: int = 0, dropout: float = 0.1) -> Path:
    """Write a random two-layer T5 with its tokenizer."""
    vocabulary = save_t5_tokenizer(folder)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
