"""Features in memory: the same batches as from disk, on one rank and sharded over several."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from data_modules.image_text import ImageTextDataModule
from data_modules.store import bank
from data_modules.store.bank import FeatureBank, TooLargeForMemory
from data_modules.store.recode import recode
from data_modules.store.store import FeatureStore
from tests.data_modules.tiny_data import DIM, write_features, write_world
from tests.runs import quiet_trainer, tiny_module
from vlpet_lightning.batch import Batch

ROWS = 20
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    write_features(tmp_path / "s", [str(number) for number in range(ROWS)])
    return FeatureStore(tmp_path / "s")


@pytest.mark.parametrize("rows", ["float16", "uint8", "zstd"])
def test_a_bank_gathers_what_the_store_gathers(store: FeatureStore, tmp_path: Path, rows: str) -> None:
    recode(source=store.path, out=tmp_path / "t", rows=rows)
    coded = FeatureStore(tmp_path / "t")
    needed = np.array([3, 5, 5, 19, 0, 7])
    held = FeatureBank(coded, needed, device=CPU)
    wanted = np.array([7, 5, 19, 5])
    assert torch.equal(held.gather([wanted]), torch.from_numpy(coded.gather(wanted)))
    assert len(held.values) == 5  # each required row once


def on_one_rank(rank: int, folder: str, ranks: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    store = FeatureStore(Path(folder) / "s")
    held = FeatureBank(store, np.arange(1, ROWS), device=CPU, rank=rank, world_size=ranks)
    generator = np.random.default_rng(0)  # the same on every rank
    for size in (7, 1, 12):
        rows = [generator.integers(1, ROWS, max(1, size - other)) for other in range(ranks)]
        assert torch.equal(held.gather(rows), torch.from_numpy(store.gather(rows[rank])))
    Path(folder, f"{rank}.count").write_text(str(len(held.values)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_and_exchange_them(store: FeatureStore, tmp_path: Path, ranks: int) -> None:
    torch.multiprocessing.start_processes(on_one_rank, args=(str(tmp_path), ranks), nprocs=ranks, start_method="fork")
    counts = [int((tmp_path / f"{rank}.count").read_text()) for rank in range(ranks)]
    assert sum(counts) == ROWS - 1
    assert max(counts) - min(counts) <= 1


class Seen(Callback):
    """Records the batch and loss of each training step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.steps.append((batch.ids, batch.features.clone(), float(outputs["loss"])))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(self.steps, self.folder / f"{trainer.global_rank}.pt")


def fitted(backbone: Path, root: Path, folder: Path, devices: int, **options: Any) -> list[Any]:
    folder.mkdir()
    data = ImageTextDataModule(
        str(root), str(backbone), ["vqa", "nlvr2"], batch_size=3, eval_batch_size=3, batch_sizes={"nlvr2": 2}, **options
    )
    many = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    trainer = quiet_trainer(folder, max_epochs=2, limit_val_batches=0, callbacks=[Seen(folder)], **many)
    trainer.fit(tiny_module(backbone, feature_dim=DIM, grid=None), data)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.parametrize(
    ("devices", "options"), [(1, {"bank": "device"}), (1, {"bank": "ram", "num_workers": 1}), (2, {"bank": "device"})]
)
def test_training_from_a_bank_is_training_from_the_store(
    tiny_backbone: Path, tmp_path: Path, devices: int, options: dict[str, Any]
) -> None:
    write_world(tmp_path / "root")
    plain = fitted(tiny_backbone, tmp_path / "root", tmp_path / "plain", devices)
    banked = fitted(tiny_backbone, tmp_path / "root", tmp_path / "banked", devices, **options)
    for one, other in zip(plain, banked, strict=True):
        assert len(one) > 4
        for (ids, features, loss), (their_ids, theirs, their_loss) in zip(one, other, strict=True):
            assert ids == their_ids
            assert torch.equal(features, theirs)
            assert loss == their_loss


def test_features_that_do_not_fit_are_refused(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "free_memory", lambda device: 100)
    with pytest.raises(TooLargeForMemory, match=r"need .* GB on cpu, and 1e-07 GB are free: .*--rows uint8"):
        FeatureBank(store, np.arange(ROWS), device=CPU)


def on_a_full_machine(rank: int, folder: str, ranks: int) -> None:
    store = FeatureStore(Path(folder) / "s")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    share = ROWS // ranks * store.tokens * store.dim * 2
    bank.free_memory = lambda device: 2 * share  # enough memory for each share, but not for all
    try:
        FeatureBank(store, np.arange(ROWS), device=CPU, rank=rank, world_size=ranks, neighbours=ranks)
    except TooLargeForMemory:
        Path(folder, f"{rank}.refused").touch()
    torch.distributed.destroy_process_group()


def test_ranks_of_one_machine_do_not_take_its_memory_together(store: FeatureStore, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(on_a_full_machine, args=(str(tmp_path), 2), nprocs=2, start_method="fork")
    assert len(list(tmp_path.glob("*.refused"))) == 2


def test_free_memory_is_asked_of_the_machine() -> None:
    free = bank.free_memory(CPU)
    assert (free is not None) == Path("/proc/meminfo").exists()
    assert free is None or free > 10 * 2**20
