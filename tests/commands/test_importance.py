"""The ``importance`` command, and a run whose side network starts from its file: trained, tested, exported, asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.data_modules.tiny_data import DIM, write_world
from tests.runs import make_batch
from vlpet_lightning import load_pet
from vlpet_lightning.__main__ import run
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.cli import data_from_config, module_from_config
from vlpet_lightning.importance import measure_importance, samples_of
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.pet.pruning import most_important, pruned_names

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = {"bart": "bart", "t5": "LST"}  # of the run in a report: that of the published row, or the run's own
BASES = {"bart": ["pet/lst.yaml"], "t5": ["backbone/t5_base.yaml", "pet/lst_t5.yaml"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


def words_of(root, kind, backbone):
    """Return the arguments of a small run."""
    overlay = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": {
                "class_path": "vlpet_lightning.loggers.CSVLog",
                "init_args": {"save_dir": str(root), "name": "run", "version": kind},
            },
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
                {"class_path": "callbacks.VQAMetrics"},
            ],
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
        },
        "model": {"init_args": {"backbone": str(backbone), "feature_dim": DIM, "grid": 2}},
        "data": {"init_args": {"root": str(root), "batch_size": 3, "tasks": ["vqa", "nlvr2"]}},
    }
    file = root / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(overlay))
    configs = [EXPERIMENTS / name for name in ("image_text.yaml", *BASES[kind])]
    return [word for path in (*configs, file) for word in ("--config", str(path))]


@pytest.fixture(scope="module")
def measured(root, tiny_backbone, tiny_t5, tmp_path_factory):
    """Arguments of a run of each kind, and the importance file of its backbone."""
    folder = tmp_path_factory.mktemp("importance")
    found = {}
    for kind, backbone in (("bart", tiny_backbone), ("t5", tiny_t5)):
        words = words_of(root, kind, backbone)
        found[kind] = words, folder / f"{kind}.pt"
        assert run(["importance", *words, "--samples", "6", "--out", str(found[kind][1]), "--device", "cpu"]) == 0
    return found


def by_hand(lm, ids, labels, name):
    """Return the squared gradient of a sample's mean loss."""
    lm.zero_grad(set_to_none=True)
    lm.requires_grad_(True)
    log_probabilities = lm(input_ids=ids[None], labels=labels[None]).logits[0].log_softmax(dim=-1)
    (-log_probabilities[torch.arange(len(labels)), labels].mean()).backward()
    return lm.get_parameter(name).grad.square()


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_importance_is_the_sum_of_squared_gradients_of_single_samples(kind, tiny_backbone, tiny_t5):
    backbone, folder = BACKBONES[kind], {"bart": tiny_backbone, "t5": tiny_t5}[kind]
    lm = backbone.load(str(folder), backbone.config(str(folder)).vocab_size, 0.1).train()
    batches = [make_batch("gqa", 2, seed=1), make_batch("vqa", 3, seed=2)]
    for batch in batches:
        batch.text_mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
    batches[0].text_mask[1, 3:] = False
    names = pruned_names(backbone.pruning_chains(lm), dict(lm.named_parameters()))
    found = measure_importance(lm, backbone.token_embedding(lm), names, batches, 4)
    assert found.samples == {"gqa": 2, "vqa": 2}
    samples = [
        (batches[0].input_ids[0], batches[0].labels[0]),
        (batches[0].input_ids[1, :3], batches[0].labels[1, :3]),
        (batches[1].input_ids[0], batches[1].labels[0]),
        (batches[1].input_ids[1], batches[1].labels[1]),
    ]
    for name in (names[0], names[-1]):
        expected = sum(by_hand(lm, *sample, name) for sample in samples)
        torch.testing.assert_close(found.weights[name], expected, rtol=1e-4, atol=1e-12)
    embedding = "shared.weight" if kind == "t5" else "model.shared.weight"
    expected = sum(by_hand(lm, *sample, embedding) for sample in samples).sum(dim=0)
    torch.testing.assert_close(found.channels, expected, rtol=1e-4, atol=1e-12)


def test_a_loss_that_is_not_finite_is_an_error(tiny_t5):
    backbone = BACKBONES["t5"]
    lm = backbone.load(str(tiny_t5), backbone.config(str(tiny_t5)).vocab_size, 0.1)
    with torch.no_grad():
        lm.shared.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss of a sample of vqa is nan"):
        measure_importance(lm, lm.shared.weight, ["x"], [make_batch("vqa", 2, seed=1)], 4)
    with pytest.raises(ValueError, match="there are no training samples"):
        measure_importance(lm, lm.shared.weight, ["x"], [], 4)


