"""Runs of decoder-only models: ranks, resuming, precision, compilation, checkpointing, copies and commands."""

from __future__ import annotations

import copy
import gc
import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.testing import CompileCounterWithBackend

from tests.backbones.tiny_vlm import MODELS, PAD, TOWER, build, draw, save_smolvlm
from tests.conformance.behaviours import IMPOSSIBLE, the_units_compile_to_one_graph
from tests.conformance.bench import checkpoint_layers, gradients, loud, through_a_file, trained
from tests.requeued import Run, ask, tiny_config
from tests.runs import Batches, quiet_trainer
from vlpet_lightning import VLCausal
from vlpet_lightning.__main__ import run
from vlpet_lightning.api import make_batch
from vlpet_lightning.compilation import compile_layers
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.memory import fake_tensors, saved_for_backward
from vlpet_lightning.memory import make_batch as make_fake_batch
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import VLPET, DoRA, LargeGate, LoRA, Placement
from vlpet_lightning.prediction_files import read_predictions

KINDS = sorted(MODELS)
CANNOT_COMPILE = IMPOSSIBLE[the_units_compile_to_one_graph]
PREEMPTED = 75
PLACEMENTS = [
    Placement(["decoder.attn.query"], partial(LoRA, rank=4, dropout=0.0)),
    Placement(["decoder.attn.value"], partial(DoRA, rank=4), positions="image"),
    Placement(
        ["decoder.attn", "decoder.ffn"],
        partial(VLPET, rank=4, heads=2, gate=partial(LargeGate, rank=4)),
        positions="prefix",
    ),
]
RULES = ("pet", "visual_embedding")
TASKS = ("vqa", "nlvr2", "caption", "gqa")


def make(kind):
    """Build a tiny model whose units have large weights, as if trained."""
    model = build(kind, PLACEMENTS, RULES)
    loud(model.unit_parameters())
    return model


def random_batch(model, images=1, seed=0):
    """Return a batch of random features, for which the tower is not run, as in training."""
    batch, _ = draw(images, seed=seed)
    shape = (len(batch), *((images,) if images > 1 else ()), model.visual.vectors, TOWER)
    batch.features = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return batch


def assert_close(ours, expected, **tolerance):
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            ours[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **({"rtol": 1e-4, "atol": 1e-6} | tolerance)
        )


# the tiny SmolVLM as a module -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("smolvlm"))


def make_module(folder, **changes):
    module = VLCausal(str(folder), PLACEMENTS, list(RULES), **changes)
    module.configure_model()
    return module


def batches(module, size=5):
    """Return a batch of each task; texts and answers have different lengths."""
    words = "what color is the big red circle ?".split()
    texts = [" ".join(words[: 3 + number]) for number in range(size)]
    found = []
    for seed, task in enumerate(TASKS):
        shape = (size, 2, 4, 8) if task == "nlvr2" else (size, 4, 8)
        features = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        answers = ["true" if task == "nlvr2" else " ".join(words[3 : 4 + number % 3]) for number in range(size)]
        found.append(make_batch(module, task, texts, features, answers))
    return found


class Record(Callback):
    """Writes the gradients of every step to a file of each rank."""

    def __init__(self, root):
        self.root = root
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_end(self, trainer, pl_module):
        torch.save(self.steps, self.root / f"{trainer.world_size}-{trainer.global_rank}.pt")


def test_two_ranks_have_the_gradients_of_one(folder, tmp_path):
    for changes in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        module = make_module(folder)
        module.lr = 0.0  # every step starts from the same weights
        quiet_trainer(tmp_path, callbacks=[Record(tmp_path)], **changes).fit(module, Batches(batches(module)))
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert len(alone) == len(TASKS)
    assert set(alone[0]) == set(trained(module))
    for found in ranks:
        for ours, theirs in zip(found, alone, strict=True):
            assert_close(ours, theirs, rtol=1e-3)


