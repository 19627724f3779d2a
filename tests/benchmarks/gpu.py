"""Everything to measure on one GPU, in the order of its importance, within a few minutes.

``python -m tests.benchmarks.gpu --out DIR [--minutes 8] [--device cpu --tiny]``

Needs torch, transformers, lightning, torchmetrics, safetensors, numpy, pillow and rich; a part that needs more is
skipped with a line. Every figure is printed as it is measured. DIR gets gpu.json and gpu.md after each part, so that
nothing is lost if the run is cut off. No part starts after the time has run out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from tests.benchmarks.contenders import (
    FULL,
    KINDS,
    LST,
    make_batches,
    our_model,
    our_optimizer,
    plain_model,
    plain_optimizer,
    training_pass,
)
from tests.benchmarks.gpu_generation import generation, recorded_generation
from tests.benchmarks.gpu_vlm import decoder_only
from tests.benchmarks.memory import DEFAULT as BY_MEMORY
from tests.benchmarks.memory import Shape, predict
from tests.benchmarks.pairs import seconds_of, wait
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.batch import Batch
from vlpet_lightning.compilation import compile_layers
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.model import VLModel

METHOD = "VL-PET-large"
TEXT, TARGET, IMAGES = 20, 5, 36
GIB = 2**30


class OutOfTime(Exception):
    """The time has run out."""


class Session:
    """Options, clock and results of a run.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.tiny: bool = options.tiny
        self.out: Path | None = options.out
        self.start = time.monotonic()
        self.end = self.start + 60 * options.minutes
        self.rows: list[dict[str, Any]] = []

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def check_time(self) -> None:
        """Raise :class:`OutOfTime` if the time has run out."""
        if time.monotonic() > self.end:
            raise OutOfTime

    def say(self, part: str, **figures: Any) -> None:
        """Record and print a result."""
        self.rows.append({"part": part, **figures})
        text = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
        sys.stdout.write(f"{time.monotonic() - self.start:6.1f} s  {part}: {text}\n")
        sys.stdout.flush()

    def save(self) -> None:
        """Write all results."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "gpu.json").write_text(json.dumps(self.rows, indent=1) + "\n")
            (self.out / "gpu.md").write_text(as_markdown(self.rows))

    def median(self, work: Callable[[], Any], repeats: int = 8, warm_up: int = 3) -> float:
        """Return the median seconds of a call."""
        for _ in range(warm_up):
            work()
        return statistics.median(seconds_of(work, self.device) for _ in range(repeats))

    def peak(self) -> float:
        """Return the peak of allocated GPU memory in GiB since :meth:`forget`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0

    def forget(self) -> None:
        """Free cached GPU memory and reset its peak."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def autocast(self, bf16: bool) -> Any:
        return torch.autocast(self.device, torch.bfloat16) if bf16 else nullcontext()

    def model(self, kind: str, method: str = METHOD, changes: dict[str, float] | None = None) -> VLModel:
        with torch.device(self.device):
            return our_model(kind, method, tiny=self.tiny, changes=changes)

    def batch(self, kind: str, size: int, target: int = TARGET, device: str | None = None) -> Batch:
        return make_batches(kind, [size], text=TEXT, target=target, device=device or self.device)[0]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table for docs/performance.md."""
    lines = [f"Measured on {date.today().isoformat()}.", "", "| part | figures |", "|---|---|"]
    for row in rows:
        figures = ", ".join(f"{name} {_short(value)}" for name, value in row.items() if name != "part")
        lines.append(f"| {row['part']} | {figures} |")
    return "\n".join(lines) + "\n"


# parts ---------------------------------------------------------------------------------------------------------------


def machine(run: Session) -> None:
    """Device, versions, and the measured peak of matrix products."""
    name = torch.cuda.get_device_name() if run.cuda else "cpu"
    run.say(
        "machine",
        device=name,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=sys.version.split()[0],
    )
    size = 8192 if run.cuda else 512
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        matrix = torch.randn(size, size, device=run.device, dtype=dtype)
        seconds = run.median(lambda matrix=matrix: matrix @ matrix)  # type: ignore[misc]
        run.say(f"matrix product, {'tf32' if tf32 else 'bf16'}", tflops=2 * size**3 / seconds / 1e12)


