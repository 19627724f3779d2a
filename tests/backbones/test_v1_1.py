"""T5 v1.1: the output layer stays untied when the vocabulary is extended, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import T5ForConditionalGeneration

from tests.conformance.bench import config, loud
from tests.tiny import save_t5_tokenizer
from vlpet_lightning import VLT5, load_pet, save_pet
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.interop.export.merge import save_merged
from vlpet_lightning.pet import LoRA, Placement

T5 = BACKBONES["t5"]
LORA = [Placement(["encoder.attn.query"], LoRA.with_(rank=2))]


def pretrained(folder, *, tied=False):
    """Save a tiny T5 v1.1 with its tokenizer, as if it were pretrained."""
    settings = config("t5-v1_1")
    settings.vocab_size = save_t5_tokenizer(folder)
    lm = T5ForConditionalGeneration(settings) if tied else T5.build(settings)
    loud({name: p for name, p in lm.named_parameters() if p.dim() > 1})
    lm.save_pretrained(folder)
    return lm.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("v1_1")
    pretrained(path)
    return path


def module_of(folder, placements=()):
    module = VLT5(str(folder), list(placements), ["visual_embedding"], feature_dim=16, grid=2)
    module.configure_model()
    return module


def test_added_tokens_change_no_pretrained_row(folder):
    stock = T5ForConditionalGeneration.from_pretrained(folder)
    lm = module_of(folder).model.lm
    rows, all_rows = len(stock.shared.weight), len(lm.shared.weight)
    assert all_rows == rows + 100  # <vis_extra_id>; the tokenizer has <extra_id>
    assert lm.lm_head.weight is not lm.shared.weight
    assert lm.encoder.embed_tokens.weight is lm.decoder.embed_tokens.weight is lm.shared.weight
    for ours, theirs in ((lm.lm_head, stock.lm_head), (lm.shared, stock.shared)):
        assert ours.weight.shape == (all_rows, 32)
        assert torch.equal(ours.weight[:rows], theirs.weight)
    assert not torch.equal(lm.lm_head.weight[:rows], lm.shared.weight[:rows])


def test_an_added_token_is_never_the_most_probable_one(folder):
    lm = module_of(folder).model.lm
    weight = lm.lm_head.weight
    assert torch.equal(weight[-100:], weight[:-100].mean(dim=0).expand(100, -1))
    states = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    assert int((states @ weight.T).argmax(dim=1).max()) < len(weight) - 100


def test_a_checkpoint_with_a_tied_output_layer_stays_tied(tmp_path):
    pretrained(tmp_path, tied=True)
    lm = module_of(tmp_path).model.lm
    assert lm.lm_head.weight is lm.shared.weight


def test_the_output_is_not_scaled(folder):
    lm = module_of(folder).model.lm
    assert T5.vocabulary_projection(lm)[2] == 1.0
    stock = T5ForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids, labels=ids).logits for model in (lm, stock))
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)


def test_exported_weights_give_the_model_back(folder, tmp_path):
    module = module_of(folder, LORA)
    loud(module.model.unit_parameters())
    save_pet(module.model, tmp_path, backbone=str(folder))
    again = load_pet(tmp_path).lm
    theirs = module.model.lm.state_dict()
    differing = [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, theirs[name])]
    assert set(differing) <= {name for name in theirs if "embed_tokens" in name or "shared" in name}  # new rows
    assert torch.equal(again.lm_head.weight, module.model.lm.lm_head.weight)


def test_a_merged_model_is_a_backbone_with_its_own_output_layer(folder, tmp_path):
    module = module_of(folder, LORA)
    loud(module.model.unit_parameters())
    save_merged(module.model, tmp_path, module.tokenizer, backbone=str(folder))
    lm = module_of(tmp_path).model.lm
    assert torch.equal(lm.lm_head.weight, module.model.lm.lm_head.weight)
    assert not torch.equal(lm.lm_head.weight, lm.shared.weight)
