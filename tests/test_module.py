"""Training steps, checkpoints and refused checkpoints."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.runs import Batches, make_batch, placements, quiet_trainer, tiny_module, trained
from vlpet_lightning.backbones import check_compilable
from vlpet_lightning.loggers import CSVLog, read_metrics
from vlpet_lightning.loss_guard import NonFiniteFeaturesError, NonFiniteLossError, bad_images
from vlpet_lightning.pet import VLPET, Placement, SmallGate

TASKS = ("vqa", "gqa", "nlvr2", "caption")


class Record(Callback):
    """Records losses, learning rates and the gradients of the first step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class SaveGradients(Callback):
    """Writes this rank's gradients after the reduction over ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        torch.save(gradients, self.folder / f"{trainer.global_rank}.pt")


def fit(backbone, root, batches, *, ckpt_path=None, **changes):
    record = Record()
    module = tiny_module(backbone, **changes.pop("module", {}))
    callbacks = [record, *changes.pop("callbacks", [])]
    trainer = quiet_trainer(root, callbacks=callbacks, **changes)
    trainer.fit(module, Batches(batches), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer, record


@pytest.fixture
def batches():
    return [make_batch(task, 4, seed) for seed, task in enumerate(TASKS * 3)]


def test_losses_fall_and_only_what_is_trained_changes(tiny_backbone, tmp_path, batches):
    before = tiny_module(tiny_backbone)
    before.configure_model()
    module, _, record = fit(tiny_backbone, tmp_path, batches[:4] * 10)
    assert sum(record.losses[-4:]) < sum(record.losses[:4]) - 0.3
    start = dict(before.named_parameters())
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}
    # with grid features the boxes are zero, and only weight decay changes their projection
    assert changed == {name for name, p in module.named_parameters() if p.requires_grad}


def test_the_schedule_warms_up_from_zero_and_ends_near_zero(tiny_backbone, tmp_path, batches):
    _, _, record = fit(tiny_backbone, tmp_path, batches[:10], module={"warmup_ratio": 0.2, "lr": 1.0})
    assert record.rates == pytest.approx([0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_dropout_depends_on_the_step_alone(tiny_backbone, tmp_path, batches):
    first = fit(tiny_backbone, tmp_path, batches)[2].losses
    torch.rand(7)  # something else draws random numbers in between
    assert fit(tiny_backbone, tmp_path, batches)[2].losses == first


def test_a_checkpoint_holds_what_was_trained_and_no_backbone(tiny_backbone, tmp_path, batches):
    module, trainer, _ = fit(tiny_backbone, tmp_path, batches)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert "hyper_parameters" not in saved


def test_a_checkpoint_loads_into_the_same_method_under_another_seed(tiny_backbone, tmp_path, batches):
    module, trainer, _ = fit(tiny_backbone, tmp_path, batches)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = tiny_module(tiny_backbone)
    other.configure_model()
    with torch.no_grad():
        for parameter in trained(other).values():
            parameter.add_(1)
    quiet_trainer(tmp_path).validate(other, _one_batch(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    ours, theirs = trained(module), trained(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _one_batch():
    return torch.utils.data.DataLoader([make_batch("nlvr2", 2, 0)], batch_size=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"placements": placements(gate=SmallGate)}, ["encoder.attn", "LargeGate", "SmallGate", "VLPET with gate"]),
        ({"placements": placements(rank=4)}, ["encoder.attn, encoder.ffn: VLPET", "down 32->8", "down 32->4"]),
        ({"placements": [Placement(["encoder.ffn"], partial(VLPET, rank=8))]}, ["encoder.attn", "nothing here"]),
        ({"trainable": ["pet"]}, ["tensors missing, unexpected", "layer_norm"]),
    ],
)
def test_a_checkpoint_of_another_method_is_refused_before_a_weight_changes(
    tiny_backbone, tmp_path, batches, changes, words
):
    _, trainer, _ = fit(tiny_backbone, tmp_path, batches[:1])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = tiny_module(tiny_backbone, **changes)
    other.configure_model()
    before = {name: p.clone() for name, p in trained(other).items()}
    with pytest.raises(ValueError, match="checkpoint is of another method") as error:
        quiet_trainer(tmp_path).fit(other, Batches(batches), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert all(word in str(error.value) for word in words)
    assert all(torch.equal(before[name], p) for name, p in trained(other).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_decay": ["bias", "norm"]}, "another method: no_decay: bias there, bias, norm here. Give the config"),
        ({"no_decay": []}, "another method: no_decay: bias there, nothing here"),
        (
            {"trainable": ["pet", "visual_embedding"]},
            "trainable: pet, visual_embedding, encoder.layer_norm there, pet,",
        ),
        (
            {"trainable": ["pet", "encoder.layer_norm"]},
            "trainable: pet, visual_embedding, encoder.layer_norm there, pet,",
        ),
    ],
)
def test_training_goes_on_with_the_groups_of_the_checkpoint_alone(tiny_backbone, tmp_path, batches, changes, message):
    _, trainer, _ = fit(tiny_backbone, tmp_path, batches[:1])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(tiny_backbone, tmp_path, batches, ckpt_path=tmp_path / "run.ckpt", module=changes)


def test_the_order_of_rules_and_what_an_evaluation_would_not_decay_do_not_matter(tiny_backbone, tmp_path, batches):
    _, trainer, _ = fit(tiny_backbone, tmp_path, batches[:1])
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    reordered = {"trainable": ["encoder.layer_norm", "visual_embedding", "pet"]}
    _, resumed, record = fit(tiny_backbone, tmp_path, batches, ckpt_path=path, module=reordered, max_epochs=2)
    assert (resumed.global_step, len(record.losses)) == (1 + len(batches), len(batches))
    other, saved = tiny_module(tiny_backbone, no_decay=["bias", "norm"]), torch.load(path, weights_only=True)
    quiet_trainer(tmp_path).validate(other, _one_batch(), ckpt_path=path, weights_only=True)
    assert all(torch.equal(p, saved["state_dict"][name]) for name, p in trained(other).items())


def test_a_foreign_checkpoint_is_refused(tiny_backbone, tmp_path):
    module = tiny_module(tiny_backbone)
    module.configure_model()
    with pytest.raises(ValueError, match="not written by vlpet_lightning"):
        module.on_load_checkpoint({"state_dict": {}})


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_questions(tiny_backbone, tmp_path, batches):
    batches[5].features[1] = 1e38  # finite, and too large for a float32 product
    with pytest.raises(NonFiniteLossError, match=r"nan at step 5, task 'gqa', question ids: gqa-5-0, gqa-5-1"):
        fit(tiny_backbone, tmp_path, batches)


def test_features_that_are_not_finite_are_named_by_image_store_and_row(tiny_backbone, tmp_path, batches):
    bad = batches[5]
    bad.features[1, 0, 0] = float("nan")
    bad.store, bad.images = "features/VG", [(f"image{n}",) for n in range(len(bad))]
    bad.rows = [(10 + n,) for n in range(len(bad))]
    message = r"nan at step 5, task 'gqa', because .*: image image1 \(row 11\) of features/VG\. Nothing was saved"
    with pytest.raises(NonFiniteFeaturesError, match=message):
        fit(tiny_backbone, tmp_path, batches)


def test_of_two_images_the_bad_one_is_named():
    batch = make_batch("nlvr2", 2, 0)
    batch.features[1, 1, 0, 0] = float("inf")
    batch.images = [("a", "b"), ("c", "d")]
    assert bad_images(batch) == ["image d"]


def test_the_last_good_checkpoint_survives_a_bad_loss(tiny_backbone, tmp_path, batches):
    from lightning.pytorch.callbacks import ModelCheckpoint

    batches[5].features[1] = float("inf")
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=1, filename="{step}")
    with pytest.raises(NonFiniteLossError):
        fit(tiny_backbone, tmp_path, batches, callbacks=[keep], enable_checkpointing=True)
    (kept,) = (tmp_path / "kept").glob("*.ckpt")
    saved = torch.load(kept, weights_only=True)
    assert saved["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_a_row_of_metrics_has_the_loss_of_its_own_task_alone(tiny_backbone, tmp_path, batches):
    logger = CSVLog(str(tmp_path), "run", "a")
    fit(tiny_backbone, tmp_path, batches, logger=logger, log_every_n_steps=1)
    rows = [[name for name in row if name.startswith("train/")] for row in read_metrics(tmp_path / "run" / "a")]
    assert [names for names in rows if names] == [[f"train/{batch.task}/loss"] for batch in batches]
    assert len({batch.task for batch in batches}) > 1


def test_decay_spares_what_the_protocol_names(tiny_backbone, tmp_path, batches):
    module, trainer, _ = fit(tiny_backbone, tmp_path, batches[:1])
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in trainer.optimizers[0].param_groups)
    assert all("bias" in name for name in spared)
    assert "model.lm.model.encoder.layernorm_embedding.weight" in decayed  # also decayed by the original
    _, trainer, _ = fit(tiny_backbone, tmp_path, batches[:1], module={"no_decay": ["bias", "norm", "gate"]})
    decayed = trainer.optimizers[0].param_groups[0]["params"]
    shapes = {tuple(p.shape) for p in decayed}
    assert all(len(shape) == 2 for shape in shapes)


def test_answers_are_text_and_choices_are_words(tiny_backbone):
    module = tiny_module(tiny_backbone)
    module.configure_model()
    module.eval()
    assert set(module.answer(make_batch("nlvr2", 3, 0))) <= {"true", "false"}
    answers = module.answer(make_batch("vqa", 3, 0))
    assert len(answers) == 3
    assert all("<" not in answer for answer in answers)


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_two_ranks_have_the_gradients_of_one_on_the_whole_batch(tiny_backbone, tmp_path, task):
    # 5 samples over 2 ranks: averaging the ranks' means would be wrong; dropout off, since ranks draw their own
    batches = [make_batch(task, 5, 1)]
    alone = fit(tiny_backbone, tmp_path, batches, module={"dropout": 0.0})[2].gradients
    (tmp_path / "ranks").mkdir()
    # forked: a spawned child imports lightning before our torchvision cure
    trainer = quiet_trainer(tmp_path, devices=2, strategy="ddp_fork", callbacks=[SaveGradients(tmp_path / "ranks")])
    trainer.fit(tiny_module(tiny_backbone, dropout=0.0), Batches(batches))
    for rank in (0, 1):
        gradients = torch.load(tmp_path / "ranks" / f"{rank}.pt", weights_only=True)
        assert set(gradients) == set(alone)
        for name, gradient in alone.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("version", "fits"), [("5.20.2", False), ("5.22.9", False), ("5.23.0", True), ("6.0.1", True)])
def test_compiling_is_refused_where_the_language_model_breaks_the_graph(version, fits):
    if fits:
        check_compilable(version)
        return
    with pytest.raises(ValueError, match=rf"needs transformers 5\.23 or newer.*{version} is installed"):
        check_compilable(version)
