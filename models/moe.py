"""Mixture of experts: each token visits a few of many feed-forward networks (arXiv:2101.03961,
arXiv:2401.04088).

B batch, T tokens, D model width, N tokens of this rank's micro-batch, E experts, K experts per
token, F hidden
width of an expert, M rows that experts compute: one row per (token, chosen expert), sorted by
expert and then by token. Where experts live on several ranks, an `Exchange` carries the rows there
and back: this module knows no rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motet.models.config import ModelConfig
from motet.models.precision import compute_dtype, own, product_dtype


class Exchange(Protocol):
    """How rows reach the experts that they chose, when those are not all here."""

    def dispatch(self, rows_MD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Send rows to their experts.

        Args:
            rows_MD: this rank's rows, sorted by expert.
            counts_E: int64, how many of them each expert of the whole layer gets.

        Returns:
            the rows for this rank's experts, sorted by expert; how many each of them gets (int64);
            and a ticket for the way back.
        """

    def combine(self, rows_MD: Tensor, ticket: Any) -> Tensor:
        """Return the experts' results to the ranks of their tokens, in the order that `dispatch`
        was given.
        """


class WideLinear(nn.Module):
    """A projection without bias that is computed in fp32 whatever the compute type is.

    Routing is a choice: rounded scores would choose other experts (arXiv:2101.03961, section 2.4).
    Where a sharded run gathers its weights in bfloat16, the weight itself arrives rounded.
    """

    gradient_placements: Any = None  # see `own`

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, d_in] -> fp32 [N, d_out]; wider types stay as they are."""
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.to(wide), own(self.weight, self.gradient_placements).to(wide))


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

    def forward(self, rows_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x)) [M, D] of rows sorted by expert, `counts_E` (int64)
        for each.

        An expert without rows gets a gradient of zeros.
        """
        rounded, inner = compute_dtype(rows_MD), product_dtype(rows_MD)
        weights = [
            own(weight, self.gradient_placements).to(rounded).to(inner)
            for weight in (self.gate_proj, self.up_proj, self.down_proj)
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


class Routing(NamedTuple):
    """Which rows go where, and how their results are weighed.

    Attributes:
        token_M: the token of each row.
        choice_M: the row's place in the flattened [N, K] choices.
        row_NK: the row of each choice; M, one past the last, for a choice that was dropped.
        weights_NK: fp32 weight of each choice; differentiable.
        kept_E: int64 rows per expert after dropping.
    """

    token_M: Tensor
    choice_M: Tensor
    row_NK: Tensor
    weights_NK: Tensor
    kept_E: Tensor


def choose(scores_NE: Tensor, k: int) -> Tensor:
    """Return int64 [N, k]: the k best of each row, best first; among equals the lowest index.

    `torch.topk` promises no order among equals, and its choice depends on shapes, hence on the
    layout. Rounds of argmax, which promises the first, took 0.6 to 1.3 times its time on a CPU
    (8,192 tokens, 8 to 128 experts).
    """
    left_NE = scores_NE.detach().clone()
    chosen = []
    for _ in range(k):
        best_N1 = left_NE.argmax(-1, keepdim=True)
        chosen.append(best_N1)
        left_NE.scatter_(1, best_N1, -math.inf)
    return torch.cat(chosen, 1)


def count_choices(chosen_NK: Tensor, n_experts: int) -> Tensor:
    """Return int64 [E]: how often each expert was chosen."""
    ones = torch.ones_like(chosen_NK.flatten())
    return ones.new_zeros(n_experts).scatter_add_(0, chosen_NK.flatten(), ones)


def capacity(n_tokens: int, k: int, n_experts: int, factor: float) -> int:
    """Return the most rows of one expert: ceil(factor * n_tokens * k / n_experts)
    (arXiv:2101.03961, section 2.2).
    """
    # The small slack undoes binary rounding: 1.1 x 10 / 1 is 11, not 12.
    return math.ceil(factor * n_tokens * k / n_experts - 1e-9)


def arrange(chosen_NK: Tensor, weights_NK: Tensor, counts_E: Tensor, most_rows: int) -> Routing:
    """Sort choices by expert, then by token; keep at most `most_rows` per expert, the earliest (0 =
    keep all).
    """
    n_choices, k = chosen_NK.numel(), chosen_NK.shape[1]
    choice_M = torch.argsort(chosen_NK.flatten(), stable=True)
    if most_rows:
        starts_E = counts_E.cumsum(0) - counts_E
        place_M = torch.arange(n_choices, device=choice_M.device)
        place_M -= torch.repeat_interleave(starts_E, counts_E, output_size=n_choices)
        choice_M = choice_M[place_M < most_rows]
        counts_E = counts_E.clamp(max=most_rows)
    n_rows = len(choice_M)
    row_NK = torch.full_like(chosen_NK.flatten(), n_rows)
    row_NK[choice_M] = torch.arange(n_rows, device=choice_M.device)
    return Routing(choice_M // k, choice_M, row_NK.view_as(chosen_NK), weights_NK, counts_E)


class _Gather(torch.autograd.Function):
    """Rows for the experts: x[token].

    Backward adds the K rows of a token in one fixed order, with no atomics.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(row_NK)
        return x_ND[token_M]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_NK,) = ctx.saved_tensors
        return _rows(gradients[0], row_NK).sum(1), None, None


class _Weigh(torch.autograd.Function):
    """Results for the tokens: sum over K of weight x y[row].

    Keeps y [M, D] for the backward pass, nothing wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_MD: Tensor,
        weights_NK: Tensor,
        token_M: Tensor,
        choice_M: Tensor,
        row_NK: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(y_MD, weights_NK, token_M, choice_M, row_NK)
        y_NKD = _rows(y_MD, row_NK)
        return (y_NKD * weights_NK[..., None]).sum(1).to(y_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_MD, weights_NK, token_M, choice_M, row_NK = ctx.saved_tensors
        (gradient_ND,) = gradients
        weights_M1 = weights_NK.flatten()[choice_M, None]
        y_gradient = (gradient_ND[token_M] * weights_M1).to(y_MD.dtype)
        products_NKD = _rows(y_MD, row_NK) * gradient_ND[:, None].to(weights_NK.dtype)
        return y_gradient, products_NKD.sum(-1), None, None, None


def _rows(y_MD: Tensor, row_NK: Tensor) -> Tensor:
    """Return y[row] [N, K, D]; zeros where the choice was dropped."""
    if row_NK.numel() != len(y_MD):
        y_MD = torch.cat([y_MD, y_MD.new_zeros(1, y_MD.shape[1])])
    return y_MD[row_NK]


class _Auxiliary(torch.autograd.Function):
    """Pass the router's logits on; in the backward pass count their tokens and add the auxiliary
    gradient.

    In the backward pass, because it runs once where recomputation runs the forward pass twice and
    scoring runs it without training. The added gradient is absolute: the scale of the loss above
    does not multiply it.
    """

    @staticmethod
    def forward(ctx: Any, logits_NE: Tensor, counts_E: Tensor, moe: MoE) -> Tensor:
        ctx.save_for_backward(logits_NE, counts_E)
        ctx.moe = moe
        return logits_NE.view_as(logits_NE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_NE, counts_E = ctx.saved_tensors
        return gradients[0] + ctx.moe._note(logits_NE, counts_E), None, None


class MoE(nn.Module):
    """A feed-forward of routed experts, with an optional shared block that every token visits.

    y = sum over the K chosen experts e of w_e * expert_e(x), plus (gate *) shared(x). Token-choice
    top-K; weights are the router's scores of the chosen, made to sum to 1 with `normalize_top_k`.
    Selection adds `bias_E` where `bias_rate` > 0; weights never do (arXiv:2408.15664). Capacity
    limits training alone: scores drop no token, so that padding and batch size change none.

    Balance over the global batch. Auxiliary losses of one layer, N tokens of the global batch, p
    the router's probabilities (sigmoid scores are divided by their sum, arXiv:2412.19437, section
    2.1.2):

        balance_loss * E * sum_e f_e * P_e        P_e = sum over tokens of p_e / N
                                                  (arXiv:2101.03961, section 2.2)
        router_z_loss * sum over tokens of logsumexp(logits)^2 / N
                                                                                    (arXiv:2202.08906,
                                                                                    section 3.4)

    f_e is the share of expert e among all choices, so the balance loss of uniform routing is its
    coefficient. With `balance_scope="batch"` f is that of the previous global batch (uniform before
    the first): the global batch's own f is not known while its micro-batches run, and so the loss
    is exactly the same under every layout and micro-batching, for one small all-reduce per step.
    With "micro", f is that of this rank's micro-batch (arXiv:2101.03961), which pushes every
    micro-batch to be balanced by itself: arXiv:2501.11873 shows why that costs quality.

    The engine drives a step: `begin_step`, forward and backward passes, an all-reduce of
    `counts()`, `end_step`.

    Attributes:
        exchange: how rows reach experts on other ranks; None when all are here.
    """

    def __init__(self, config: ModelConfig, shared: nn.Module | None = None) -> None:
        """Make the layer; `shared` maps [N, D] to [N, D] and is the shared block."""
        super().__init__()
        self.config = config
        self.router = WideLinear(config.d_model, config.n_experts)
        self.experts = Experts(config.n_experts, config.d_model, config.expert_width)
        self.shared = shared
        self.shared_gate = WideLinear(config.d_model, 1) if config.shared_gate else None
        self.exchange: Exchange | None = None
        self._state: dict[str, Tensor] | None = None
        self._counts_E: Tensor | None = None
        self._sums: Tensor | None = None
        self._n_tokens, self._gradient_scale = 0, 1.0

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_ND = x_BTD.flatten(0, -2)
        routing = self.route(x_ND)
        rows_MD: Tensor = _Gather.apply(x_ND, routing.token_M, routing.row_NK)
        if self.exchange is None:
            rows_MD = self.experts(rows_MD, routing.kept_E)
        else:
            there_MD, local_counts, ticket = self.exchange.dispatch(rows_MD, routing.kept_E)
            rows_MD = self.exchange.combine(self.experts(there_MD, local_counts), ticket)
        y_ND: Tensor = _Weigh.apply(
            rows_MD, routing.weights_NK, routing.token_M, routing.choice_M, routing.row_NK
        )
        if self.shared is not None:
            shared_ND = self.shared(x_ND)
            if self.shared_gate is not None:
                shared_ND = (shared_ND * self.shared_gate(x_ND).sigmoid()).to(shared_ND.dtype)
            y_ND = y_ND + shared_ND
        return y_ND.view_as(x_BTD)

    def stay_eager(self) -> None:
        """Run uncompiled inside compiled blocks: sizes are known only at run time, so that graphs
        would break often.
        """
        self.forward = torch.compiler.disable(self.forward)  # type: ignore[method-assign]

    def route(self, x_ND: Tensor) -> Routing:
        """Choose experts for every token, and arrange the rows."""
        config = self.config
        logits_NE = self.router(x_ND)
        with torch.no_grad():
            scores_NE = self._scores(logits_NE)
            if config.bias_rate > 0:
                scores_NE = scores_NE + self._at(x_ND.device)["bias"]
            chosen_NK = choose(scores_NE, config.experts_per_token)
            counts_E = count_choices(chosen_NK, config.n_experts)
        training = torch.is_grad_enabled()
        if training and self._n_tokens:
            logits_NE = _Auxiliary.apply(logits_NE, counts_E, self)
        weights_NK = self._scores(logits_NE).gather(1, chosen_NK)
        if config.normalize_top_k:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        most_rows = 0
        if training and config.capacity_factor > 0:
            k, n_experts = chosen_NK.shape[1], config.n_experts
            most_rows = capacity(len(x_ND), k, n_experts, config.capacity_factor)
        return arrange(chosen_NK, weights_NK, counts_E, most_rows)

    def _scores(self, logits_NE: Tensor) -> Tensor:
        return (
            logits_NE.softmax(-1) if self.config.router_score == "softmax" else logits_NE.sigmoid()
        )

    def begin_step(self, n_tokens: int, gradient_scale: float = 1.0) -> None:
        """Start a step whose global batch has `n_tokens` tokens, on all ranks together.

        Outside of a step (never begun, or ended) nothing is counted and no auxiliary gradient is
        added.

        Args:
            n_tokens: divides each token's auxiliary gradient.
            gradient_scale: multiplies it: what the engine will divide all gradients by afterwards,
                such as the number of ranks where gradients are averaged.
        """
        device = self.router.weight.device
        self._n_tokens, self._gradient_scale = n_tokens, gradient_scale
        self._counts_E = torch.zeros(self.config.n_experts, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._at(device)

    def counts(self) -> Tensor:
        """Return int64 [E]: how often this rank's tokens of this step chose each expert, dropped or
        not.
        """
        assert self._counts_E is not None, "begin_step comes first"
        return self._counts_E

    def sums(self) -> Tensor:
        """Return float64 [balance loss, router z-loss] of this rank's tokens: their sum over ranks
        is the layer's loss.
        """
        assert self._sums is not None, "begin_step comes first"
        return self._sums

    @torch.no_grad()
    def end_step(self, counts_E: Tensor) -> None:
        """End the step: take the frequencies, and move the bias, by the counts of the global batch.

        The bias of an expert rises by `bias_rate` where it was chosen less than the mean, and falls
        where more (arXiv:2408.15664, algorithm 1).
        """
        state = self._at(self.router.weight.device)
        counts_E = counts_E.to(state["bias"].device, torch.float64)
        if self.config.bias_rate > 0:
            state["bias"] += self.config.bias_rate * (counts_E.mean() - counts_E).sign().float()
        if counts_E.sum() > 0:
            state["frequencies"].copy_(counts_E / counts_E.sum())
        self._n_tokens = 0

    def state(self) -> dict[str, Tensor]:
        """Return fp32 [E] "frequencies" (of the last global batch) and "bias": part of a
        checkpoint, loaded in place.

        Plain tensors: no optimizer step and no `to_empty` reaches them.
        """
        return self._at(self.router.weight.device)

    def reset_state(self, device: torch.device) -> None:
        """Set frequencies to uniform and the bias to zero, on `device`."""
        n_experts = self.config.n_experts
        with torch.inference_mode(False), torch.device(device):
            uniform_E = torch.full((n_experts,), 1 / n_experts, dtype=torch.float32)
            self._state = {"frequencies": uniform_E, "bias": torch.zeros(n_experts)}

    def _at(self, device: torch.device) -> dict[str, Tensor]:
        """Return the state on `device`: made there when first asked for, moved when the module was."""
        if self._state is None or self._state["bias"].is_meta:
            self.reset_state(device)
        assert self._state is not None
        if self._state["bias"].device != device:
            self._state = {name: value.to(device) for name, value in self._state.items()}
        return self._state

    def _note(self, logits_NE: Tensor, counts_E: Tensor) -> Tensor:
        """Count the tokens of one backward pass; return the auxiliary gradient of their logits."""
        self.counts().add_(counts_E)
        frequencies_E = self._at(logits_NE.device)["frequencies"]
        if self.config.balance_scope == "micro":
            frequencies_E = (counts_E / counts_E.sum().clamp(min=1)).to(frequencies_E.dtype)
        sums, gradient_NE = auxiliary(logits_NE, frequencies_E, self.config)
        self.sums().add_(sums / max(self._n_tokens, 1))
        return gradient_NE * (self._gradient_scale / max(self._n_tokens, 1))


def auxiliary(
    logits_NE: Tensor, frequencies_E: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Return float64 [balance loss, router z-loss] summed over tokens, and the gradient [N, E] of
    their sum.

    See `MoE` for the losses; both are zero where their coefficient is.
    """
    softmax_NE, log_sum_N1 = logits_NE.softmax(-1), logits_NE.logsumexp(-1, keepdim=True)
    slope_E = config.balance_loss * config.n_experts * frequencies_E
    if config.router_score == "softmax":
        probability_NE = softmax_NE
        spread_NE = softmax_NE
    else:
        scores_NE = logits_NE.sigmoid()
        probability_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        spread_NE = probability_NE * (1 - scores_NE)
    balance_N1 = (probability_NE * slope_E).sum(-1, keepdim=True)
    gradient_NE = spread_NE * (slope_E - balance_N1)
    gradient_NE = gradient_NE + 2 * config.router_z_loss * log_sum_N1 * softmax_NE
    z_loss = config.router_z_loss * log_sum_N1.double().square().sum()
    return torch.stack([balance_N1.double().sum(), z_loss]), gradient_NE