def test_padding_is_taken_off():
    batch = make_batch("vqa", 2, seed=3)  # its last sample is padded
    (task, first, labels), (_, second, short) = samples_of([batch], pad=1)
    assert task == "vqa"
    assert first.shape == (1, 7)
    assert labels.shape == (1, 4)
    assert second.shape == (1, 5)
    assert short.shape == (1, 3)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_file_is_measured_on_the_training_samples_of_the_config(measured, kind):
    words, file = measured[kind]
    module, data = module_from_config(words), data_from_config(words)
    data.setup("fit")
    backbone = BACKBONES[kind]
    lm = backbone.load(module.backbone_name, backbone.config(module.backbone_name).vocab_size, 0.0)
    names = pruned_names(backbone.pruning_chains(lm), dict(lm.named_parameters()))
    expected = measure_importance(lm, backbone.token_embedding(lm), names, data.train_dataloader(), 6)
    content = torch.load(file, weights_only=True)
    assert content["samples"] == 6
    assert set(content["weights"]) == set(names)
    assert all(torch.equal(content["weights"][name], expected.weights[name]) for name in names)
    assert torch.equal(content["channels"], expected.channels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_run_that_starts_from_the_file(measured, root, kind, capsys, tmp_path):
    words, file = measured[kind]
    placement = {"class_path": "vlpet_lightning.pet.LadderSideNetwork", "init_args": {"importance": str(file)}}
    placed = ["--model.init_args.placements", str([{"at": ["side"], "unit": placement}])]
    module = module_from_config([*words, *placed])
    module.configure_model()
    content = torch.load(file, weights_only=True)
    layer = {"bart": "layers.0.self_attn.q_proj", "t5": "block.0.layer.0.SelfAttention.q"}[kind]
    columns = most_important(content["channels"], 4)
    lm = module.built().lm
    whole = module.built().backbone.stack(lm, "encoder").get_parameter(f"{layer}.weight")[:, columns]
    rows = module.built().side.encoder.stack.get_parameter(f"{layer}.weight")
    assert {tuple(row) for row in rows.tolist()} < {tuple(row) for row in whole.tolist()}
    assert run(["fit", *words, *placed]) == 0
    moved = tmp_path / "moved.pt"
    file.rename(moved)  # nothing but the start of a run needs it
    try:
        checkpoint = root / "run" / kind / "checkpoints" / "last.ckpt"
        assert run(["test", *words, *placed, "--ckpt_path", str(checkpoint)]) == 0
        assert run(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "export")]) == 0
        with pytest.raises(ValueError, match="LadderSideNetwork cannot be merged: it is a network of its own beside"):
            run(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "merged"), "--merge"])
        with pytest.raises(ValueError, match="LadderSideNetwork"):
            run(["gates", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "gates")])
        with pytest.raises(FileNotFoundError, match="no importance file"):
            module_from_config([*words, *placed]).configure_model()
    finally:
        moved.rename(file)
    scores = read_metrics(root / "run" / kind)
    assert {"test/vqa/accuracy", "test/nlvr2/accuracy"} <= {name for row in scores for name in row}
    model = load_pet(tmp_path / "export")
    loaded = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, loaded[f"model.{name}"]) for name, tensor in model.own_state().items())
    capsys.readouterr()
    assert run(["report", str(root / "run" / kind), "--out", str(tmp_path / "report")]) == 0
    assert f"measured,{NAMES[kind]}," in (tmp_path / "report" / "table.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--out", "{there}"], "exists: give another --out, or delete it"),
        (["--out", "{folder}/none/x.pt"], "there is no folder .*none: create it"),
        (["--device", "cuda"], "--device cuda: no GPU can be used here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_options_are_refused_before_anything_is_read(changes, message, tmp_path):
    there = tmp_path / "there.pt"
    there.touch()
    changes = [word.format(there=there, folder=tmp_path) for word in changes]
    out = [] if "--out" in changes else ["--out", str(tmp_path / "new.pt")]
    with pytest.raises((ValueError, FileExistsError, FileNotFoundError), match=message):
        run(["importance", "--config", "no such file", *out, *changes])
    assert not (tmp_path / "new.pt").exists()
