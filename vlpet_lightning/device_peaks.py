"""Published peak FLOP/s of accelerators: dense, without sparsity.

Sources: NVIDIA's data sheets (V100, T4, A10, A30, A40, A100, L4, L40, L40S, H100, H200; figures given "with sparsity"
are halved) and the white papers of GA102 (RTX 30, A6000) and AD102 (RTX 40), for tensor cores with float32
accumulation. The table in ``lightning.fabric.utilities.throughput`` is not used: it lists the sparse figures of H200
and H100 NVL, and mistakes an L40S for an L4.
"""

from __future__ import annotations

from typing import Literal

import torch

Arithmetic = Literal["bf16", "fp16", "tf32", "fp32"]

# words that must all occur in the device name: TFLOP/s as (half precision, tf32, fp32); the first match is used
PEAKS: dict[tuple[str, ...], tuple[float, float, float]] = {
    ("H200", "NVL"): (835.5, 417.5, 60.0),
    ("H200",): (989.5, 494.5, 67.0),
    ("H100", "NVL"): (835.5, 417.5, 60.0),
    ("H100", "PCIe"): (756.0, 378.0, 51.0),
    ("H100",): (989.5, 494.5, 67.0),
    ("A100",): (312.0, 156.0, 19.5),
    ("A30",): (165.0, 82.0, 10.3),
    ("A40",): (149.7, 74.8, 37.4),
    ("A10",): (125.0, 62.5, 31.2),
    ("A6000",): (154.8, 77.4, 38.7),
    ("L40S",): (362.0, 183.0, 91.6),
    ("L40",): (181.0, 90.5, 90.5),
    ("L4",): (121.0, 60.0, 30.3),
    ("4090",): (165.2, 82.6, 82.6),
    ("3090", "Ti"): (80.0, 40.0, 40.0),
    ("3090",): (71.0, 35.6, 35.6),
    ("V100S", "PCIE"): (130.0, 16.4, 16.4),
    ("V100", "PCIE"): (112.0, 14.0, 14.0),
    ("V100",): (125.0, 15.7, 15.7),
    ("T4",): (65.0, 8.1, 8.1),
}
WITHOUT_BF16 = {"V100", "V100S", "T4"}


def peak_flops(device_name: str, arithmetic: Arithmetic) -> float | None:
    """Return a device's peak floating-point operations per second, or None if no figure is known.

    Args:
        device_name: Name as returned by ``torch.cuda.get_device_name``.
        arithmetic: Arithmetic of the matrix products.

    >>> peak_flops("NVIDIA L40S", "bf16")
    362000000000000.0
    >>> peak_flops("NVIDIA A100-SXM4-80GB", "fp32")
    19500000000000.0
    """
    words = set(device_name.replace("-", " ").split())
    for known, (half, tf32, fp32) in PEAKS.items():
        if words.issuperset(known):
            if arithmetic == "bf16" and WITHOUT_BF16 & words:
                return None
            return 1e12 * {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}[arithmetic]
    return None


def arithmetic_of(precision: str) -> Arithmetic:
    """Return the arithmetic of matrix products under a Trainer's ``precision``, e.g. ``bf16-mixed`` or ``32-true``."""
    if "bf16" in precision:
        return "bf16"
    if "16" in precision:
        return "fp16"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
