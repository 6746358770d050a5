"""Advantages equal their definitions, written as loops over single responses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents.sb3.rollout.advantages import (
    AdvantageEstimator,
    gae,
    group_mean,
    leave_one_out,
    whiten,
)


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


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.35, 1 / 3, -2.5, 1000.1])
@pytest.mark.parametrize("k", [2, 3, 7, 8])
def test_rounding_is_no_advantage(constant, k):
    """Equal scores, with the rounding that a sum of log-ratios adds in float32."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(4, k))).float() * 1e-6
    for returns in (torch.full((4, k), constant), torch.full((4, k), constant) + noise):
        assert not group_mean(returns).any()
        assert not leave_one_out(returns).any()
    # A real difference, however small next to the others, stays one.
    returns = torch.full((4, k), constant)
    returns[:, 0] += 0.1
    assert (group_mean(returns)[:, 0] > 0.3).all()


@pytest.mark.parametrize("over", ["rollout", "minibatch"])
def test_equal_returns_leave_no_advantage_to_whiten(over):
    """The critic's error is no signal where no response was better than another."""
    rng = np.random.default_rng(0)

    def advantages(scores):
        steps, envs = 4, len(scores)
        buffer = SimpleNamespace(
            actions=np.zeros((steps, envs), dtype=np.int64),
            rewards=np.zeros((steps, envs), dtype=np.float32),
            values=rng.normal(size=(steps, envs)).astype(np.float32),
            n_envs=envs,
            buffer_size=steps,
        )
        buffer.rewards[-1] = scores
        AdvantageEstimator("critic", 0.95, 0.95, True, False, over).estimate(buffer, 1, 1)
        return buffer.advantages

    assert not advantages([1.0, 1.0, 1.0]).any()
    assert advantages([1.0, 1.0, 1.1]).any()
    assert advantages([1.0]).any(), "one response alone is compared with the critic only"
