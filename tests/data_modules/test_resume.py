import warnings

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_modules.image_text import ImageTextDataModule
from tests.data_modules.tiny_data import write_tokenizer, write_world

EPOCHS = 3
TASKS = ["vqa", "nlvr2"]


class Recorder(LightningModule):
    """Trains trivially, and records the questions and labels of each step."""

    def __init__(self, schedule: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.schedule = schedule
        self.seen: list = []
        self.lengths: list = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.task, batch.ids, batch.labels.tolist()))
        self.lengths.append(self.trainer.num_training_batches)
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch):
        pass

    def predict_step(self, batch):
        return batch.ids

    def configure_optimizers(self):
        if self.schedule:  # accesses the train loader before the run is restored
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    write_tokenizer(root / "tokenizer")
    return root


def data(root, **options):
    defaults = {"batch_size": 3, "tasks": TASKS, "answer_draw": "seeded"}
    return ImageTextDataModule(root=str(root), tokenizer=str(root / "tokenizer"), **(defaults | options))


def trainer(folder, callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, max_epochs=EPOCHS, callbacks=list(callbacks), **(quiet | options))


def fit(root, folder, *, callbacks=(), ckpt_path=None, schedule=False, workers=0, **options):
    model = Recorder(schedule)
    trainer(folder, callbacks, **options).fit(
        model, data(root, num_workers=workers), ckpt_path=ckpt_path, weights_only=True
    )
    return model


def checkpoints(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(root, folder, callbacks=[checkpoints(folder)]), folder


def test_epochs_differ_and_each_has_every_sample_once(whole):
    model, _ = whole
    epochs = [[(task, id) for e, _, task, ids, _ in model.seen if e == epoch for id in ids] for epoch in range(EPOCHS)]
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS
    assert all(len(epoch) == len(set(epoch)) == 14 for epoch in epochs)


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("step", [1, 4, 9, 10, 11, 13, 20, 29])
def test_a_run_resumed_at_any_step_sees_exactly_the_remaining_batches(root, whole, tmp_path, step, schedule):
    model, folder = whole
    assert len(model.seen) == 30  # 10 batches per epoch: epochs end at steps 10 and 20
    resumed = fit(root, tmp_path, ckpt_path=folder / f"step={step}.ckpt", schedule=schedule)
    assert resumed.seen == model.seen[step:]
    assert set(resumed.lengths) == {10}


@pytest.mark.parametrize("step", [3, 10, 17])
def test_a_killed_run_goes_on_where_it_was_with_validation_in_between(root, whole, tmp_path, step):
    callbacks = [checkpoints(tmp_path), Kill(step)]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(root, tmp_path, callbacks=callbacks, val_check_interval=5)
    path = tmp_path / f"step={step}.ckpt"
    resumed = fit(root, tmp_path, ckpt_path=path, callbacks=[checkpoints(tmp_path)], val_check_interval=5)
    assert resumed.seen == whole[0].seen[step:]


def test_a_checkpoint_of_an_epoch_s_end_starts_the_next_epoch(root, whole, tmp_path):
    end = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(root, tmp_path, callbacks=[end])
    assert fit(root, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt").seen == whole[0].seen[10:]


def test_a_resumed_run_with_a_worker_process_sees_the_remaining_batches(root, whole, tmp_path):
    resumed = fit(root, tmp_path, ckpt_path=whole[1] / "step=17.ckpt", workers=1)
    assert resumed.seen == whole[0].seen[17:]


def test_a_resumed_run_does_not_warn_that_its_loader_cannot_resume(root, whole, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        assert fit(root, tmp_path, ckpt_path=whole[1] / "step=4.ckpt").seen == whole[0].seen[4:]


def test_other_batches_than_in_the_checkpoint_are_refused(root, whole, tmp_path):
    with pytest.raises(ValueError, match="an epoch had 10 batches when the checkpoint was written and has 14 now"):
        trainer(tmp_path).fit(
            Recorder(), data(root, batch_size=1), ckpt_path=whole[1] / "step=4.ckpt", weights_only=True
        )


def test_prediction_covers_the_test_split_in_order(root, tmp_path):
    ids = trainer(tmp_path).predict(Recorder(), data(root))
    assert [id for batch in ids for id in batch] == [str(i) for i in range(11, 15)] + [
        f"nlvr2_test_{i}" for i in range(4)
    ]


def bucketed(root, folder, **options):
    options = {"length_buckets": 2, "seeded_order": True, "tasks": ["vqa", "caption"]} | options
    model = Recorder()
    callbacks = options.pop("callbacks", ())
    path = options.pop("ckpt_path", None)
    trainer(folder, callbacks).fit(model, data(root, **options), ckpt_path=path, weights_only=True)
    return model


@pytest.mark.parametrize("step", [1, 7, 13])
def test_a_run_with_length_buckets_resumes_with_exactly_the_remaining_batches(root, tmp_path, step):
    whole = bucketed(root, tmp_path / "whole", callbacks=[checkpoints(tmp_path)])
    epochs = [[(task, id) for e, _, task, ids, _ in whole.seen if e == epoch for id in ids] for epoch in range(EPOCHS)]
    assert all(len(epoch) == len(set(epoch)) == 21 for epoch in epochs)
    resumed = bucketed(root, tmp_path / "resumed", ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.seen == whole.seen[step:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length_buckets": 0}, "length_buckets was 2 when the checkpoint was written and is 0 now"),
        ({"length_buckets": 3}, "length_buckets was 2 when the checkpoint was written and is 3 now"),
        ({"prompts": {"vqa": "a longer prompt : "}}, "length_buckets is the same"),
    ],
)
def test_a_run_with_other_length_buckets_is_refused(root, tmp_path, change, message):
    bucketed(root, tmp_path / "whole", callbacks=[checkpoints(tmp_path)])
    with pytest.raises(ValueError, match=message):
        bucketed(root, tmp_path / "resumed", ckpt_path=tmp_path / "step=4.ckpt", **change)


def test_length_buckets_are_refused_in_the_order_of_the_original(root):
    with pytest.raises(ValueError, match="length_buckets: 4 changes the order of samples, and seeded_order: false"):
        data(root, length_buckets=4)


def test_overfitting_on_few_batches_names_what_to_use_instead(root, tmp_path):
    with pytest.raises(ValueError, match=r"use data\.limit_train"):
        trainer(tmp_path, overfit_batches=2).fit(Recorder(), data(root))


def order_of(module):
    """Return the training batches of the next epoch: task, samples and answers of each."""
    return [(batch.task, batch.ids, batch.labels.tolist()) for batch in module.train_dataloader()]


def test_the_seed_of_the_run_decides_order_and_answers_and_a_resumed_run_keeps_that_of_its_checkpoint(
    root, monkeypatch
):
    found = {}
    for seed in ("1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)  # as `seed_everything` sets it
        found[seed] = module = data(root, seeded_order=True, tasks=["vqa", "gqa"])
        module.setup("fit")
    one, other = order_of(found["1"]), order_of(found["2"])
    assert sorted(ids for _, batch, _ in one for ids in batch) == sorted(ids for _, batch, _ in other for ids in batch)
    assert [batch[:2] for batch in one] != [batch[:2] for batch in other]
    found["2"].load_state_dict(found["1"].state_dict())
    assert order_of(found["2"]) == one
    older = found["1"].state_dict()
    del older["seed"]
    found["2"].load_state_dict(older)
    assert found["2"].seed == 42
    assert data(root, seed=5).seed == 5
