"""In which type matrix products are done."""

from __future__ import annotations

import torch
from torch import Tensor


def _cpu_multiplies_bf16() -> bool:
    """Tell whether this CPU has bfloat16 matrix kernels; PyTorch's fallback is 4 to 20 times slower than fp32."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


CPU_MULTIPLIES_BF16 = _cpu_multiplies_bf16()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's type where it is on for the device of `x`, else the type of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """Return `compute_dtype`, or fp32 where that is bfloat16 and the CPU lacks it.

    Operands are rounded to the compute type first, so the arithmetic is that of bfloat16 hardware:
    rounded factors, fp32 sums.
    """
    dtype = compute_dtype(x)
    emulate = dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BF16
    return torch.float32 if emulate else dtype
