"""Our beam search compared with exhaustive search, and with the library's where both must agree."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutput

from tests.conformance.bench import Bench, make_batch
from tests.conformance.cases import CASES
from vlpet_lightning.batch import Batch
from vlpet_lightning.beam_search import SearchRules, beam_search, forbid_repeats

START, END, PAD, VOCABULARY, LONGEST = 3, 1, 0, 5, 5


def chances_of(seed, ends=0):
    """Build a random language: next-token logits for every sequence, ``(sequence) -> (vocabulary,)``.

    Args:
        seed: Seed of the logits.
        ends: Added to the logit of the end token.
    """

    def logits(sequence):
        generator = torch.Generator().manual_seed(hash((seed, *sequence)) % 2**40)
        return 2 * torch.randn(VOCABULARY, generator=generator) + ends * (torch.arange(VOCABULARY) == END)

    return logits


def best_by_trying_all(logits):
    """Return the answer with the highest mean log probability, counting the start token but not the end token."""
    best, score = None, -torch.inf
    for length in range(1, LONGEST):
        for rest in itertools.product(range(VOCABULARY), repeat=length):
            if END in rest[:-1] or (rest[-1] != END and length < LONGEST - 1):
                continue
            sequence, total = [START], 0.0
            for token in rest:
                total += torch.log_softmax(logits(tuple(sequence)), dim=0)[token].item()
                sequence.append(token)
            mean = total / (len(sequence) - (rest[-1] == END))
            if mean > score:
                best, score = sequence, mean
    return best


def search(languages, beams, **rules):
    """Search in one language per sample, checking that rows and samples are tracked."""
    remaining, before = list(range(len(languages))), None

    def step(sequences, rows, samples):
        nonlocal remaining, before
        if samples is not None:
            remaining = [remaining[i] for i in samples.tolist()]
        if rows is not None:
            assert torch.equal(sequences[:, :-1], before[rows])
        before = sequences
        each = len(sequences) // len(remaining)
        return torch.stack([languages[remaining[i // each]](tuple(row)) for i, row in enumerate(sequences.tolist())])

    settings = SearchRules(beams=beams, longest=LONGEST, start=START, end=END, pad=PAD, **rules)
    return beam_search(step, len(languages), settings, torch.device("cpu")).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_with_beams_enough_the_best_answer_is_found_and_padded(seed):
    languages = [chances_of(seed), chances_of(seed + 100)]
    beams = 300  # no answer is lost
    found = search(languages, beams)
    expected = [best_by_trying_all(language) for language in languages]
    width = max(map(len, expected))
    assert found == [answer + [PAD] * (width - len(answer)) for answer in expected]


@pytest.mark.parametrize("early_stopping", [False, True])
def test_samples_that_are_done_leave_and_the_answers_stay_the_same(early_stopping):
    languages = [chances_of(seed) for seed in range(12)]
    together = search(languages, 2, early_stopping=early_stopping)
    alone = [search([language], 2, early_stopping=early_stopping)[0] for language in languages]
    assert len({len(answer) for answer in alone}) > 1
    assert together == [answer + [PAD] * (len(together[0]) - len(answer)) for answer in alone]


def test_repeated_ngrams_are_forbidden():
    sequences = torch.tensor([[3, 1, 2, 4, 1, 2], [3, 1, 2, 4, 2, 1], [1, 1, 1, 1, 1, 1]])
    chances = torch.zeros(3, VOCABULARY)
    forbid_repeats(chances, sequences, 3)
    assert [row.isinf().nonzero().flatten().tolist() for row in chances] == [[4], [], [1]]
    forbid_repeats(chances.zero_(), sequences[:, :2], 3)
    assert chances.isfinite().all()


class Rows:
    """Counts the rows that a layer has computed."""

    def __init__(self, layer):
        self.count = 0
        layer.register_forward_hook(self)

    def __call__(self, layer, args, output):
        self.count += output.shape[0]


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_cross_attention_is_projected_once_per_sample(kind):
    model = Bench(CASES[0], kind).fresh()
    site = model.backbone.sites["decoder.cross.key"]
    keys = Rows(model.backbone.layers(model.lm)["decoder"][0].get_submodule(site.leaves))
    batch = make_batch(kind, "caption", size=4)
    model.generate(batch, num_beams=3, max_length=6)
    assert keys.count == 4


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_masks_of_attention_are_contiguous_which_cuda_requires(kind, monkeypatch):
    strides = []

    def attend(query, key, value, attn_mask=None, **options):
        strides.append(attn_mask.expand(len(query), query.shape[1], query.shape[2], key.shape[2]).stride(-1))
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    functions = SimpleNamespace(scaled_dot_product_attention=attend)
    monkeypatch.setattr("vlpet_lightning.backbones.cached_decoder.F", functions)
    Bench(CASES[0], kind).fresh().generate(make_batch(kind, "caption", size=4), num_beams=3, max_length=6)
    assert set(strides) == {1}


def stock(model, batch, beams, length):
    config = model.backbone.generation(model.lm.config, beams, length)
    states = BaseModelOutput(last_hidden_state=model.encode(batch))
    return model.lm.generate(encoder_outputs=states, attention_mask=model.mask(batch), generation_config=config)


@torch.no_grad()
@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("name", ["vlpet-large", "lora", "hyperformer-block"])
def test_barts_answers_are_those_of_the_librarys_search(name, beams):
    """With BART's settings, release 5 of transformers gives the answers of 4.2.1; some end early, some are cut."""
    model = Bench(next(case for case in CASES if case.name == name), "bart").loud()
    lengths = set()
    for seed, bias in enumerate([0.0, 1.0, 2.0, 3.0, 4.0]):
        model.lm.final_logits_bias[0, model.lm.config.eos_token_id] = bias
        batch: Batch = make_batch("bart", "caption", size=7, seed=seed)
        found, expected = model.generate(batch, num_beams=beams, max_length=9), stock(model, batch, beams, 9)
        assert torch.equal(found, expected)
        lengths |= set((found != 1).sum(dim=1).tolist())
    assert min(lengths) < max(lengths)


@torch.no_grad()
def test_the_attention_of_the_language_model_is_restored():
    model = Bench(CASES[0], "bart").fresh()
    before = model.lm.config._attn_implementation
    model.generate(make_batch("bart", "caption"), num_beams=3, max_length=5)
    assert model.lm.config._attn_implementation == before


@pytest.mark.parametrize("early_stopping", [False, True])
def test_several_answers_of_a_batch_are_those_of_each_sample(early_stopping):
    # every other language ends its answers early: those samples leave the batch
    languages = [chances_of(seed, ends=4 * (seed % 2)) for seed in range(12)]
    settings = {"answers": 3, "early_stopping": early_stopping}
    together = unpadded(search(languages, 4, **settings))
    assert together == [row for language in languages for row in unpadded(search([language], 4, **settings))]
    assert together[::3] == unpadded(search(languages, 4, early_stopping=early_stopping))
    assert all(len(set(map(tuple, together[i : i + 3]))) == 3 for i in range(0, len(together), 3))


def unpadded(rows):
    return [row[: row.index(END) + 1] if END in row else row for row in rows]
