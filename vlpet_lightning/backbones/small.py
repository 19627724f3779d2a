"""A BART small enough to train on a laptop, and its word-level tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from vlpet_lightning.backbones.tokenizer import ADDED_TOKENS

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4, as in BartConfig
CHOICES = ("false", "true")  # NLVR2 is answered from the logits of these two tokens
WORD = r"[\w'-]+|[^\w\s]"  # a word, possibly with hyphens and apostrophes, or a punctuation mark
NEVER = -1e4  # a logit whose softmax is exactly 0 in float32


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a lower-casing word-level tokenizer that includes the tokens added by the benchmark.

    Args:
        texts: Texts whose words form the vocabulary; other words become ``<unk>``.

    Returns:
        A tokenizer with BART's ids for the special tokens, then the words by decreasing frequency, then the added
        tokens.
    """
    splitter = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    lower = normalizers.Lowercase()
    counts: Counter[str] = Counter()
    for text in texts:
        for mark in SPECIALS:
            text = text.replace(mark, " ")
        counts.update(word for word, _ in splitter.pre_tokenize_str(lower.normalize_str(text)))
    words = sorted({*counts, *CHOICES}, key=lambda word: (-counts[word], word))
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = lower
    tokenizer.pre_tokenizer = splitter
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
    fast.add_tokens(ADDED_TOKENS, special_tokens=True)
    return fast


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
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}: choose a divisor")
    config = BartConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=positions,
        dropout=0.0,
        init_std=width**-0.5,  # BART's 0.02 suits a width of 768; with it, this encoder would hardly learn
    )
    lm = BartForConditionalGeneration(config)
    added = len(ADDED_TOKENS)
    with torch.no_grad():
        nn.init.normal_(lm.model.shared.weight[-added:], std=order_std)
        lm.final_logits_bias[:, -added:] = NEVER
    return lm
