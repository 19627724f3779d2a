"""Structured pruning of a backbone's layers, and side networks that start from it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from tests.conformance.bench import FEATURE_DIM, GRID, backbone_of, loud, stock
from vlpet_lightning.checksums import weights_digest
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import LadderSideNetwork, Placement
from vlpet_lightning.pet.pruning import (
    Importance,
    most_important,
    prune,
    pruned_names,
    write_importance,
)

CHAIN = [("norm",), ("q", "k"), ("o",), ("norm2",), ("wi",), ("wo",), ("final",)]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def backbone_with_known_channels(importance):
    """Return weights of one layer whose important rows are 1 and 2 of 8 inner, 0 and 3 of 4 others, and so on."""
    weights = {f"{name}.weight": draw(4) for name in ("norm", "norm2", "final")}
    weights |= {f"{name}.weight": draw(4, 4) for name in ("q", "k", "o")} | {"o.bias": draw(4), "q.bias": draw(4)}
    weights |= {"wi.weight": draw(8, 4), "wo.weight": draw(4, 8)}
    importance |= {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    importance["q.weight"][[1, 2]] = 3.0
    importance["k.weight"][[2, 3]] = 2.0  # the product decides: rows 2, then 1
    importance["o.weight"][[0, 3]] = 5.0
    importance["wi.weight"][[1, 4, 6, 7]] = 2.0
    importance["wo.weight"][[1, 2]] = 9.0
    return weights


def test_the_important_rows_and_columns_are_kept():
    importance = {}
    weights = backbone_with_known_channels(importance)
    channels = torch.tensor([0.0, 4.0, 1.0, 2.0])  # 1 and 3
    pruned = prune(weights, Importance(channels, importance.__getitem__), [CHAIN], 2)
    embedding, attention, out, inner, last = [1, 3], [1, 2], [0, 3], [1, 4, 6, 7], [1, 2]
    assert torch.equal(pruned["norm.weight"], weights["norm.weight"][embedding])
    for name in ("q", "k"):
        assert torch.equal(pruned[f"{name}.weight"], weights[f"{name}.weight"][attention][:, embedding])
    assert torch.equal(pruned["q.bias"], weights["q.bias"][attention])
    assert torch.equal(pruned["o.weight"], weights["o.weight"][out][:, attention])
    assert torch.equal(pruned["o.bias"], weights["o.bias"][out])
    assert torch.equal(pruned["norm2.weight"], weights["norm2.weight"][out])
    assert torch.equal(pruned["wi.weight"], weights["wi.weight"][inner][:, out])
    assert torch.equal(pruned["wo.weight"], weights["wo.weight"][last][:, inner])
    assert torch.equal(pruned["final.weight"], weights["final.weight"][last])
    assert len(pruned) == len(weights)


def test_only_columns_that_were_kept_count():
    """A row whose importance lies in a column that is cut is not kept."""
    importance = {}
    weights = backbone_with_known_channels(importance)
    importance["o.weight"][2, 0] = 1000.0  # column 0 is no row of the query that is kept
    pruned = prune(weights, Importance(torch.tensor([0.0, 4.0, 1.0, 2.0]), importance.__getitem__), [CHAIN], 2)
    assert torch.equal(pruned["o.weight"], weights["o.weight"][[0, 3]][:, [1, 2]])


def test_a_second_chain_starts_from_the_embedding_again():
    importance = {}
    weights = backbone_with_known_channels(importance)
    weights["other.weight"], importance["other.weight"] = draw(4, 4), torch.ones(4, 4)
    channels = torch.tensor([0.0, 4.0, 1.0, 2.0])
    pruned = prune(weights, Importance(channels, importance.__getitem__), [CHAIN, [("other",)]], 2)
    assert torch.equal(pruned["other.weight"], weights["other.weight"][[2, 3]][:, [1, 3]])


def test_small_products_do_not_vanish():
    """Squared gradients of three matrices multiply to less than float32 can hold."""
    tiny = torch.full((4, 4), 1e-20)
    tiny[1], tiny[2] = 2e-20, 3e-20
    weights = {f"{name}.weight": draw(4, 4) for name in "qkv"}
    pruned = prune(weights, Importance(torch.arange(4.0), lambda name: tiny), [[tuple("qkv")]], 2)
    assert torch.equal(pruned["q.weight"], weights["q.weight"][[1, 2]][:, [2, 3]])


@pytest.mark.parametrize("reduction", [2, 3, 4])
def test_one_channel_in_n_is_kept(reduction):
    scores = draw(24)
    kept = most_important(scores, reduction)
    assert len(kept) == 24 // reduction
    assert kept.tolist() == sorted(kept.tolist())
    assert scores[kept].min() >= scores.sort().values[-(24 // reduction)]


# side networks -------------------------------------------------------------------------------------------------------


def build(kind, **settings):
    lm = copy.deepcopy(stock(kind))
    loud({name: parameter for name, parameter in lm.named_parameters() if parameter.dim() > 1})
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.arange(1.0, 33.0) if name.endswith("weight") else parameter)
    placements = [Placement(["side"], partial(LadderSideNetwork, **settings))]
    return VLModel(backbone_of(kind), lm, feature_dim=FEATURE_DIM, grid=GRID, placements=placements, trainable=["pet"])


def is_cut_of(small, large):
    """Check that a tensor consists of rows (and columns) of another."""
    return all(any(_has(row, part) for row in large) for part in small)


def _has(row, part):
    return set(part.flatten().tolist()) <= set(row.flatten().tolist())


@pytest.mark.parametrize("kind", ["bart", "mbart", "t5", "t5-v1_1"])
def test_side_layers_start_from_rows_and_columns_of_the_backbone(kind):
    model = build(kind, encoder_layers=[1])
    fresh = {name: parameter.clone() for name, parameter in model.side.named_parameters()}
    model.start_from_backbone()
    layers, side = model.backbone.layers(model.lm), model.side
    for stack, beside in (("encoder", [1]), ("decoder", [0, 1])):
        narrow = model.backbone.stack_layers(getattr(side, stack).stack)
        for index, layer in zip(beside, narrow, strict=True):
            theirs = dict(layers[stack][index].named_parameters())
            for name, parameter in layer.named_parameters():
                if name in theirs and "relative" not in name:
                    assert is_cut_of(parameter, theirs[name]), (stack, index, name)
    changed = {name for name, parameter in model.side.named_parameters() if not torch.equal(parameter, fresh[name])}
    kept = {name for name in fresh if "rungs" in name or name.startswith("up.") or name.endswith("bias")}
    relative = {name for name in fresh if "relative" in name}
    assert changed >= set(fresh) - kept | relative
    assert not {name for name in changed if "rungs" in name or name.startswith("up.")}
    if relative:
        for stack in ("encoder", "decoder"):  # also beside another layer than the first, which alone has it
            table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            theirs = model.backbone.stack(model.lm, stack).get_parameter(table)
            assert torch.equal(getattr(side, stack).stack.get_parameter(table), theirs)


def test_a_fresh_start_draws_the_weights():
    model = build("t5", start="fresh")
    before = {name: parameter.clone() for name, parameter in model.side.named_parameters()}
    model.start_from_backbone()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.side.named_parameters())


def test_added_rows_of_the_embedding_do_not_count():
    model = build("t5")
    with torch.no_grad():
        model.lm.shared.weight[-8:] = 100 * torch.arange(32.0)
    expected = most_important(model.lm.shared.weight[:-8].abs().sum(dim=0), 4)
    model.added_vocabulary = 8
    model.start_from_backbone()
    assert torch.equal(model.side.encoder.stack.block[0].layer[0].layer_norm.weight, 1.0 + expected)


# importance files ----------------------------------------------------------------------------------------------------


def weights_of(model):
    return {name: parameter.detach() for name, parameter in model.lm.named_parameters()}


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_file_decides_which_weights_are_kept(kind, tmp_path):
    model, file = build(kind, importance=str(tmp_path / "importance.pt")), tmp_path / "importance.pt"
    weights = weights_of(model)
    names = pruned_names(model.backbone.pruning_chains(model.lm), weights)
    found = {
        name: torch.arange(float(weights[name].shape[0]), 0, -1)[:, None].expand_as(weights[name]) for name in names
    }
    write_importance(file, weights, torch.arange(32.0, 0, -1), found, 3)
    model.start_from_backbone()  # the first rows and columns are the most important ones
    first = "layers.1.fc1" if kind == "bart" else "block.1.layer.1.DenseReluDense.wi"
    whole = model.backbone.stack(model.lm, "encoder").get_parameter(f"{first}.weight")
    assert torch.equal(model.side.encoder.stack.get_parameter(f"{first}.weight"), whole[:16, :8])


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m vlpet_lightning importance"):
        build("t5", importance=str(tmp_path / "none.pt")).start_from_backbone()


def test_files_of_other_weights_are_refused(tmp_path):
    file = tmp_path / "importance.pt"
    model = build("t5", importance=str(file))
    weights = weights_of(model)
    write_importance(file, {name: tensor + 1 for name, tensor in weights.items()}, torch.ones(32), {}, 3)
    with pytest.raises(ValueError, match="was measured on other weights"):
        model.start_from_backbone()
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no importance file"):
        model.start_from_backbone()


def test_the_digest_knows_the_weights_but_not_added_rows():
    weights = weights_of(build("t5"))
    larger = weights | {"shared.weight": torch.cat([weights["shared.weight"], torch.ones(3, 32)])}
    assert weights_digest(larger) == weights_digest(weights)
    other = weights | {"shared.weight": weights["shared.weight"] * 1.01}
    assert weights_digest(other) != weights_digest(weights)
