"""Gradients of two and three ranks equal those of one, for every method; DDP options of each."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from tests.conformance import KINDS, Bench
from tests.conformance.cases import CASES
from tests.runs import Batches, quiet_trainer

TASKS = ("vqa", "caption")
STEPS = [*TASKS, *TASKS]
BENCHES = {f"{kind}-{case.name}": Bench(case, kind) for kind in KINDS for case in CASES}
QUICK = ["bart-vlpet-large", "t5-adapter-per-task", "t5-hyperformer-one", "bart-prompt-per-task"]


class Record(Callback):
    """Records the gradients of every step and the options of DistributedDataParallel."""

    def __init__(self):
        self.gradients = []

    def on_train_start(self, trainer, pl_module):
        told = trainer.strategy.model
        self.searches, self.static = (getattr(told, name, False) for name in ("find_unused_parameters", "static_graph"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


class OneOfSeveral(LightningEnvironment):
    """Environment of an existing process group, which is shared by the runs of all methods."""

    creates_processes_externally = True

    def __init__(self, rank, world_size):
        super().__init__()
        self.rank, self.size = rank, world_size

    def local_rank(self):
        return self.rank

    def global_rank(self):
        return self.rank

    def world_size(self):
        return self.size


def gradients(name, root, **changes):
    bench, record = BENCHES[name], Record()
    module = bench.module(bench.loud())
    module.lr = 0.0  # every step starts from the same weights
    # 5 samples over the ranks: averaging the ranks' means would be wrong
    batches = [bench.batch(task, size=5, seed=seed) for seed, task in enumerate(STEPS)]
    quiet_trainer(root, callbacks=[record], **changes).fit(module, Batches(batches))
    return record.gradients, record.searches, record.static


def on_one_rank(rank, world_size, names, root, changes):
    torch.set_num_threads(1)
    found = {}
    for name in names:
        strategy = DDPStrategy(cluster_environment=OneOfSeveral(rank, world_size), process_group_backend="gloo")
        found[name] = gradients(name, root, devices=world_size, strategy=strategy, **changes)
    torch.save(found, root / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_ranks(root, monkeypatch, names, world_size, **changes):
    """Return the results of every rank, for every method."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(OneOfSeveral(0, 1).main_port))
    arguments = (world_size, names, root, changes)
    # forked: a spawned child imports lightning before our torchvision cure
    torch.multiprocessing.start_processes(on_one_rank, arguments, nprocs=world_size, start_method="fork")
    return [torch.load(root / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def assert_equal(name, found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for key, gradient in theirs.items():
            torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("names", [QUICK, pytest.param(list(BENCHES), marks=pytest.mark.slow)], ids=["some", "all"])
def test_processes_have_the_gradients_of_one(tmp_path, monkeypatch, names, world_size):
    ranks = on_ranks(tmp_path, monkeypatch, names, world_size)
    for name in names:
        alone, *_ = gradients(name, tmp_path)
        assert len(alone) == len(STEPS)
        skips = len({frozenset(step) for step in alone}) > 1
        for rank in ranks:
            found, searches, static = rank[name]
            assert (searches, static) == (skips, not skips), name
            assert_equal(name, found, alone)


def test_a_step_of_several_batches_is_no_static_graph(tmp_path, monkeypatch):
    """With a static graph, torch's first step fails (pytorch issue 143580)."""
    names, changes = QUICK[:2], {"accumulate_grad_batches": 2}
    ranks = on_ranks(tmp_path, monkeypatch, names, 2, **changes)
    for name in names:
        alone, *_ = gradients(name, tmp_path, **changes)
        assert len(alone) == len(STEPS) // 2
        for rank in ranks:
            found, _, static = rank[name]
            assert not static
            assert_equal(name, found, alone)
