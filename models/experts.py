"""Experts side by side, and the projection that chooses among them.

N tokens, E experts, D model width, F hidden width of an expert, M rows that experts compute, sorted
by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motet.models.member import UNCUT, BlockCuts, Cut
from motet.models.precision import compute_dtype, product_dtype
from motet.models.slices import own_slice


class WideLinear(nn.Module):
    """A projection without bias that is computed in fp32 whatever the compute type is.

    Routing is a choice: rounded scores would choose other experts (arXiv:2101.03961, section 2.4).
    Where a sharded run gathers its weights in bfloat16, the weight itself arrives rounded.
    """

    gradient_placements: Any = None  # see `own`

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(
        self, x_ND: Tensor, outputs: Cut | None = None, inputs: Cut | None = None
    ) -> Tensor:
        """[N, d_in] -> fp32 [N, d_out]; wider types stay as they are. `outputs`, `inputs`: what a
        member takes of both.
        """
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            weight = own_slice(self.weight, self.gradient_placements, outputs, inputs)
            return F.linear(x_ND.to(wide), weight.to(wide))


class Experts(nn.Module):
    """SwiGLU networks side by side; how many, and how wide, is read from the weights, so that a
    shard works too.
    """

    gradient_placements: Any = None  # see `own`

    def __init__(self, n_experts: int, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.up_proj = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, width))

    def forward(self, rows_MD: Tensor, counts_E: Tensor, cuts: BlockCuts = UNCUT) -> Tensor:
        """Return down(silu(gate(x)) * up(x)) [M, D] of rows sorted by expert, `counts_E` (int64)
        for each.

        An expert without rows gets a gradient of zeros.
        """
        rounded, inner = compute_dtype(rows_MD), product_dtype(rows_MD)
        into, out = (cuts.expert, cuts.stream), (cuts.stream, cuts.expert)
        weights = [
            own_slice(weight, self.gradient_placements, cuts.experts, *sides).to(rounded).to(inner)
            for weight, sides in (
                (self.gate_proj, into),
                (self.up_proj, into),
                (self.down_proj, out),
            )
        ]
        with torch.autocast(rows_MD.device.type, enabled=False):
            rows_MD = rows_MD.to(rounded).to(inner)
            if _grouped_products_work(rows_MD, weights[0]):
                y_MD = _grouped(rows_MD, counts_E, *weights)
            else:
                y_MD = _one_by_one(rows_MD, counts_E, *weights)
            return y_MD.to(rounded)


def _grouped_products_work(rows_MD: Tensor, gate_EFD: Tensor) -> bool:
    """Tell whether `grouped_mm` has a kernel here: bfloat16, CUDA from compute capability 8.0, rows
    of whole 16 bytes.

    That is what its documentation promises (torch 2.10 to 2.13); on other devices and types it may
    be missing.
    """
    aligned = all(width % 8 == 0 for width in gate_EFD.shape[1:])
    if not (rows_MD.is_cuda and rows_MD.dtype == torch.bfloat16 and aligned and len(rows_MD)):
        return False
    return torch.cuda.get_device_capability(rows_MD.device) >= (8, 0)


def _grouped(rows: Tensor, counts_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0).to(torch.int32)
    gated_MF = F.grouped_mm(rows, gate.mT, offs=ends_E)
    hidden_MF = F.silu(gated_MF) * F.grouped_mm(rows, up.mT, offs=ends_E)
    return F.grouped_mm(hidden_MF, down.mT, offs=ends_E)


def _one_by_one(rows: Tensor, counts_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    sizes: list[int] = counts_E.tolist()
    # One expert runs even when no row came, so that every weight has a gradient on every rank.
    busy = [expert for expert, size in enumerate(sizes) if size] or [0]
    parts = rows.split(sizes)
    # unbind, not indexing: its gradient is one stack, where indexing would add E tensors of full
    # size.
    gates, ups, downs = gate.unbind(0), up.unbind(0), down.unbind(0)
    done = []
    for expert in busy:
        part = parts[expert]
        hidden = F.silu(F.linear(part, gates[expert])) * F.linear(part, ups[expert])
        done.append(F.linear(hidden, downs[expert]))
    return torch.cat(done)