class Losses(Callback):
    """Records the loss of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def test_bf16_with_frozen_weights_in_bf16_trains_like_float32(folder, tmp_path):
    losses = {}
    for name, settings in {"32-true": {}, "bf16-mixed": {"frozen_dtype": "bfloat16"}}.items():
        module, record = VLCausal(str(folder), PLACEMENTS, list(RULES), lr=1e-2, **settings), Losses()
        data = Batches(batches(make_module(folder)))
        quiet_trainer(tmp_path, precision=name, max_epochs=3, callbacks=[record]).fit(module, data)
        losses[name] = torch.tensor(record.seen)
    torch.testing.assert_close(losses["bf16-mixed"], losses["32-true"], rtol=0.05, atol=0.05)
    assert losses["bf16-mixed"][-len(TASKS) :].mean() < losses["bf16-mixed"][: len(TASKS)].mean()
    assert {p.dtype for p in trained(module.model).values()} == {torch.float32}
    layer = module.model.lm.model.text_model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == layer.self_attn.k_proj.weight.dtype == torch.bfloat16
    assert layer.input_layernorm.weight.dtype == torch.float32


# every family ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_in_bf16_give_the_loss_gradients_and_answers_of_autocast(kind):
    model = make(kind)
    stored, batch = copy.deepcopy(model), random_batch(model)
    assert cast_frozen(stored, torch.bfloat16) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gradients(stored, batch), gradients(model, batch), rtol=0, atol=0)
        assert torch.equal(stored.loss(batch), model.loss(batch))
        answers = (one.generate(batch, num_beams=2, max_length=5) for one in (stored, model))
        assert torch.equal(*answers)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("smolvlm", "paligemma2") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
@pytest.mark.skipif(bool(CANNOT_COMPILE), reason=CANNOT_COMPILE)
def test_the_layers_share_one_graph_with_the_same_gradients(kind):
    model = make(kind).train()
    batch, longer = random_batch(model), random_batch(model, images=2)
    other = copy.copy(longer)
    other.input_ids = torch.nn.functional.pad(longer.input_ids, (0, 3), value=PAD)
    expected = [gradients(model, one) for one in (batch, longer, other)]
    torch._dynamo.reset()
    gc.disable()  # compiling takes a fifth of the time without it
    try:
        counter = CompileCounterWithBackend("eager")
        compile_layers(model.layers(), fullgraph=True, backend=counter)  # raises at a graph break
        assert_close(gradients(model, batch), expected[0])
        assert counter.frame_count == 1
        assert_close(gradients(model, longer), expected[1])
        assert counter.frame_count == 2  # with a dynamic length
        assert_close(gradients(model, other), expected[2])
        assert counter.frame_count == 2
        with torch.no_grad():
            model.eval().generate(batch, num_beams=2, max_length=4)
        assert counter.frame_count == 2
    finally:
        gc.enable()
        torch._dynamo.reset()


def test_a_module_told_to_compile_compiles_the_layers_of_the_decoder(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: asked.append((layer, options)))
    monkeypatch.setattr("vlpet_lightning.module.check_compilable", lambda: None)
    module = make_module(folder, compile_model=True)
    layers = module.model.lm.model.text_model.layers
    assert asked == [(layer, {"fullgraph": True}) for layer in layers]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = make(kind).train()
    batch, calls = random_batch(model), []
    expected = gradients(model, batch)
    model.layers()[0].mlp.register_forward_pre_hook(lambda *args: calls.append(args))
    checkpoint_layers(model.lm)
    assert_close(gradients(model, batch), expected)
    assert len(calls) == 2  # forward, and again for the backward pass


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_share_nothing(kind, how):
    model = make(kind)
    batch = random_batch(model)
    with torch.no_grad():
        expected = model(batch)
        twin: VLModel = copy.deepcopy(model) if how == "deepcopy" else through_a_file(model, weights_only=False)
        assert torch.equal(twin(batch), expected)
        shared = {t.data_ptr() for t in twin.state_dict().values()} & {
            t.data_ptr() for t in model.state_dict().values()
        }
        assert not shared
        units = twin.unit_parameters()
        projector = [p for name, p in trained(twin).items() if name not in units]
        assert projector
        for parameter in projector:  # the image tokens of the copy are those of its own projector
            parameter.add_(1)
        assert not torch.allclose(twin(batch), expected)
        assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_save_what_real_tensors_save(kind, precision):
    tiny = MODELS[kind]

    def saved():
        lm = tiny.backbone.build(tiny.config)
        model = VLModel(tiny.backbone, lm, feature_dim=TOWER, placements=PLACEMENTS[:1], trainable=RULES).train()
        features = (model.visual.vectors,)
        batch = make_fake_batch("vqa", 3, text=6, target=4, features=features, width=TOWER, weighted=True)
        return saved_for_backward(model, batch, gpu=False, precision=precision)

    with fake_tensors():
        found = saved()
    assert found == saved() > 0


# commands -------------------------------------------------------------------------------------------------------------

OVERLAYS = ("vlm/smolvlm_256m", "vlm/pet/lora")
CALLBACKS = ("Preemption", "ParameterCount", "Throughput", "VQAMetrics", "CaptionMetrics", "PredictionWriter")


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    """The shipped experiment on a tiny world and a tiny model."""
    return tiny_config(tmp_path_factory.mktemp("world"), folder, grid=None, lr=1e-2, frozen_dtype="float32")


def restartable(config, folder, **trainer):
    return Run(config, folder, OVERLAYS, precision="32-true", log_every_n_steps=1, **trainer)


@pytest.mark.slow
def test_an_interrupted_run_has_the_weights_losses_and_scores_of_an_undisturbed_one(config, tmp_path):
    trainer = {"max_epochs": 2, "limit_train_batches": 6, "val_check_interval": 3, "limit_val_batches": 1.0}
    scores = "--trainer.callbacks+=callbacks.VQAMetrics"
    runs = [restartable(config, tmp_path / name, **trainer) for name in ("whole", "interrupted")]
    for hook, at in (("backward", 2), ("validation", 1), ("backward", 7)):
        assert runs[1].end_here(scores, *ask(hook=hook, at=at)) == PREEMPTED
        assert runs[1].load("resume.ckpt")["global_step"] < 12
    assert [one.end_here(scores) for one in runs] == [0, 0]
    rows = [
        [(row["step"], name, value) for row in read_metrics(one.home) for name, value in row.items() if "/" in name]
        for one in runs
    ]
    assert len(rows[0]) > 12
    assert rows[1] == rows[0]
    whole, resumed = (one.load("last.ckpt")["state_dict"] for one in runs)
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    callbacks = [{"class_path": f"callbacks.{name}"} for name in CALLBACKS]
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    trainer = {"max_epochs": 1, "limit_val_batches": 1.0, "callbacks": [*callbacks, keep]}
    one = restartable(config, tmp_path_factory.mktemp("run"), **trainer)
    assert one.end_here() == 0
    return one


def test_every_task_is_trained_and_scored_in_one_run(finished):
    rows = read_metrics(finished.home)
    losses = {task: [row[f"train/{task}/loss"] for row in rows if f"train/{task}/loss" in row] for task in TASKS}
    assert sum(map(len, losses.values())) == 19  # batches per epoch
    assert all(torch.tensor(found).isfinite().all() and found for found in losses.values())
    scores = {"val/vqa/accuracy_original", "val/gqa/accuracy", "val/nlvr2/accuracy", "val/caption/cider", "val/average"}
    assert scores <= {name for row in rows for name in row}


@pytest.mark.slow
def test_predictions_are_written_and_the_run_is_reported(finished, tmp_path, capsys):
    words = finished.words[:-2]
    last = str(finished.folder / "last.ckpt")
    for verb in ("predict", "test"):
        assert run([verb, *words, "--ckpt_path", last]) == 0
        for task in TASKS:
            written = read_predictions(finished.home / "predictions" / f"{verb}_{task}.json").records
            assert len(written) == 4
            assert all(isinstance(record["prediction"], str) for record in written)
            assert task != "nlvr2" or {record["prediction"] for record in written} <= {"true", "false"}
    assert run(["report", "--runs", f"[{finished.home}]", "--out", str(tmp_path / "report")]) == 0
    assert "SMOLVLM" in (tmp_path / "report" / "report.md").read_text()
    shown = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert shown["rows"]["one"]["trainable"] == json.loads((finished.home / "parameters.json").read_text())["trainable"]
    assert set(shown["scores"]["one"]) == set(TASKS)
    assert {"cider", "meteor"} <= set(shown["scores"]["one"]["caption"])


@pytest.mark.slow
def test_the_cost_of_models_known_by_name_is_compared(capsys):
    sides = [f"image_text+vlm/{model}+vlm/pet/lora" for model in ("smolvlm_256m", "paligemma2_3b")]
    step = ["--task", "nlvr2", "--batch-size", "2", "--text", "20", "--target", "5"]
    assert run(["compare", *sides, *step, "--json"]) == 0
    smolvlm, paligemma = json.loads(capsys.readouterr().out)["configs"]
    assert smolvlm["encoder_tokens"] == 2 * 64 + 20
    assert paligemma["encoder_tokens"] == 2 * 256 + 20
    lora = 30 * 32 * (576 + 576 + 576 + 192)
    assert smolvlm["parameters"]["total"] == 256_484_928 + lora
    assert smolvlm["parameters"]["trainable"] == 12288 * 576 + lora
    assert 0 < smolvlm["activations"] < paligemma["activations"]


def test_parameters_are_counted_as_json(finished, capsys):
    assert run(["params", *finished.words[:-2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainable"] == json.loads((finished.home / "parameters.json").read_text())["trainable"]
    tower = found["tower"]
    assert tower["bytes"] == 4 * tower["parameters"] > 0
    assert tower["flops"] > 0
