"""The same run on one, two and three ranks; state shared between ranks; how ranks end."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback

from tests.data_modules.tiny_data import DIM, write_world
from tests.runs import Batches, make_batch, placements, quiet_trainer
from vlpet_lightning import VLBart
from vlpet_lightning.__main__ import run
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.run.ranks import RankLost, ending_together, set_timeout

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_backbone):
    """The shipped experiment on a tiny world, with the gate that depends on padding, and without dropout."""
    root = tmp_path_factory.mktemp("world")
    write_world(root, train=7, held_out=5)
    callbacks = yaml.safe_load((EXPERIMENTS / "image_text.yaml").read_text())["trainer"]["callbacks"]
    for callback in callbacks:
        if "CaptionMetrics" in callback["class_path"]:
            callback["init_args"] = {"metrics": ["cider", "bleu"]}  # METEOR starts a Java process per rank
    overlay = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [one for one in callbacks if "ProgressBar" not in one["class_path"]],
        },
        "model": {"init_args": {"backbone": str(tiny_backbone), "feature_dim": DIM, "grid": 2, "dropout": 0.0}},
        # 7 and 5 samples in batches of 5, 3 and 1: shares and last batches of every size, and ranks without any
        "data": {"init_args": {"root": str(root), "batch_size": 3, "eval_batch_size": 3}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    configs = [EXPERIMENTS / "image_text.yaml", EXPERIMENTS / "pet/vlpet_small.yaml", root / "tiny.yaml"]
    return [word for config in configs for word in ("--config", str(config))]


def on(ranks, verb, words, folder, *more):
    """Run a command on several ranks and return the run folder."""
    logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(folder), "name": "run"}}
    logger["init_args"]["version"] = f"{verb}-{ranks}"
    (folder / "logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    # forked: a new process would import everything again, which the two-node tests cover
    devices = [f"--trainer.devices={ranks}", f"--trainer.strategy={'ddp_fork' if ranks > 1 else 'auto'}"]
    assert run([verb, *words, "--config", str(folder / "logger.yaml"), *devices, *more]) == 0
    return folder / "run" / f"{verb}-{ranks}"


@pytest.mark.parametrize("numbers", [(1, 3), pytest.param((1, 2, 3), marks=pytest.mark.slow)])
def test_any_number_of_ranks_trains_the_same_weights_and_predicts_the_same_bytes(words, tmp_path, numbers):
    trained = [on(ranks, "fit", words, tmp_path) / "checkpoints" / "last.ckpt" for ranks in numbers]
    alone, *others = (torch.load(path, weights_only=True) for path in trained)
    for other in others:
        assert other["global_step"] == alone["global_step"] == 19
        for name, tensor in alone["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][name], tensor, rtol=1e-3, atol=1e-5)
    tested = [on(ranks, "test", words, tmp_path, "--ckpt_path", str(trained[0])) for ranks in numbers]
    files = [{path.name: path.read_bytes() for path in (run / "predictions").iterdir()} for run in tested]
    assert {"test_vqa.json", "test_gqa.json", "test_nlvr2_submission.csv", "test_caption.json"} <= set(files[0])
    assert all(other == files[0] for other in files)
    scores = [
        {name: value for row in read_metrics(run) for name, value in row.items() if name.startswith("test/")}
        for run in tested
    ]
    assert "test/average" in scores[0]
    assert all(other == scores[0] for other in scores)


class Differing(VLBart):
    """Adds one to all weights on the second rank."""

    def configure_model(self):
        super().configure_model()
        if self.global_rank == 1:
            with torch.no_grad():
                for tensor in (*self.parameters(), *self.buffers()):
                    if tensor.is_floating_point():
                        tensor.add_(1)


class Look(Callback):
    """Records a rank's state before its first step, and the seed of every step."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = {"seeds": []}

    def on_train_start(self, trainer, pl_module):
        parameters = dict(pl_module.named_parameters())
        self.seen["trained"] = {name: p.detach().clone() for name, p in parameters.items() if p.requires_grad}
        others = {name: p for name, p in parameters.items() if not p.requires_grad} | dict(pl_module.named_buffers())
        self.seen["others"] = {name: tensor.clone() for name, tensor in others.items() if tensor.is_floating_point()}

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen["seeds"].append(torch.initial_seed())

    def on_train_end(self, trainer, pl_module):
        self.seen["after"] = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
        self.seen["gradients"] = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        torch.save(self.seen, self.folder / f"{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def ranks(tiny_backbone, tmp_path_factory):
    """The records of two ranks of a bf16-mixed run."""
    folder = tmp_path_factory.mktemp("ranks")
    rules = ["pet", "visual_embedding", "encoder.layer_norm"]
    module = Differing(str(tiny_backbone), placements(), rules, feature_dim=16, grid=2, lr=1e-2)
    settings = {"callbacks": [Look(folder)], "devices": 2, "strategy": "ddp_fork", "precision": "bf16-mixed"}
    quiet_trainer(folder, **settings).fit(module, Batches([make_batch("vqa", 4, seed) for seed in range(3)]))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_ranks_agree_on_what_is_trained_and_send_nothing_else(ranks):
    one, other = ranks
    assert all(torch.equal(one["trained"][name], other["trained"][name]) for name in one["trained"])
    assert all(torch.equal(one["after"][name], other["after"][name]) for name in one["after"])
    assert "model.lm.final_logits_bias" in one["others"]  # a buffer
    assert all(torch.equal(one["others"][name] + 1, other["others"][name]) for name in one["others"])


def test_weights_and_gradients_stay_in_float32_under_bf16(ranks):
    for seen in ranks:
        tensors = [*seen["after"].values(), *seen["gradients"].values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert any("layer_norm" in name for name in ranks[0]["gradients"])


def test_every_rank_and_step_has_a_seed_of_its_own(ranks):
    assert len({seed for seen in ranks for seed in seen["seeds"]}) == 2 * 3


# how ranks end --------------------------------------------------------------------------------------------------------


def together(act, folder):
    """Run a function on two forked ranks, one of which may die."""

    def in_a_group(rank):
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        act(rank, folder)

    processes = [torch.multiprocessing.get_context("fork").Process(target=in_a_group, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()


def waits(status):
    def act(rank, folder):
        def end():
            if rank == 1:
                signal.sigtimedwait([], 0.5)  # the slower rank
                (folder / "slow").touch()
            raise SystemExit(status)

        with pytest.raises(SystemExit), ending_together():
            end()
        (folder / f"{rank}").write_text(f"{(folder / 'slow').exists()} {dist.is_initialized()}")

    return act


@pytest.mark.parametrize(("status", "both"), [(75, "True False"), (1, "False True")])
def test_a_rank_waits_for_the_others_unless_it_has_failed(tmp_path, status, both):
    together(waits(status), tmp_path)
    assert (tmp_path / "0").read_text() == both


def loses(number):
    def act(rank, folder):
        dist.barrier()
        set_timeout(timedelta(seconds=2))
        if rank == 1:
            (folder / "other").write_text(str(os.getpid()))
            os.kill(os.getpid(), number)
        with pytest.raises(RankLost) as error, ending_together():
            dist.all_reduce(torch.zeros(3))
        (folder / "0").write_text(str(error.value))
        if number == signal.SIGSTOP:
            os.kill(int((folder / "other").read_text()), signal.SIGKILL)

    return act


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "127.0.0.1"), (signal.SIGSTOP, "imed out")])
def test_a_rank_that_ends_or_hangs_is_named_as_the_cause(tmp_path, number, reason):
    together(loses(number), tmp_path)
    message = (tmp_path / "0").read_text()
    assert message.startswith("rank 0 of 2 has lost another one: ")
    assert reason in message
    assert "--ckpt_path auto" in message


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^mine$"), ending_together():
        raise RuntimeError("mine")
