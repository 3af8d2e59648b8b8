"""The parts of a block: normalization, rotary positions, projections, attention, SwiGLU.

B batch, T tokens, H heads, G key-value heads, K channels per head, D model width, C channels of all
heads.

Normalization and rotation have their own backward pass: what PyTorch's composition computes, in
fewer passes over memory (`docs/models.md` has the measurements). Compiled code takes the plain
forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from motet.models.attention import attend
from motet.models.config import ModelConfig
from motet.models.member import UNCUT, BlockCuts, Cut
from motet.models.moe import MoE
from motet.models.precision import compute_dtype, product_dtype
from motet.models.slices import own_slice

MOST_GRAPHS = 256
"""Graphs of one block: slices of a family, times shapes of a batch, with and without gradient."""
Across = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(queries [B, T, H, K], keys, values [B, T, G, K], `Places.segments`) -> [B, T, H, K]."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens stand; the same for all blocks of one forward pass.

    A plain object and not a tuple of tensors, so that FSDP2's input casting leaves the fp32 tables
    alone.
    """

    cos: Tensor  # fp32 [T, 1, K] or [B, T, 1, K]
    sin: Tensor  # as cos, the first half of K negated: see `rotate`
    mask: (
        Tensor | BlockMask | None
    )  # bool [B, 1, T, T], True where a query may look, or blocks of it; None = causal
    segments: Any = None  # what `across` needs to know of the documents
    across: Across | None = None  # attention that also reaches tokens held by other processes
    windowed: Places | None = None  # in layers with a window, where it changes anything

    def reaching(self, across: Across, segments: Any) -> Places:
        """Return these places with attention that reaches other processes."""
        windowed = None if self.windowed is None else self.windowed.reaching(across, segments)
        return replace(self, across=across, segments=segments, windowed=windowed)


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        unit = x * scale
        product = (gradient * unit).reshape(-1, width)
        with torch.autocast(x.device.type, enabled=False):
            shared = (product @ weight).view(scale.shape).div_(-width)
        x_gradient = (gradient * weight).addcmul_(unit, shared).mul_(scale)
        return x_gradient, product.sum(0), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 (arXiv:1910.07467).

    Attributes:
        gradient_placements: see `own`.
        mean_of_all: where processes hold parts of the axis: mean of this process's value over them
            all, differentiable.
    """

    gradient_placements: Any = None
    mean_of_all: Callable[[Tensor], Tensor] | None = None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, cut: Cut | None = None) -> Tensor:
        """Return the normalized `x`, same shape, in the type that matrix products want.

        `cut`: what a member takes of the axis; `x` is that part already.
        """
        out_dtype = compute_dtype(x)
        wide, weight = x.float(), own_slice(self.weight, self.gradient_placements, cut).float()
        if self.mean_of_all is not None:
            square = self.mean_of_all(wide.square().mean(-1, keepdim=True))
            return (wide * torch.rsqrt(square + self.eps) * weight).to(out_dtype)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            y: Tensor = _RMSNormFunction.apply(wide, weight, self.eps)
        else:
            y = F.rms_norm(wide, weight.shape, weight, self.eps)
        return y.to(out_dtype)


class Linear(nn.Linear):
    """A projection, without bias unless asked for.

    Where a CPU lacks bfloat16 products, operands are rounded to bfloat16 and multiplied in fp32:
    the arithmetic of bfloat16 hardware, without PyTorch's slow fallback.
    """

    gradient_placements: Any = None  # see `own`

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self) -> None:
        """Leave the values as they are: `initialize` fills them."""

    def forward(self, x: Tensor, outputs: Cut | None = None, inputs: Cut | None = None) -> Tensor:
        """[..., d_in] -> [..., d_out]; of a member the parts of both that `outputs` and `inputs`
        say.
        """
        dtype, inner = compute_dtype(x), product_dtype(x)
        weight = own_slice(self.weight, self.gradient_placements, outputs, inputs)
        bias = None
        if self.bias is not None:
            bias = own_slice(self.bias, self.gradient_placements, outputs)
        if dtype != inner:
            with torch.autocast(x.device.type, enabled=False):
                bias = None if bias is None else bias.to(dtype).to(inner)
                weight = weight.to(dtype).to(inner)
                return F.linear(x.to(dtype).to(inner), weight, bias).to(dtype)
        return F.linear(x, weight, bias)


class _RotateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate(x_BTHK: Tensor, places: Places) -> Tensor:
    """Turn each pair (k, k + K/2) of channels by its position's angle; returns fp32 or wider."""
    if torch.compiler.is_compiling():
        return _rotate(x_BTHK, places.cos, places.sin)
    turned: Tensor = _RotateFunction.apply(x_BTHK, places.cos, places.sin)
    return turned


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and optional norms of queries and keys."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.has_window = config.window_of(layer) > 0
        self.has_rope = config.has_rope(layer)
        self.query_scale, self.softcap = config.query_scale, config.attention_softcap
        self.norm_each_head = config.qk_norm == "head"
        self.q_proj = Linear(config.d_model, config.query_width, config.qkv_bias)
        self.k_proj = Linear(config.d_model, config.kv_width, config.qkv_bias)
        self.v_proj = Linear(config.d_model, config.kv_width, config.qkv_bias)
        self.o_proj = Linear(config.query_width, config.d_model)
        q_width, k_width = config.query_width, config.kv_width
        if self.norm_each_head:
            q_width = k_width = config.head_width
        normed = config.qk_norm != "none"
        self.q_norm = RMSNorm(q_width, config.norm_eps) if normed else None
        self.k_norm = RMSNorm(k_width, config.norm_eps) if normed else None

    def forward(self, x_BTD: Tensor, places: Places, cuts: BlockCuts = UNCUT) -> Tensor:
        """[B, T, D] -> [B, T, D]; head counts come from the weights, so that a shard of them works
        too.
        """
        heads, stream = cuts.heads, cuts.stream
        if self.has_window and places.windowed is not None:
            places = places.windowed
        q_BTHK = self._heads(self.q_proj(x_BTD, heads, stream), self.q_norm, heads)
        k_BTGK = self._heads(self.k_proj(x_BTD, heads, stream), self.k_norm, heads)
        v_BTGK = self._heads(self.v_proj(x_BTD, heads, stream), None, heads)
        if self.has_rope:
            q_BTHK, k_BTGK = rotate(q_BTHK, places), rotate(k_BTGK, places)
        if self.query_scale != 1.0:
            q_BTHK = q_BTHK * self.query_scale
        if places.across is not None:
            mixed_BTHK = places.across(q_BTHK, k_BTGK, v_BTGK, places.segments)
        else:
            mixed_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, places.mask, self.softcap)
        return self.o_proj(mixed_BTHK.flatten(2), stream, heads)

    def _heads(self, x_BTC: Tensor, norm: RMSNorm | None, heads: Cut | None) -> Tensor:
        if norm is not None and not self.norm_each_head:
            x_BTC = norm(x_BTC, heads)
        x_BTHK = x_BTC.unflatten(-1, (-1, self.head_width))
        return norm(x_BTHK) if norm is not None and self.norm_each_head else x_BTHK


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)); or GeGLU, with GELU for SiLU."""

    def __init__(
        self, d_model: int, width: int, bias: bool = False, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, width, bias)
        self.up_proj = Linear(d_model, width, bias)
        self.down_proj = Linear(width, d_model)
        self.activation = activation

    def forward(self, x_BTD: Tensor, cuts: BlockCuts = UNCUT) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        hidden, stream = cuts.hidden, cuts.stream
        gate_BTF = self.gate_proj(x_BTD, hidden, stream)
        if self.activation == "silu":
            gate_BTF = F.silu(gate_BTF)
        else:
            gate_BTF = F.gelu(gate_BTF, approximate="tanh")
        return self.down_proj(gate_BTF * self.up_proj(x_BTD, hidden, stream), stream, hidden)


def feed_forward(config: ModelConfig, layer: int) -> FeedForward | MoE:
    """Return the feed-forward of block `layer`, from 0."""
    if not config.has_experts(layer):
        width = config.ffn_width(layer)
        return FeedForward(config.d_model, width, config.mlp_bias, config.activation)
    width = config.shared_width
    return MoE(config, FeedForward(config.d_model, width) if width else None)


class StreamBias(nn.Module):
    """The bias of a projection to the residual stream, added where the sum of all ranks is."""

    gradient_placements: Any = None  # see `own`

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD: Tensor, stream: Cut | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], in the type of `x_BTD`."""
        return x_BTD + own_slice(self.bias, self.gradient_placements, stream).to(x_BTD.dtype)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream.

    "pre": x + f(norm(x)); "post": x + norm(f(x)); "both": x + norm(f(norm(x))). Block `layer` (from
    0) may have experts: `config.has_experts`.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        width, eps = config.d_model, config.norm_eps
        both = config.norm_position == "both"
        self.post_norm = config.norm_position == "post"
        self.residual_scale = config.residual_scale
        self.attention = Attention(config, layer)
        self.attention_norm = RMSNorm(width, eps)
        self.feed_forward = feed_forward(config, layer)
        self.feed_forward_norm = RMSNorm(width, eps)
        self.attention_out_norm = RMSNorm(width, eps) if both else None
        self.feed_forward_out_norm = RMSNorm(width, eps) if both else None
        self.attention_bias = StreamBias(width) if config.o_bias else None
        self.feed_forward_bias = StreamBias(width) if config.mlp_bias else None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the block as `nn.Module.compile` does, but for a mixture of experts.

        One graph for each slice of a family that runs it; beyond `MOST_GRAPHS` it fails. Left to
        itself the compiler makes one graph for all sizes, whose kernels are slower, and goes on
        uncompiled after eight, without a word.
        """
        # Here and not as a decorator: that would import the compiler, a second, in every process.
        settings = torch._dynamo.config  # type: ignore[attr-defined]
        settings.specialize_int = settings.fail_on_recompile_limit_hit = True
        settings.recompile_limit = max(settings.recompile_limit, MOST_GRAPHS)
        most = max(settings.accumulated_recompile_limit, MOST_GRAPHS)
        settings.accumulated_recompile_limit = most
        if isinstance(self.feed_forward, MoE):
            self.feed_forward.stay_eager()
        super().compile(*args, **kwargs)

    def forward(self, x_BTD: Tensor, places: Places, cuts: BlockCuts = UNCUT) -> Tensor:
        """[B, T, D] -> [B, T, D]; `cuts`: what a member of a family takes of it."""
        stream = cuts.stream
        attention_norm, feed_forward_norm = self.attention_norm, self.feed_forward_norm
        into_BTD = x_BTD if self.post_norm else attention_norm(x_BTD, stream)
        y_BTD = _biased(self.attention(into_BTD, places, cuts), self.attention_bias, stream)
        out_norm = attention_norm if self.post_norm else self.attention_out_norm
        x_BTD = x_BTD + self._added(y_BTD, out_norm, stream)
        into_BTD = x_BTD if self.post_norm else feed_forward_norm(x_BTD, stream)
        y_BTD = _biased(self.feed_forward(into_BTD, cuts), self.feed_forward_bias, stream)
        out_norm = feed_forward_norm if self.post_norm else self.feed_forward_out_norm
        return x_BTD + self._added(y_BTD, out_norm, stream)

    def _added(self, y_BTD: Tensor, norm: RMSNorm | None, stream: Cut | None) -> Tensor:
        """Return what a sub-layer adds to the residual stream."""
        y_BTD = y_BTD if norm is None else norm(y_BTD, stream)
        return y_BTD if self.residual_scale == 1.0 else y_BTD * self.residual_scale


def _biased(y_BTD: Tensor, bias: StreamBias | None, stream: Cut | None) -> Tensor:
    return y_BTD if bias is None else bias(y_BTD, stream)
