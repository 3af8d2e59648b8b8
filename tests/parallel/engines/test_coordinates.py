"""The coordinate check of muP (arXiv:2203.03466, appendix D): how far one step moves logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize
from motet.models.width_multipliers import fan_in_ratio, initial_scales, multiplied
from motet.parallel.runtime.dtensors import adamw
from motet.parallel.runtime.options import EngineOptions
from tests.models.families import some_tokens, tiny

BASE = tiny(d_model=32, d_ffn=64, n_heads=4, n_kv_heads=4, head_dim=8, init_std=0.05)
WIDTHS, STEPS, LR = (1, 2, 4, 8), 4, 2e-2


def moved(times: int, base: ModelConfig | None) -> float:
    """How far some steps move logits (root mean square), at so many times the width."""
    config = replace(
        BASE, d_model=32 * times, d_ffn=64 * times, n_heads=4 * times, n_kv_heads=4 * times
    )
    config = config if base is None else multiplied(base, config)
    model, tokens = Decoder(config), some_tokens(config, 8, 17)
    initialize(model, 0)
    ratios = fan_in_ratio(base, config)
    scales = {} if base is None else initial_scales(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(scales.get(name, 1.0))
        before = model(tokens)
    weights = dict(model.named_parameters())
    optimizer = adamw(weights, EngineOptions(fused=False), ratios)
    for group in optimizer.param_groups:
        group["lr"] = LR / group["width_multiplier"]
    for _ in range(STEPS):
        optimizer.zero_grad()
        sums = model(tokens[:, :-1], tokens[:, 1:], mode="loss")
        (sums.cross_entropy / sums.n_labels).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(tokens) - before).square().mean().sqrt())


@pytest.mark.long
def test_a_step_moves_logits_as_far_at_any_width_and_further_without_the_rule() -> None:
    with_rule = [moved(times, BASE) for times in WIDTHS]
    without = [moved(times, None) for times in WIDTHS]
    assert with_rule[0] == without[0]
    assert max(with_rule) / min(with_rule) < 1.5
    assert without[-1] / without[0] > 3