def _outcome(
    run: Session, model: VLModel, device: str, batch: Batch
) -> tuple[float, torch.Tensor, torch.Tensor, float]:
    model.to(device).zero_grad()
    batch = batch.to(device)
    loss = model.loss(batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    tokens = model.generate(batch, num_beams=5, max_length=12).cpu()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        half = model.loss(batch).item()
    return loss.item(), gradient, tokens, half


def correctness(run: Session) -> None:
    """Loss, gradients and tokens in float32 against the CPU, and the loss in bf16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for tiny in (True, False) if not run.tiny else (True,):
        for kind in KINDS:
            model = our_model(kind, METHOD, tiny=tiny).eval()
            batch = make_batches(kind, [8], text=TEXT, target=TARGET)[0]
            loss, gradient, tokens, _ = _outcome(run, model, "cpu", batch)
            there, theirs, generated, half = _outcome(run, model, run.device, batch)
            run.say(
                f"{kind}{' tiny' if tiny else ''}, float32 against the CPU",
                loss_difference=abs(loss - there),
                gradient_difference=((gradient - theirs).norm() / gradient.norm()).item(),
                tokens_equal=tokens.shape == generated.shape and bool(torch.equal(tokens, generated)),
                bf16_loss_difference=abs(half - loss),
            )


def parity(run: Session) -> None:
    """Every file of the original implementation's tensors."""
    from tests.parity import Parity, largest, parity_files

    torch.backends.cuda.matmul.allow_tf32 = False
    for path in parity_files():
        file = Parity(path)
        model, figures = file.model.to(run.device), {}
        batch = file.batch().to(run.device)
        for key, found in (("output.logits", model), ("output.loss", model.loss)):
            if key in file.tensors:
                name = f"{key.removeprefix('output.')}_difference"
                figures[name] = largest(found(batch).detach().cpu(), file.tensors[key])
        for beams in (1, 5):
            expected = file.tensors.get(f"output.generate_beams{beams}")
            if expected is not None:
                length = int(file.metadata.get("max_length", 10))
                tokens = model.generate(batch, num_beams=beams, max_length=length).cpu()
                figures[f"tokens_equal_{beams}"] = bool(torch.equal(tokens, expected))
        run.say(f"parity {path.stem}", **figures)


def sync_places(seen: list[warnings.WarningMessage]) -> list[str]:
    """Return file and line of each synchronisation that torch warned of."""
    warned = [w for w in seen if "synchronizing CUDA operation" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}" for w in warned]


def synchronisations(run: Session) -> None:
    """Operations of a training step that wait for the device."""
    if not run.cuda:
        run.say("synchronisations", skipped="needs a GPU")
        return
    for kind in KINDS:
        model, batch = run.model(kind), run.batch(kind, 64, device="cpu").pin_memory()
        work = training_pass(
            lambda b, m=model: m.loss(b.to("cuda")), our_optimizer(model), [batch], device="cuda", bf16=True
        )  # type: ignore[misc]
        work()
        work()
        wait("cuda")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = sync_places(seen)
        run.say(f"synchronisations in a step, {kind}", count=len(places), where=" ".join(sorted(set(places))) or "none")


def attention(run: Session) -> None:
    """Attention kernels at the encoder's shape, forward and backward, in bf16 with a padding mask and dropout."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    size, length = (8 if run.tiny else 500), TEXT + IMAGES
    states = torch.randn(3, size, length, 12, 64, device=run.device, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(size, 1, 1, length, device=run.device, dtype=torch.bool)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):

        def work(backend: SDPBackend = backend) -> None:
            query, key, value = states.transpose(2, 3)
            with sdpa_kernel(backend):
                found = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.1)
            found.backward(found.detach())

        try:
            run.say(f"attention, {backend.name}", ms=1e3 * run.median(work))
        except RuntimeError as error:
            run.say(f"attention, {backend.name}", failed=str(error)[:100])


def _step(model: VLModel, batch: Batch) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model.loss(batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def graphs(run: Session) -> None:
    """Losses and gradients of CUDA graphs against eager execution, without dropout, over batches of three shapes."""
    if not run.cuda:
        run.say("CUDA graphs", skipped="needs a GPU")
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    for kind in KINDS:
        rates = dict.fromkeys(BACKBONES[kind].dropouts, 0.0)
        eager, graphed = run.model(kind, changes=rates), run.model(kind, changes=rates)
        graphed.load_state_dict(eager.state_dict())
        graphed.use_cuda_graphs()
        for bf16 in (False, True):
            losses, gradients = [], []
            for text, target, seed in ((20, 5, 1), (11, 3, 2), (20, 5, 3), (14, 9, 4), (11, 3, 5)):
                batch = make_batches(kind, [32], text=text, target=target, seed=seed, device=run.device)[0]
                with run.autocast(bf16):
                    (loss, gradient), (other_loss, other) = _step(eager, batch), _step(graphed, batch)
                losses.append(abs(loss - other_loss))
                gradients.append(((gradient - other).norm() / gradient.norm()).item())
            run.say(
                f"CUDA graphs against eager, {kind}, {'bf16' if bf16 else 'float32'}",
                loss_difference=max(losses),
                gradient_difference=max(gradients),
            )


HALF: dict[str, Any] = {"bf16": True, "frozen": True}
WAYS: dict[str, dict[str, Any]] = {
    "plain loop, tf32": {"plain": True},
    "plain loop, bf16": {"plain": True, "bf16": True},
    "tf32": {},
    "bf16": {"bf16": True},
    "bf16, frozen weights in bf16": HALF,
    "bf16, frozen weights in bf16, CUDA graphs": HALF | {"graphs": True},
    "bf16, frozen weights in bf16, compiled": HALF | {"compiled": True},
    "bf16, frozen weights in bf16, compiled, CUDA graphs": HALF | {"compiled": True, "graphs": True},
    "bf16, frozen weights in bf16, compiled, CUDA graphs, attention in products": HALF
    | {"compiled": True, "graphs": True, "attention": "eager"},
    "plain loop, full fine-tuning, bf16": {"plain": True, "bf16": True, "method": FULL},
    "plain loop, LoRA of peft, bf16": {"plain": True, "bf16": True, "peft": True},
    "LoRA, bf16, frozen weights in bf16": HALF | {"method": "LoRA"},
    "LoRA, bf16, frozen weights in bf16, CUDA graphs": HALF | {"method": "LoRA", "graphs": True},
    "LST, bf16, frozen weights in bf16, CUDA graphs": HALF | {"method": LST, "graphs": True},
}
EAGER, COMPILED, OTHER_METHODS = list(WAYS)[:6], list(WAYS)[6:9], list(WAYS)[9:]
MEMORY: dict[str, dict[str, Any]] = {
    f"{method}, {name}": {"method": method, "predicted": True, **settings}
    for name, settings in (("tf32", {}), ("bf16, frozen weights in bf16", HALF))
    for method in BY_MEMORY
}
WAYS |= MEMORY


def _train(run: Session, kind: str, size: int, target: int, way: str) -> None:
    settings = WAYS[way]
    bf16 = settings.get("bf16", False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run.forget()
    batch = run.batch(kind, size, target)
    method = settings.get("method", METHOD)
    model: Any
    if settings.get("plain"):
        with torch.device(run.device):
            model = plain_model(kind, method, tiny=run.tiny, peft=settings.get("peft", False))
        optimizer = plain_optimizer(model)
    else:
        model = run.model(kind, method)
        optimizer = our_optimizer(model)
    if "attention" in settings:  # short sequences may be faster without a fused kernel, if the compiler fuses softmax
        model.lm.set_attn_implementation(settings["attention"])
    if settings.get("frozen"):
        cast_frozen(model, torch.bfloat16)
    if settings.get("compiled"):
        compile_layers(model.layers(), fullgraph=True)
    if settings.get("graphs") and run.cuda:
        model.use_cuda_graphs()
    work = training_pass(model.loss, optimizer, [batch], device=run.device, bf16=bf16)
    first = seconds_of(work, run.device)
    seconds = run.median(work)
    figures: dict[str, Any] = {"samples_per_s": size / seconds, "first_step_s": first, "peak_gib": run.peak()}
    if settings.get("predicted"):
        shape = Shape(kind, size, TEXT, IMAGES, target)
        figures["activations_gib"] = predict(shape, method, way, run.tiny)["activations_gpu"] / GIB
    if not settings.get("plain"):
        flops = training_flops(sizes_of(model), images=IMAGES, source=TEXT + IMAGES, target=target)
        figures["model_tflops"] = size * flops / seconds / 1e12
    run.say(f"train {kind}, batch {size}, target {target}, {way}", **figures)


def training(run: Session, kind: str, sizes: list[tuple[int, int]], ways: list[str]) -> None:
    """Speed and memory of training steps."""
    for size, target in sizes:
        for way in ways:
            run.check_time()
            try:
                _train(run, kind, size, target, way)
            except torch.OutOfMemoryError:
                run.say(f"train {kind}, batch {size}, target {target}, {way}", failed="out of memory")


def largest_batch(run: Session) -> None:
    """The largest batch that fits, in powers of two times 500, in the best configuration."""
    way = "bf16, frozen weights in bf16, CUDA graphs"
    size = 16 if run.tiny else 1000
    while size <= (32 if run.tiny else 16_000):
        run.check_time()
        try:
            _train(run, "bart", size, TARGET, way)
        except torch.OutOfMemoryError:
            run.say(f"largest batch, {way}", batch=size // 2)
            return
        size *= 2
    run.say(f"largest batch, {way}", batch_at_least=size // 2)


def bank(run: Session) -> None:
    """Features gathered on the device against features copied from pinned host memory."""
    import numpy as np

    from data_modules.store.bank import FeatureBank
    from data_modules.store.store import FeatureStore
    from data_modules.store.writer import FeatureWriter

    images, size = (64, 16) if run.tiny else (5000, 500)
    with tempfile.TemporaryDirectory() as folder:
        values = np.random.default_rng(0).standard_normal((64, IMAGES, 2048)).astype(np.float16)
        with FeatureWriter(Path(folder) / "store", tokens=IMAGES, dim=2048) as writer:
            for start in range(0, images, 64):
                ids = [str(number) for number in range(start, min(start + 64, images))]
                writer.add(ids, values[: len(ids)])
        store = FeatureStore(Path(folder) / "store")
        held = FeatureBank(store, np.arange(images), device=torch.device(run.device))
        rows = np.random.default_rng(1).integers(0, images, size)
        host = torch.from_numpy(store.stored(rows))
        host = host.pin_memory() if run.cuda else host
        on_device = run.median(lambda: held.gather([rows]))
        copied = run.median(lambda: host.to(run.device, non_blocking=True))
        read = run.median(lambda: store.stored(rows))
    run.say("data.bank device", gather_ms=1e3 * on_device, copy_ms=1e3 * copied, host_read_ms=1e3 * read)


class _Resumable:
    """Batches that continue at the trainer's batch count, because a prefetching loader is ahead of it."""

    def __init__(self, batches: list[Batch], trainer: Any) -> None:
        self.batches = batches
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches[self.trainer.fit_loop.epoch_loop.batch_progress.current.completed :]

    def state_dict(self) -> dict[str, Any]:
        return {}  # tells Lightning that this loader can resume in mid-epoch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def fit(run: Session) -> None:
    """A fit of 200 steps that is stopped by SIGTERM and resumed, against one that is not stopped."""
    from lightning.pytorch import Callback

    from callbacks.preemption import Preemption
    from tests.runs import make_batch, quiet_trainer, tiny_module, trained
    from tests.tiny import save_backbone
    from vlpet_lightning.run.signals import Preempted

    steps = 20 if run.tiny else 200

    class Watch(Callback):
        """Reports operations of the steps in the middle that wait for the GPU."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if run.cuda and batch_idx in (steps // 2, steps // 2 + 10):
                torch.cuda.set_sync_debug_mode("warn" if batch_idx == steps // 2 else "default")

    class Stop(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            if trainer.global_step == steps // 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_backbone(root / "backbone")
        data = [make_batch("gqa", 32, seed) for seed in range(steps)]
        settings = {"accelerator": "gpu" if run.cuda else "cpu", "precision": "bf16-mixed"}
        whole, stopped, resumed = (tiny_module(root / "backbone") for _ in range(3))
        plain, asked, again = (
            quiet_trainer(root / name, callbacks=callbacks, **settings)
            for name, callbacks in (("a", [Watch()]), ("b", [Stop(), Preemption()]), ("b", []))
        )
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            seconds = seconds_of(lambda: plain.fit(whole, _Resumable(data, plain)), run.device)
        waits = sync_places(seen)
        try:
            asked.fit(stopped, _Resumable(data, asked))
        except Preempted:
            pass
        else:
            raise RuntimeError("SIGTERM did not stop the run")
        checkpoint = root / "b/checkpoints/resume.ckpt"
        again.fit(resumed, _Resumable(data, again), ckpt_path=checkpoint, weights_only=True)
        pairs = zip(trained(whole).values(), trained(resumed).values(), strict=True)
        difference = max((one - other).abs().max().item() for one, other in pairs)
    run.say(f"fit of {steps} steps, SIGTERM, resume", seconds=seconds, weight_difference=difference)
    if run.cuda:
        run.say("synchronisations in 10 steps of a fit", count=len(waits), where=" ".join(sorted(set(waits))) or "none")


def _rank(rank: int, device: str, tiny: bool, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = our_model("bart", METHOD, tiny=tiny).to(device).eval()  # no dropout
    batch = make_batches("bart", [4, 4], device=device)[rank]
    total, count = model.loss_terms(batch)
    count = count.float()
    dist.all_reduce(count)
    (2 * total / count).backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2  # type: ignore[operator]
    if rank == 0:
        torch.save([p.grad.cpu() for p in parameters], f"{folder}/gradients.pt")  # type: ignore[union-attr]
    dist.destroy_process_group()


def ranks(run: Session) -> None:
    """Two ranks on one device by gloo: gradients of both halves of a batch against those of the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        port = 29500 + os.getpid() % 2000
        torch.multiprocessing.spawn(_rank, (run.device, run.tiny, port, folder), nprocs=2)  # type: ignore[attr-defined]
        theirs = torch.load(f"{folder}/gradients.pt", weights_only=True)
    model = our_model("bart", METHOD, tiny=run.tiny).to(run.device).eval()  # the ranks' weights, drawn on the CPU
    halves = make_batches("bart", [4, 4], device=run.device)
    parts = [model.loss_terms(batch) for batch in halves]
    (sum(total for total, _ in parts) / sum(count for _, count in parts)).backward()  # type: ignore[union-attr]
    ours = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    scale = max(gradient.abs().max().item() for gradient in ours)
    run.say("two ranks on one device", gradient_difference=difference / scale)


def profile(run: Session) -> None:
    """Where the time of the best configuration goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    model = run.model("bart")
    cast_frozen(model, torch.bfloat16)
    if run.cuda:
        model.use_cuda_graphs()
    batch = run.batch("bart", 16 if run.tiny else 500)
    work = training_pass(model.loss, our_optimizer(model), [batch], device=run.device, bf16=True)
    work()
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.cuda else [])]
    with record(activities=activities) as seen:
        work()
        wait(run.device)
    key = "self_cuda_time_total" if run.cuda else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=50)
    sys.stdout.write(table + "\n")
    if run.out is not None:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "profile.txt").write_text(table)
    run.say("profile", file="profile.txt")


def parts(tiny: bool) -> dict[str, Callable[[Session], None]]:
    """Return the parts in the order of their importance."""
    first = [(16, TARGET)] if tiny else [(500, TARGET)]
    second = [(16, 20)] if tiny else [(500, 20)]
    third = [(16, TARGET)] if tiny else [(300, TARGET)]
    both = [(8, TARGET)] if tiny else [(300, TARGET), (300, 20)]
    small = [(8, TARGET)] if tiny else [(64, TARGET)]
    return {
        "machine": machine,
        "correctness": correctness,
        "parity": parity,
        "synchronisations": synchronisations,
        "graphs": graphs,
        "generation graphs": recorded_generation,
        "attention": attention,
        "training": partial(training, kind="bart", sizes=first, ways=EAGER),
        "profile": profile,
        "compiled training": partial(training, kind="bart", sizes=first, ways=COMPILED),
        "generation": generation,
        "small batch": partial(training, kind="bart", sizes=small, ways=EAGER + COMPILED[1:2]),
        "training T5": partial(training, kind="t5", sizes=third, ways=EAGER),
        "memory T5": partial(training, kind="t5", sizes=both, ways=list(MEMORY)),
        "memory BART": partial(training, kind="bart", sizes=both, ways=list(MEMORY)),
        "other methods": partial(training, kind="bart", sizes=first, ways=OTHER_METHODS),
        "bank": bank,
        "training, long targets": partial(training, kind="bart", sizes=second, ways=EAGER),
        "decoder-only models": decoder_only,
        "largest batch": largest_batch,
        "fit": fit,
        "ranks": ranks,
        "compiled training T5": partial(training, kind="t5", sizes=third, ways=COMPILED),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gpu.json, gpu.md and profile.txt")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64, to try the script")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these parts")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: give --device cpu --tiny to try the script")
    run = Session(options)
    known = parts(options.tiny)
    unknown = sorted(set(options.parts or ()) - set(known))
    if unknown:
        parser.error(f"no part {unknown[0]!r}: choose from {', '.join(known)}")
    for name, part in known.items():
        if options.parts and name not in options.parts:
            continue
        begun = time.monotonic()
        try:
            run.check_time()
            part(run)
        except OutOfTime:
            run.say(name, skipped="the time has run out")
        except ModuleNotFoundError as error:
            run.say(name, skipped=f"needs {error.name}")
        except Exception as error:  # one part must not cost the others
            run.say(name, failed=f"{type(error).__name__}: {error}"[:300])
            traceback.print_exc(file=sys.stderr)
        run.say(f"{name}: time", seconds=time.monotonic() - begun)
        run.save()


if __name__ == "__main__":
    main()
