"""Distribution of an extraction over processes, each with its own encoder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

import torch

from data_modules.extraction.extraction import Extraction, ExtractionError, encode
from data_modules.store.resumable import AGAIN
from data_modules.store.store import FeatureStoreError
from vlpet_lightning.vision.choice import make_encoder

POLL = 0.2  # seconds between progress updates


def devices_for(device: str, processes: int | None) -> list[str]:
    """Return the device of each encoding process.

    Args:
        device: Device; ``auto`` uses GPUs if there are any.
        processes: Number of processes; None for one per GPU, or one without a GPU.

    Raises:
        ValueError: If ``processes`` is not positive.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{n % gpus}" if gpus else device for n in range(processes or gpus or 1)]


def encode_in_processes(
    extraction: Extraction, todo: Sequence[tuple[int, int]], devices: Sequence[str], told: Callable[[int], object]
) -> None:
    """Write parts of stores in several processes, each with its share of the parts.

    Args:
        extraction: Description of the extraction.
        todo: Pairs of a store number and a part number in that store.
        devices: Device of each process.
        told: Called regularly with the number of files done.

    Raises:
        FeatureStoreError: If a process raises it; the others stop after their batch.
        ExtractionError: If a process raises it or was ended.
    """
    context = get_context("spawn")
    # files done per process, and a stop flag; no locks, because a killed process could hold one for ever
    counts = context.RawArray("q", len(devices) + 1)
    threads = max(1, torch.get_num_threads() // len(devices))
    workers, results = [], []
    for number, device in enumerate(devices):
        result, sender = context.Pipe(duplex=False)
        share = (extraction, todo[number :: len(devices)], device, threads, counts, number, sender)
        workers.append(context.Process(target=_encode_share, args=share))
        results.append(result)
        workers[-1].start()
        sender.close()
    try:
        while not any(worker.exitcode for worker in workers) and any(worker.is_alive() for worker in workers):
            wait([worker.sentinel for worker in workers if worker.is_alive()], POLL)
            told(sum(counts[:-1]))
    finally:  # also on Ctrl-C
        counts[-1] = 1
        for worker in workers:
            worker.join()
    for worker, result in zip(workers, results, strict=True):
        if worker.exitcode:
            raise _error(worker.exitcode, result)


def _error(status: int, result: Any) -> Exception:
    try:
        error: Exception = result.recv()
        return error
    except EOFError:  # the process sent nothing
        pass
    if status > 0:
        return ExtractionError(f"a process failed, as it says above; {AGAIN.removeprefix('then ')}")
    return ExtractionError(
        f"a process was ended by signal {-status}, perhaps for want of memory: give fewer --processes or a smaller "
        f"--batch_size, {AGAIN}"
    )


class _Stopped(Exception):
    pass


def _encode_share(
    extraction: Extraction,
    todo: Sequence[tuple[int, int]],
    device: str,
    threads: int,
    counts: Any,
    number: int,
    sender: Any,
) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def wrote(files: int) -> None:
        counts[number] += files
        if counts[-1]:
            raise _Stopped

    try:
        encoder = make_encoder(extraction.settings, device)
        encode(extraction, encoder, extraction.stores(encoder), todo, wrote)
    except _Stopped:
        pass
    except (FeatureStoreError, ExtractionError) as error:  # any other error is a bug and shows its traceback
        sender.send(error)
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """Exit when the parent process ends, so that no process keeps writing to the stores of a killed command."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
