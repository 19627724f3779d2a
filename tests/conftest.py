"""Fixtures shared by all tests."""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads on two cores can be 20 times slower than one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

import vlpet_lightning  # noqa: F401  # its torchvision cure must run first
from tests.tiny import save_backbone, save_t5_backbone


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection, as the program does: it takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread, and random numbers independent of other tests."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BART with its tokenizer, saved in the real formats."""
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer T5 with its tokenizer, saved in the real formats."""
    return save_t5_backbone(tmp_path_factory.mktemp("t5"))
