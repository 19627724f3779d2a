"""Fixtures every test may use."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads on two cores can be 20 times slower than one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import vlpet_lightning  # noqa: F401  # its torchvision cure must run first
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
