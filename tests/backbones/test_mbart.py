"""mBART: languages of the two tokenizers, scaled embeddings, probabilities of answers."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    MBart50Tokenizer,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.mbart.modeling_mbart import shift_tokens_right
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as CODES_25
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as CODES_50

from tests.conformance.bench import ENGLISH, bare, config, loud, make_batch
from vlpet_lightning import VLMBart
from vlpet_lightning import make_batch as batch_of
from vlpet_lightning.answers import sequence_probabilities
from vlpet_lightning.backbones import BACKBONES, config_of
from vlpet_lightning.backbones.mbart import set_language
from vlpet_lightning.interop.export.merge import save_merged

MBART = BACKBONES["mbart"]
PIECES = "▁what ▁color ▁is ▁it ▁red ▁blue ▁dark ▁true ▁false ▁vqa : ▁".split()
TOKENIZERS = {"50": (MBart50Tokenizer, CODES_50), "cc25": (MBartTokenizer, CODES_25)}


def save(folder, name, language):
    """Save a tiny mBART with a tokenizer of the real class and all its language codes."""
    cls, codes = TOKENIZERS[name]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocabulary = [*special, *((piece, -2.0) for piece in PIECES), *((code, 0.0) for code in codes), ("<mask>", 0.0)]
    cls(vocab=vocabulary, src_lang=language).save_pretrained(folder)
    settings = config("mbart")
    settings.update({"vocab_size": len(vocabulary), "decoder_start_token_id": None, "forced_first_token_id": None})
    lm = MBartForConditionalGeneration(settings)
    loud({key: p for key, p in lm.named_parameters() if p.dim() > 1})
    lm.save_pretrained(folder)


@pytest.fixture(scope="module", params=[("50", "en_XX"), ("50", "de_DE"), ("cc25", "en_XX"), ("cc25", "de_DE")])
def loaded(request, tmp_path_factory):
    name, language = request.param
    folder = tmp_path_factory.mktemp("mbart")
    save(folder, name, language)
    module = VLMBart(str(folder), feature_dim=16, grid=None)
    module.configure_model()
    features = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    batch = batch_of(module, "vqa", ["what color is it", "what"], features, ["dark red", "blue"])
    return SimpleNamespace(name=name, language=language, module=module, model=module.model.eval(), batch=batch)


def test_texts_are_those_of_the_tokenizer(loaded):
    first = loaded.module.tokenizer.convert_ids_to_tokens(loaded.batch.labels[0].tolist())
    words = ["▁dark", "▁red", "</s>"]
    assert first == ([loaded.language, *words] if loaded.name == "50" else [*words, loaded.language])


def test_decoder_inputs_are_those_of_hugging_face(loaded):
    lm, labels = loaded.model.lm, loaded.batch.labels
    assert torch.equal(MBART.decoder_inputs(lm, labels), shift_tokens_right(labels, lm.config.pad_token_id))


def test_decoder_inputs_of_a_sample_without_labels_are_padding(loaded):
    """A rank's filler; Hugging Face's function fails."""
    inputs = MBART.decoder_inputs(loaded.model.lm, torch.full((1, 3), -100))
    assert inputs[0, 1:].tolist() == [1, 1]


def test_answers_start_as_their_labels_do(loaded):
    inputs = MBART.decoder_inputs(loaded.model.lm, loaded.batch.labels)
    prefix = MBART.answer_prefix(loaded.model.lm.config)
    assert inputs[:, : len(prefix)].tolist() == [prefix] * 2
    assert inputs[0, len(prefix)] == loaded.module.tokenizer.convert_tokens_to_ids("▁dark")
    for beams in (1, 3):
        found = loaded.model.generate(loaded.batch, num_beams=beams, max_length=6)
        assert found[:, : len(prefix)].tolist() == [prefix] * 2
    for answer in loaded.module.answer(loaded.batch):
        assert not set(answer.split()) & {"<s>", "</s>", *CODES_50}


def test_a_merged_model_is_a_backbone_of_the_same_language(loaded, tmp_path):
    model = copy.deepcopy(loaded.model)
    save_merged(model, tmp_path, loaded.module.tokenizer, backbone="tiny")
    again = VLMBart(str(tmp_path), feature_dim=16, grid=None)
    again.configure_model()
    assert MBART.answer_prefix(again.model.lm.config) == MBART.answer_prefix(loaded.model.lm.config)
    again.model.eval().visual.load_state_dict(model.visual.state_dict())
    batch = loaded.batch
    assert torch.equal(
        again.model.generate(batch, num_beams=3, max_length=6), model.generate(batch, num_beams=3, max_length=6)
    )


def test_a_tokenizer_that_ends_no_text_is_refused(tmp_path):
    save(tmp_path, "50", "en_XX")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    tokenizer.save_pretrained(tmp_path)
    said = f"the tokenizer of '{tmp_path}' must end a text with token 2 (</s>), it adds []: give an mBART with"
    with pytest.raises(ValueError, match=re.escape(said)):
        VLMBart(str(tmp_path)).build()


@pytest.mark.parametrize(("name", "prefix"), [("50", [2, 250_004]), ("cc25", [250_004])])
def test_the_pretrained_models_answer_in_english(name, prefix):
    """The code's row follows 250,001 pieces, in the order of the tokenizer's codes."""
    _, codes = TOKENIZERS[name]
    known = config_of(f"facebook/mbart-large-{name}", "mbart")
    assert MBART.answer_prefix(known) == prefix
    assert prefix[-1] == 250_001 + codes.index("en_XX")
    assert known.vocab_size == 250_001 + len(codes) + 1  # <mask>


def test_decoding_is_that_of_the_pretrained_config_with_the_language_forced():
    greedy, beams = (MBART.generation(config("mbart"), count, 20) for count in (1, 5))
    assert (beams.num_beams, beams.max_length, beams.early_stopping, beams.length_penalty) == (5, 20, True, 1.0)
    assert (beams.forced_bos_token_id, beams.forced_eos_token_id, beams.decoder_start_token_id) == (ENGLISH, 2, 2)
    assert (greedy.forced_bos_token_id, greedy.forced_eos_token_id) == (ENGLISH, None)
    assert not beams.no_repeat_ngram_size  # BART forbids repeated trigrams


def test_a_tokenizer_with_the_tokens_of_bart_starts_answers_as_bart_does():
    settings = config("mbart")
    set_language(settings, [0, 2])
    assert MBART.answer_prefix(settings) == BACKBONES["bart"].answer_prefix(config("bart")) == [2, 0]


def test_image_order_rows_are_scaled_as_the_tokens_are():
    model, batch = bare("mbart"), make_batch("mbart", "gqa")
    table = model.lm.model.shared.weight.detach()
    rows = torch.arange(len(table) - 1, len(table) - 1 - 4, -1)
    with torch.no_grad():
        order = model.visual(batch.features, None, table) - model.visual(batch.features, None, torch.zeros_like(table))
        expected = model.lm.model.shared(rows)
    torch.testing.assert_close(order, expected.expand_as(order), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected, 32**0.5 * table[rows])
    assert bare("bart").visual.order_scale == 1


@torch.no_grad()
def test_the_language_does_not_lower_the_probability_of_an_answer():
    model, batch = bare("mbart"), make_batch("mbart", "gqa")
    ids = model.generate(batch, num_beams=3, max_length=6)
    chances = model.decode(batch, ids[:, :-1]).log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(-1)
    ends = (ids[:, 1:] == 2).int()
    real = (ends.cumsum(dim=1) - ends == 0).float()
    real[:, 0] = 0
    torch.testing.assert_close(sequence_probabilities(model, batch, ids), (chances * real).sum(dim=1).exp())
