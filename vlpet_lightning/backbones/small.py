"""A BART, mBART or T5 small enough to train on a laptop, and its word-level tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from vlpet_lightning.backbones.loading import quiet
from vlpet_lightning.backbones.tokenizer import ADDED_TOKENS
from vlpet_lightning.checks import choice

Kind = Literal["bart", "mbart", "t5"]
KINDS = ("bart", "mbart", "t5")
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4, as in BartConfig
T5_SPECIALS = ("<pad>", "</s>", "<unk>")  # ids 0 to 2, as in T5Config
CHOICES = ("false", "true")  # NLVR2 is answered from the logits of these two tokens
WORD = r"[\w'-]+|[^\w\s]"  # a word, possibly with hyphens and apostrophes, or a punctuation mark
NEVER = -1e4  # a logit whose softmax is exactly 0 in float32


def word_tokenizer(texts: Iterable[str], kind: Kind = "bart") -> PreTrainedTokenizerFast:
    """Build a lower-casing word-level tokenizer that includes the tokens added by the benchmark.

    Args:
        texts: Texts whose words form the vocabulary; other words become ``<unk>``.
        kind: Backbone whose special tokens are used.

    Returns:
        A tokenizer with the backbone's ids for the special tokens, then the words by decreasing frequency, then the
        added tokens.
    """
    specials = T5_SPECIALS if kind == "t5" else SPECIALS
    tokenizer = word_level(texts, specials)
    template = "$A </s>" if kind == "t5" else "<s> $A </s>"
    ends = [(token, specials.index(token)) for token in ("<s>", "</s>") if token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names |= {} if kind == "t5" else {"bos_token": "<s>", "mask_token": "<mask>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_tokens(ADDED_TOKENS, special_tokens=True)
    return fast


def word_level(texts: Iterable[str], specials: Sequence[str]) -> Tokenizer:
    """Build a lower-casing word-level tokenizer: special tokens, then words by decreasing frequency."""
    splitter = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    lower = normalizers.Lowercase()
    counts: Counter[str] = Counter()
    for text in texts:
        for mark in specials:
            text = text.replace(mark, " ")
        counts.update(word for word, _ in splitter.pre_tokenize_str(lower.normalize_str(text)))
    words = sorted({*counts, *CHOICES}, key=lambda word: (-counts[word], word))
    vocabulary = {token: index for index, token in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = lower
    tokenizer.pre_tokenizer = splitter
    return tokenizer


def small_bart(
    vocabulary: int, *, width: int, layers: int, heads: int, order_std: float = 1.0, positions: int = 128
) -> BartForConditionalGeneration:
    """Build a BART with random weights whose last token embedding rows are used for image tokens.

    These rows (:data:`ADDED_TOKENS`) never occur in text, so pretraining does not change them; the visual embedding
    uses them to encode the position of an image token. Text tokens pass through a layer norm and image tokens do not,
    so rows from the usual ``N(0, 0.02)`` would be negligible compared with the features. However, such large rows would
    dominate the tied output layer, so BART's ``final_logits_bias`` removes them from every softmax.

    Args:
        vocabulary: Number of tokens, including the added tokens at the end.
        width: Hidden dimension ``d``.
        layers: Number of layers of the encoder and of the decoder.
        heads: Number of attention heads.
        order_std: Standard deviation of the added tokens' rows.
        positions: Maximum text length in tokens.

    Raises:
        ValueError: If ``heads`` does not divide ``width``.
    """
    lm = BartForConditionalGeneration(BartConfig(**_bart_sizes(vocabulary, width, layers, heads, positions)))
    added = len(ADDED_TOKENS)
    with torch.no_grad():
        nn.init.normal_(lm.model.shared.weight[-added:], std=order_std)
        lm.final_logits_bias[:, -added:] = NEVER
    return lm


def small_mbart(vocabulary: int, *, width: int, layers: int, heads: int) -> MBartForConditionalGeneration:
    """Build an mBART with random weights; the language is that of the tokenizer with which it is loaded.

    Args:
        vocabulary: Number of tokens, including the added tokens at the end.
        width: Hidden dimension ``d``.
        layers: Number of layers of the encoder and of the decoder.
        heads: Number of attention heads.

    Raises:
        ValueError: If ``heads`` does not divide ``width``.
    """
    sizes = _bart_sizes(vocabulary, width, layers, heads, positions=128)
    return MBartForConditionalGeneration(MBartConfig(**sizes, scale_embedding=True))


def _bart_sizes(vocabulary: int, width: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    check_heads(width, heads)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "max_position_embeddings": positions,
        "dropout": 0.0,
        "init_std": width**-0.5,  # BART's 0.02 suits a width of 768; with it, this encoder would hardly learn
    }


def small_t5(vocabulary: int, *, width: int, layers: int, heads: int) -> T5ForConditionalGeneration:
    """Build a T5 with random weights; its own initialisation draws token embeddings from ``N(0, 1)``.

    Args:
        vocabulary: Number of tokens, including the added tokens at the end.
        width: Hidden dimension ``d``.
        layers: Number of layers of the encoder and of the decoder.
        heads: Number of attention heads.

    Raises:
        ValueError: If ``heads`` does not divide ``width``.
    """
    check_heads(width, heads)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}: choose a divisor")


def random_backbone(
    folder: str | Path,
    texts: Iterable[str],
    kind: Kind = "bart",
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
) -> Path:
    """Write a small language model with random weights and its tokenizer, for trials without a download.

    ``pretrain`` trains such a model on text, and a frozen model that has learned the language gets far better scores.

    >>> import tempfile
    >>> import vlpet_lightning as vl
    >>> folder = vl.random_backbone(tempfile.mkdtemp(), ["what color is the circle ?", "red", "green"])
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']

    Args:
        folder: Folder to write; an earlier backbone in it is replaced.
        texts: Texts whose words form the vocabulary, e.g. all questions and answers.
        kind: ``bart``, ``mbart`` or ``t5``.
        width: Hidden dimension ``d``.
        layers: Number of layers of the encoder and of the decoder.
        heads: Number of attention heads.
        seed: Seed of the weights.

    Returns:
        The folder, as the ``backbone`` of a model.

    Raises:
        FileExistsError: If the folder holds anything but a backbone.
        ValueError: If ``heads`` does not divide ``width``, or the kind is unknown.
    """
    folder = Path(folder)
    choice("kind", kind, KINDS)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something else than a backbone: choose another folder")
    tokenizer = word_tokenizer(texts, kind)
    small: Any = {"bart": small_bart, "mbart": small_mbart, "t5": small_t5}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = small(len(tokenizer), width=width, layers=layers, heads=heads)
    with quiet():
        lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
