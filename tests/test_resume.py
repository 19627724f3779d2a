"""A run killed in mid-epoch and resumed equals an uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from data_modules import ImageTextDataModule
from tests.data_modules.tiny_data import DIM, write_world
from tests.runs import quiet_trainer, tiny_module, trained

EPOCHS = 2


class Losses(Callback):
    """Records loss, learning rate and question ids of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, tuple[str, ...]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((outputs["loss"].item(), rate, tuple(batch.ids)))


class Kill(Callback):
    """Raises in the middle of a step, after its forward pass."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


def fit(root, backbone, folder, *callbacks, ckpt_path=None, **changes):
    losses = Losses()
    keep = ModelCheckpoint(folder, filename="resume", every_n_train_steps=1, enable_version_counter=False)
    module = tiny_module(backbone, feature_dim=DIM, **changes)
    data = ImageTextDataModule(str(root), str(backbone), batch_size=3, answer_draw="seeded", seeded_order=True)
    trainer = quiet_trainer(
        folder, max_epochs=EPOCHS, callbacks=[losses, keep, *callbacks], enable_checkpointing=True, val_check_interval=7
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return losses.seen, trained(module)


@pytest.mark.parametrize("step", [8, 19, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 27))])
def test_a_killed_and_resumed_run_has_the_losses_and_weights_of_an_undisturbed_one(root, tiny_backbone, tmp_path, step):
    whole, weights = fit(root, tiny_backbone, tmp_path / "whole")
    assert len(whole) == 2 * 19  # 19 batches per epoch
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(root, tiny_backbone, tmp_path / "killed", Kill(step))
    torch.rand(3)
    rest, resumed = fit(root, tiny_backbone, tmp_path / "killed", ckpt_path=tmp_path / "killed" / "resume.ckpt")
    assert rest == whole[step:]  # bitwise: losses, learning rates, questions
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_dropout_is_on_while_training(root, tiny_backbone, tmp_path):
    with_dropout, _ = fit(root, tiny_backbone, tmp_path / "a")
    without, _ = fit(root, tiny_backbone, tmp_path / "b", dropout=0.0)
    assert with_dropout[0][0] != without[0][0]
