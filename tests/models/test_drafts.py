from __future__ import annotations

import numpy as np
import pytest
import torch

from motet.models.drafts import MOST_AHEAD, acceptance, best_ahead, speed_up, tokens_per_pass


def test_the_acceptance_rate_is_what_speculative_sampling_accepts() -> None:
    """Algorithm 1 itself: draw x from q, keep it with probability min(1, p(x) / q(x))."""
    torch.manual_seed(0)
    target, draft = torch.randn(1, 2, 11), torch.randn(1, 2, 11)
    found = acceptance(target, draft)
    draws, generator = 40_000, np.random.default_rng(0)
    for at in range(2):
        p = target[0, at].softmax(-1).double().numpy()
        q = draft[0, at].softmax(-1).double().numpy()
        drawn = generator.choice(11, size=draws, p=q / q.sum())
        kept = generator.random(draws) < np.minimum(1, p[drawn] / q[drawn])
        assert found.sampled[0, at].item() == pytest.approx(kept.mean(), abs=4 * 0.5 / draws**0.5)
        assert found.greedy[0, at] == float(p.argmax() == q.argmax())


def test_rows_are_taken_in_parts_and_in_order() -> None:
    torch.manual_seed(1)
    target, draft = torch.randn(2, 700, 5), torch.randn(2, 700, 5)
    whole = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)
    torch.testing.assert_close(acceptance(target, draft).sampled, whole)
    assert acceptance(target, target).sampled.min() > 1 - 1e-6
    assert acceptance(target, target).greedy.min() == 1


def test_a_pass_yields_the_accepted_drafts_and_one_token_of_the_target() -> None:
    generator = np.random.default_rng(0)
    for rate, ahead in ((0.7, 4), (0.2, 2)):
        kept = generator.random((40_000, ahead)) < rate
        yields = 1 + kept.cumprod(axis=1).sum(axis=1)
        assert tokens_per_pass(rate, ahead) == pytest.approx(yields.mean(), abs=0.03)
    assert tokens_per_pass(1.0, 5) == 6
    assert tokens_per_pass(0.0, 5) == 1


def test_as_many_tokens_are_drafted_as_pay_most() -> None:
    for rate in (0.1, 0.5, 0.8, 0.95):
        for cost in (0.02, 0.3, 0.9):
            best = best_ahead(rate, cost)
            assert all(
                speed_up(rate, n, cost) <= speed_up(rate, best, cost) for n in range(MOST_AHEAD + 1)
            )
            assert (best == 0) == (rate <= cost)  # corollary 3.9
