"""Advantages equal their definitions, written as loops over single responses."""

import numpy as np
import pytest
import torch

from agents.sb3.rollout.advantages import gae, group_mean, leave_one_out, whiten


@pytest.mark.parametrize(("lam", "gamma"), [(0.95, 1.0), (1.0, 1.0), (0.0, 1.0), (0.9, 0.97)])
def test_gae_is_a_loop_over_each_response(lam, gamma):
    rng = np.random.default_rng(0)
    lengths = [1, 5, 3, 7]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.from_numpy(rng.normal(size=(4, 7))) for _ in range(2))
    rewards, values = rewards * mask, values * mask
    advantages, returns = gae(rewards, values, mask, lam, gamma)
    for i, n in enumerate(lengths):
        for t in range(n):
            deltas = [
                rewards[i, s] + (gamma * values[i, s + 1] if s + 1 < n else 0) - values[i, s]
                for s in range(t, n)
            ]
            expected = sum((gamma * lam) ** j * d for j, d in enumerate(deltas))
            assert float(advantages[i, t]) == pytest.approx(float(expected), abs=1e-12)
            assert float(returns[i, t]) == pytest.approx(float(expected + values[i, t]), abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_does_not_look_behind_the_end():
    mask = torch.tensor([[True, True, False]])
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.5, 9.0]])
    advantages, _ = gae(rewards, values, mask, 0.95)
    clean, _ = gae(rewards * mask, values * mask, mask, 0.95)
    torch.testing.assert_close(advantages, clean)


def test_leave_one_out_is_the_mean_of_the_others():
    returns = torch.randn(3, 4, dtype=torch.float64)
    found = leave_one_out(returns)
    for g in range(3):
        for i in range(4):
            others = [float(returns[g, j]) for j in range(4) if j != i]
            assert float(found[g, i]) == pytest.approx(float(returns[g, i]) - sum(others) / 3)


def test_group_mean_with_and_without_scale():
    returns = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    assert group_mean(returns, scale=False).tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    scaled = group_mean(returns)
    assert scaled[0, 1] == pytest.approx(2**-0.5, rel=1e-3)
    assert torch.isfinite(scaled).all()


def test_whitening_keeps_the_mean_where_it_is_asked_to():
    values = torch.randn(1000, dtype=torch.float64) * 3 + 2
    kept = whiten(values, shift_mean=False)
    assert float(kept.mean()) == pytest.approx(float(values.mean()))
    assert float(kept.var(correction=0)) == pytest.approx(1.0)
    shifted = whiten(values)
    assert float(shifted.mean()) == pytest.approx(0.0, abs=1e-9)
    # All alike: nothing to divide by, and nothing blows up.
    assert torch.isfinite(whiten(torch.ones(5))).all()
