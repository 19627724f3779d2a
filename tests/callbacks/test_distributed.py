"""The Distributed callback: refused settings, logged values and gradient compression."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from callbacks import Distributed
from callbacks.distributed import bf16_problem
from tests.runs import Batches, make_batch, quiet_trainer, tiny_module
from vlpet_lightning.loggers import read_metrics


def on(device, precision="bf16-mixed"):
    return SimpleNamespace(precision=precision, strategy=SimpleNamespace(root_device=torch.device(device)))


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 has no bf16 arithmetic: set trainer.precision to 32-true" in bf16_problem(on("cuda:0"))
    with pytest.raises(ValueError, match="Tesla T4 has no bf16 arithmetic"):
        Distributed().setup(on("cuda:0"), None, "fit")


def test_bf16_runs_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert bf16_problem(on("cuda:0")) is None


def test_bf16_is_refused_on_apples_mps():
    assert "set trainer.precision to 32-true" in bf16_problem(on("mps"))


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bf16-mixed"), ("mps", "32-true")])
def test_other_combinations_are_left_alone(device, precision):
    assert bf16_problem(on(device, precision)) is None


def test_compressing_gradients_needs_ddp(tiny_backbone, tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[Distributed(bf16_gradients=True)])
    with pytest.raises(ValueError, match=r"bf16_gradients needs DistributedDataParallel, the strategy is SingleDevice"):
        trainer.fit(tiny_module(tiny_backbone), Batches([make_batch("vqa", 2, 0)]))


def test_the_effective_batch_of_every_task_is_logged(tiny_backbone, tmp_path):
    data = Batches([make_batch("vqa", 2, seed) for seed in range(4)])
    data.sizes_of_batches = {"vqa": 6, "gqa": 10}
    logger = CSVLogger(tmp_path, name="run", version="a")
    trainer = quiet_trainer(tmp_path, logger=logger, callbacks=[Distributed()], accumulate_grad_batches=2)
    trainer.fit(tiny_module(tiny_backbone), data)
    logged = {name: value for row in read_metrics(tmp_path / "run" / "a") for name, value in row.items()}
    assert (logged["batch/vqa"], logged["batch/gqa"], logged["batch/ranks"]) == (12, 20, 1)


class Ranks(DDPStrategy):
    """DistributedDataParallel on a device that need not exist; records registered hooks."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.hooks = []
        self._model = SimpleNamespace(register_comm_hook=lambda state, hook: self.hooks.append(hook))

    root_device = property(lambda self: self.device)


def ranks(device):
    common = {"precision": "32-true", "is_global_zero": False}
    return SimpleNamespace(strategy=Ranks(device), **common)


def test_compressing_gradients_needs_gpus():
    with pytest.raises(ValueError, match="bf16_gradients needs GPUs, the run is on cpu: set bf16_gradients to false"):
        Distributed(bf16_gradients=True).setup(ranks("cpu"), None, "fit")


@pytest.mark.parametrize("wanted", [False, True])
def test_gradients_are_compressed_on_request_alone(wanted):
    trainer, callback = ranks("cuda"), Distributed(bf16_gradients=wanted)
    callback.setup(trainer, None, "fit")
    callback.on_fit_start(trainer, None)
    assert trainer.strategy.hooks == [bf16_compress_hook] * wanted
