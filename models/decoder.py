"""The decoder: tokens in; logits, summed losses or token scores out.

B batch, T tokens, V vocabulary, D model width. It knows no rank, no environment and no file.
"""

from __future__ import annotations

import hashlib
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motet.models.attention import document_places
from motet.models.config import ModelConfig, check
from motet.models.layers import Block, Linear, Places, RMSNorm, rotary_tables
from motet.models.loss import LossSums, Scores, label_scores, loss_sums

MIN_TABLE_POSITIONS = 2048


class Decoder(nn.Module):
    """A causal language model of the Llama, OLMo-2 or Qwen3 shape.

    Made on the meta device it holds no values; `initialize`, or a loaded state, fills it. Its state
    is the parameters alone: rotary tables are computed when first needed, on the tokens' device.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.embedding = Embedding(config.vocabulary_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            None if config.tied_embeddings else Linear(config.d_model, config.vocabulary_size)
        )
        self._recompute = False
        self._tables: tuple[Tensor, Tensor] | None = None

    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        mode: Literal["logits"] = "logits",
        z_loss: float = 0.0,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        *,
        mode: Literal["loss"],
        z_loss: float = 0.0,
    ) -> LossSums: ...
    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        *,
        mode: Literal["score"],
        z_loss: float = 0.0,
    ) -> Scores: ...
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        mode: Literal["logits", "loss", "score"] = "logits",
        z_loss: float = 0.0,
    ) -> Tensor | LossSums | Scores:
        """Run the model on int64 [B, T] tokens.

        `labels_BT[b, t]` is the token to predict after `tokens_BT[b, t]`, -100 for none.
        With `document_ids_BT` a token sees only earlier tokens of its own document, and positions
        restart at each change of id. Modes: "logits" returns [B, T, V]; "loss" `LossSums`, with
        gradient; "score" `Scores`, without. Padding on the right changes no result on its left.
        """
        hidden_BTD = self._hidden(tokens_BT, document_ids_BT)
        head_VD = self.embedding.weight if self.head is None else self.head.weight
        if mode == "logits":
            return F.linear(hidden_BTD, head_VD) if self.head is None else self.head(hidden_BTD)
        if mode not in ("loss", "score"):
            raise ValueError(f"mode={mode!r} is not one of 'logits', 'loss', 'score'")
        if labels_BT is None:
            raise ValueError(
                f"mode={mode!r} needs labels_BT: the token to predict at each position"
            )
        if mode == "loss":
            return loss_sums(hidden_BTD, head_VD, labels_BT, z_loss)
        return label_scores(hidden_BTD, head_VD, labels_BT)

    def set_recompute(self, on: bool) -> None:
        """Keep only each block's input for the backward pass, and run the block again there."""
        self._recompute = on

    def _hidden(self, tokens_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        places = self._places(tokens_BT, document_ids_BT)
        x_BTD = self.embedding(tokens_BT)
        recompute = self._recompute and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x_BTD = checkpoint(
                    block, x_BTD, places, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTD = block(x_BTD, places)
        return self.norm(x_BTD)

    def _places(self, tokens_BT: Tensor, document_ids_BT: Tensor | None) -> Places:
        length = tokens_BT.shape[1]
        if (
            self._tables is None
            or len(self._tables[0]) < length
            or self._tables[0].device != tokens_BT.device
        ):
            rows = max(MIN_TABLE_POSITIONS, 1 << (length - 1).bit_length())
            config = self.config
            self._tables = rotary_tables(
                rows, config.head_width, config.rope_theta, tokens_BT.device
            )
        cos, sin = self._tables
        if document_ids_BT is None:
            return Places(cos[:length], sin[:length], None)
        positions_BT, mask = document_places(document_ids_BT)
        return Places(cos[positions_BT], sin[positions_BT], mask)


class Embedding(nn.Embedding):
    """A lookup table whose values come from `initialize` or from a checkpoint."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Return the first value of parameter `name` (its full name in `Decoder`), fp32 on the CPU.

    A pure function of its arguments: every layout, and every order of calls, gets the same numbers.
    Norms are 1. Others are normal with `init_std`; projections that write to the residual stream
    (`o_proj`, `down_proj`) are divided by sqrt(2 n_layers), as in GPT-2 (section 2.3).
    """
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    if name.split(".")[-2].endswith("norm"):
        return torch.ones(shape)
    std = config.init_std
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.n_layers) ** 0.5
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill a `Decoder` of plain tensors with its initial values; from the meta device, on the CPU."""
    config = module.config
    assert isinstance(config, ModelConfig)
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))
