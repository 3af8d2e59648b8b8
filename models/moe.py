"""Mixture of experts: each token visits a few of many feed-forward networks (arXiv:2101.03961,
arXiv:2401.04088).

B batch, T tokens, D model width, N tokens of this rank's micro-batch, E experts, K experts per
token, M rows that experts compute (`routing.py`). Where experts live on several ranks, an
`Exchange` carries the rows there and back: this module knows no rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from motet.models.config import ModelConfig
from motet.models.experts import Experts, WideLinear
from motet.models.member import UNCUT, BlockCuts, Cut
from motet.models.routing import (
    GatherRows,
    Routing,
    WeighRows,
    arrange,
    auxiliary,
    capacity,
    choose,
    count_choices,
)
from motet.models.slices import take


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


class _Auxiliary(torch.autograd.Function):
    """Pass the router's logits on; in the backward pass count their tokens and add the auxiliary
    gradient.

    In the backward pass, because it runs once where recomputation runs the forward pass twice and
    scoring runs it without training. The added gradient is absolute: the scale of the loss above
    does not multiply it.
    """

    @staticmethod
    def forward(ctx: Any, logits_NE: Tensor, counts_E: Tensor, moe: MoE, cut: Cut | None) -> Tensor:
        ctx.save_for_backward(logits_NE, counts_E)
        ctx.moe, ctx.cut = moe, cut
        return logits_NE.view_as(logits_NE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NE, counts_E = ctx.saved_tensors
        return gradients[0] + ctx.moe._note(logits_NE, counts_E, ctx.cut), None, None, None


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
                                                  (arXiv:2202.08906, section 3.4)

    f_e is the share of expert e among all choices, so the balance loss of uniform routing is its
    coefficient. With `balance_scope="batch"` f is that of the previous global batch (uniform before
    the first): the global batch's own f is not known while its micro-batches run, and so the loss
    is exactly the same under every layout and micro-batching, for one small all-reduce per step.
    With "micro", f is that of this rank's micro-batch (arXiv:2101.03961), which pushes every
    micro-batch to be balanced by itself: arXiv:2501.11873 shows why that costs quality.

    A member of a family may have fewer experts: its tokens choose among those, with the
    frequencies that they had among themselves, and even use of the whole layer is what its members'
    tokens would give, each spread evenly over the experts that it has.

    The engine drives a step: `begin_step`, forward and backward passes, an all-reduce of
    `counts()` (and `expected()`), `end_step`.

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
        self._expected_E: Tensor | None = None
        self._sums: Tensor | None = None
        self._n_tokens, self._gradient_scale = 0, 1.0

    def forward(self, x_BTD: Tensor, cuts: BlockCuts = UNCUT) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_ND = x_BTD.flatten(0, -2)
        routing = self.route(x_ND, cuts)
        rows_MD: Tensor = GatherRows.apply(x_ND, routing.token_M, routing.row_NK)
        if self.exchange is None:
            rows_MD = self.experts(rows_MD, routing.kept_E, cuts)
        else:
            there_MD, local_counts, ticket = self.exchange.dispatch(rows_MD, routing.kept_E)
            rows_MD = self.exchange.combine(self.experts(there_MD, local_counts, cuts), ticket)
        y_ND: Tensor = WeighRows.apply(
            rows_MD, routing.weights_NK, routing.token_M, routing.choice_M, routing.row_NK
        )
        if self.shared is not None:
            shared_ND = self.shared(x_ND, cuts._replace(hidden=cuts.shared))
            if self.shared_gate is not None:
                gate_N1 = self.shared_gate(x_ND, None, cuts.stream).sigmoid()
                shared_ND = (shared_ND * gate_N1).to(shared_ND.dtype)
            y_ND = y_ND + shared_ND
        return y_ND.view_as(x_BTD)

    def stay_eager(self) -> None:
        """Run uncompiled inside compiled blocks: sizes are known only at run time, so that graphs
        would break often.
        """
        self.forward = torch.compiler.disable(self.forward)  # type: ignore[method-assign]

    def route(self, x_ND: Tensor, cuts: BlockCuts = UNCUT) -> Routing:
        """Choose experts for every token, and arrange the rows."""
        config = self.config
        logits_NE = self.router(x_ND, cuts.experts, cuts.stream)
        n_experts = logits_NE.shape[1]
        with torch.no_grad():
            scores_NE = self._scores(logits_NE)
            if config.bias_rate > 0:
                scores_NE = scores_NE + take(self._at(x_ND.device)["bias"], 0, cuts.experts)
            chosen_NK = choose(scores_NE, config.experts_per_token)
            counts_E = count_choices(chosen_NK, n_experts)
        training = torch.is_grad_enabled()
        if training and self._n_tokens:
            logits_NE = _Auxiliary.apply(logits_NE, counts_E, self, cuts.experts)
        weights_NK = self._scores(logits_NE).gather(1, chosen_NK)
        if config.normalize_top_k:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        most_rows = 0
        if training and config.capacity_factor > 0:
            k, factor = chosen_NK.shape[1], config.capacity_factor
            most_rows = capacity(len(x_ND), k, n_experts, factor)
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
        n_experts = self.config.n_experts
        self._counts_E = torch.zeros(n_experts, dtype=torch.int64, device=device)
        self._expected_E = torch.zeros(n_experts, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._at(device)

    def counts(self) -> Tensor:
        """Return int64 [E]: how often this rank's tokens of this step chose each expert, dropped or
        not.
        """
        assert self._counts_E is not None, "begin_step comes first"
        return self._counts_E

    def expected(self) -> Tensor:
        """Return float64 [E]: `counts` as they would be if every member's tokens were spread evenly
        over its experts.
        """
        assert self._expected_E is not None, "begin_step comes first"
        return self._expected_E

    def sums(self) -> Tensor:
        """Return float64 [balance loss, router z-loss] of this rank's tokens: their sum over ranks
        is the layer's loss.
        """
        assert self._sums is not None, "begin_step comes first"
        return self._sums

    @torch.no_grad()
    def end_step(self, counts_E: Tensor, expected_E: Tensor | None = None) -> None:
        """End the step: take the frequencies, and move the bias, by the counts of the global batch.

        The bias of an expert rises by `bias_rate` where it was chosen less than expected, and falls
        where more (arXiv:2408.15664, algorithm 1).

        Args:
            counts_E: summed over all ranks.
            expected_E: likewise; None = the mean of the counts, where the whole model trained.
        """
        state = self._at(self.router.weight.device)
        counts_E = counts_E.to(state["bias"].device, torch.float64)
        even_E = counts_E.mean() if expected_E is None else expected_E.to(counts_E)
        if self.config.bias_rate > 0:
            state["bias"] += self.config.bias_rate * (even_E - counts_E).sign().float()
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
        """Return the state on `device`: made when first asked for, moved when the module was."""
        if self._state is None or self._state["bias"].is_meta:
            self.reset_state(device)
        assert self._state is not None
        if self._state["bias"].device != device:
            self._state = {name: value.to(device) for name, value in self._state.items()}
        return self._state

    def _note(self, logits_NE: Tensor, counts_E: Tensor, cut: Cut | None) -> Tensor:
        """Count the tokens of one backward pass; return the auxiliary gradient of their logits."""
        frequencies_E = self._at(logits_NE.device)["frequencies"]
        which_E = take(torch.arange(len(frequencies_E), device=logits_NE.device), 0, cut)
        self.counts().index_add_(0, which_E, counts_E)
        even_E = (counts_E.sum() / len(which_E)).double().expand(len(which_E))
        self.expected().index_add_(0, which_E, even_E)
        if cut is not None:
            frequencies_E = frequencies_E[which_E]
            frequencies_E = frequencies_E / frequencies_E.sum().clamp(min=1e-30)
        if self.config.balance_scope == "micro":
            frequencies_E = (counts_E / counts_E.sum().clamp(min=1)).to(frequencies_E.dtype)
        sums, gradient_NE = auxiliary(logits_NE, frequencies_E, self.config)
        self.sums().add_(sums / max(self._n_tokens, 1))
        return gradient_NE * (self._gradient_scale / max(self._n_tokens, 1))
