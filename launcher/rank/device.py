"""What the device can do: precision, peak rate, memory in use."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch

# Dense bf16 FLOP/s from the vendors' data sheets.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def choose_precision(setting: str, device: torch.device) -> str:
    """Return "bf16" or "fp32" for the setting; "auto" is bf16 where the device multiplies it in
    hardware.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak in FLOP/s, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def memory_meter(device: torch.device) -> Callable[[], float]:
    """Return a function that gives the peak memory of this process so far, MiB (of the device, if
    it is a GPU).
    """
    if device.type == "cuda":
        return lambda: torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
