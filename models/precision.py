"""In which type matrix products are done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _cpu_multiplies_bf16() -> bool:
    """Tell whether this CPU has bfloat16 matrix kernels; PyTorch's fallback is 4 to 20 times slower
    than fp32.
    """
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


def own(weight: Tensor, gradient_placements: Any = None) -> Tensor:
    """Return this process's part of a weight that several processes share, or the weight itself.

    Args:
        weight: plain, or a distributed tensor: anything with a differentiable `to_local`.
        gradient_placements: how the gradient of the part adds up over processes; None = as the
            weight is split. A module that is compiled says it, because the compiler does not see by
            itself that its weight is distributed.
    """
    if gradient_placements is not None:
        part: Tensor = weight.to_local(grad_placements=gradient_placements)  # type: ignore[attr-defined]
        return part
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()
