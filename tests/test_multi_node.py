"""Two nodes on one machine: network namespaces with an address and a launcher each; a node is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.data_modules.tiny_data import DIM, write_world

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0
TIMEOUT = 5.0  # time-out of collectives in seconds
RUN = "two-nodes"


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Node:
    """A network namespace with one end of a virtual cable."""

    def __init__(self, number):
        self.number = number
        self.name = f"vlpet{os.getpid()}n{number}"
        self.device = f"v{os.getpid()}n{number}"
        self.address = f"10.87.3.{number + 1}"

    def connect(self):
        ip("link", "set", self.device, "netns", self.name)
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", self.device)
        self.start()

    def start(self):
        for device in ("lo", self.device):
            ip("-n", self.name, "link", "set", device, "up")

    def launch(self, nodes, words):
        """Start a launcher as a user would; on a single node, with one process per node that there would be."""
        processes = 1 if nodes > 1 else 2
        torchrun = {
            "nnodes": nodes,
            "nproc-per-node": processes,
            "rdzv-backend": "c10d",
            "rdzv-endpoint": "10.87.3.1:29500",
            "rdzv-id": RUN,
            "rdzv-conf": f"is_host={int(self.number == 0)}",
            "local-addr": self.address,
        }
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        command += [f"--{name}={value}" for name, value in torchrun.items()]
        command += ["-m", "vlpet_lightning", "fit", *words, "--ckpt_path", "auto"]
        command += [f"--trainer.devices={processes}", f"--trainer.num_nodes={nodes}"]
        environment = os.environ | {"VLPET_RUN": RUN, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.device}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=-2, text=True)

    def lose_power(self):
        """End all processes without notifying other nodes."""
        ip("-n", self.name, "link", "set", self.device, "down")
        self.kill()

    def kill(self):
        """End all processes; the kernel closes their connections."""
        for process in ip("netns", "pids", self.name).split():
            os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def nodes():
    """Two connected nodes."""
    pair = [Node(0), Node(1)]
    if shutil.which("ip") is None:
        pytest.skip("two nodes on one machine need iproute2")
    try:
        try:
            for node in pair:
                ip("netns", "add", node.name)
            ip("link", "add", pair[0].device, "type", "veth", "peer", "name", pair[1].device)
            for node in pair:
                node.connect()
                ip("netns", "exec", node.name, "true")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield pair
    finally:
        for node in pair:
            if node.name in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout:
                node.kill()
                ip("netns", "delete", node.name)  # and its end of the virtual cable


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_backbone):
    """The shipped experiment on a tiny world, without dropout, which every rank draws separately."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    keep = {"filename": "resume", "every_n_train_steps": 1, "enable_version_counter": False}
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    overlay = {
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "strategy": "ddp",
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "callbacks.Distributed", "init_args": {"timeout": TIMEOUT}},
                {"class_path": "callbacks.Preemption"},
                {"class_path": checkpoint, "init_args": {"filename": "final", "save_last": True}},
                {"class_path": checkpoint, "init_args": keep},
            ],
        },
        "model": {"init_args": {"backbone": str(tiny_backbone), "feature_dim": DIM, "grid": 2, "dropout": 0.0}},
        "data": {"init_args": {"root": str(root), "batch_size": 3}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return ["--config", str(ROOT / "experiments/image_text.yaml"), "--config", str(root / "tiny.yaml")]


class Run:
    """A run in a folder visible to all nodes."""

    def __init__(self, words, folder):
        logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(folder), "name": "run"}}
        folder.mkdir()
        (folder / "logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
        self.words = [*words, "--config", str(folder / "logger.yaml")]
        self.checkpoints = folder / "run" / RUN / "checkpoints"

    def finish(self, nodes):
        started = [node.launch(len(nodes), self.words) for node in nodes]
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(nodes), outputs
        return self.load("last.ckpt")

    def load(self, name):
        return torch.load(self.checkpoints / name, weights_only=True)

    def trains(self, steps):
        """Wait until a number of steps was saved."""
        path, seen, end = self.checkpoints / "resume.ckpt", set(), time.monotonic() + PATIENCE
        while len(seen) < steps:
            assert time.monotonic() < end, f"{len(seen)} of {steps} checkpoints"
            if path.exists():
                seen.add(path.stat().st_mtime_ns)
            time.sleep(0.002)


def same(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_on_two_nodes_has_the_weights_of_one_process(nodes, words, tmp_path):
    from vlpet_lightning.__main__ import run

    words = [*words, "--trainer.max_epochs=1"]
    both = Run(words, tmp_path / "both").finish(nodes)
    alone = ["--trainer.strategy=auto", "--trainer.enable_progress_bar=false"]
    logger = f"--trainer.logger.save_dir={tmp_path / 'alone'}"
    assert run(["fit", *Run(words, tmp_path / "alone").words, *alone, logger]) == 0
    (path,) = (tmp_path / "alone").rglob("last.ckpt")
    expected = torch.load(path, weights_only=True)
    assert both["global_step"] == expected["global_step"] == 19
    for name, tensor in expected["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", [Node.kill, Node.lose_power], ids=["killed", "without-a-word"])
def test_when_a_node_is_lost_the_other_says_so_and_the_restart_is_the_undisturbed_run(
    nodes, words, tmp_path, how, lost
):
    run = Run(words, tmp_path / "disturbed")
    processes = [node.launch(2, run.words) for node in nodes]
    run.trains(8)
    how(nodes[lost])
    other, left = processes[1 - lost], nodes[1 - lost]
    watch = threading.Timer(PATIENCE, left.kill)  # far below the half hours of torch and Lightning
    watch.start()
    assert any(f"RankLost: rank {1 - lost} of 2 has lost another one" in line for line in other.stdout)
    if how is Node.lose_power and lost == 0:
        left.kill()  # torchrun keeps retrying its silent rendezvous host: docs/cluster.md
    other.communicate(timeout=PATIENCE)
    watch.cancel()
    assert other.returncode == (-signal.SIGKILL if how is Node.lose_power and lost == 0 else 1)
    assert 0 < run.load("resume.ckpt")["global_step"] < 4 * 19
    nodes[lost].start()
    whole = Run(words, tmp_path / "whole").finish(nodes[:1])  # two processes on one node
    assert same(run.finish(nodes)["state_dict"], whole["state_dict"])
