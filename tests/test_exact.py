"""Exact-v0 is solved: value iteration, sums over all responses and policy iteration agree."""

import functools

import gymnasium
import numpy as np
import pytest
import torch

from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.policies import evaluate
from rlhf_gym.kl import exact_kl, k1, k2, k3
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.enumeration import Enumeration, listable, response_count
from rlhf_gym.objective.optimum import best_value
from rlhf_gym.tasks.exact import ASSETS, VARIANTS

Table = list[np.ndarray]


@functools.cache
def make_task(variant: str = "plain", **keywords) -> Enumeration:
    env = gymnasium.make("rlhf_gym/Exact-v0", variant=variant, device="cpu", **keywords).unwrapped
    return Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)


def perturbed(task: Enumeration, seed: int = 0, scale: float = 1.0) -> Table:
    rng = np.random.default_rng(seed)
    tables = [t + scale * rng.normal(size=t.shape) for t in task.reference]
    return [t - np.logaddexp.reduce(t, 2, keepdims=True) for t in tables]


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_iteration_is_the_sum_over_all_responses(variant):
    task = make_task(variant)
    np.testing.assert_allclose(task.best_value, task.best_value_by_sum, atol=1e-9)
    np.testing.assert_allclose(task.value(task.optimum).objective, task.best_value, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_task_binds(variant):
    task = make_task(variant)
    assert 1 <= task.value(task.optimum).kl.mean() <= 4
    assert task.optimality(task.best_of_n(16).objective) <= 0.9
    assert task.optimality(task.best_deterministic.objective) <= 0.8


def test_all_responses_are_counted_once():
    task = make_task()
    log_p = task.flat(task.reference)
    assert log_p.shape == (8, response_count(9, 1, 4)) == (8, 4681)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1.0, atol=1e-9)
    assert (np.ptp(task.flat_scores, axis=1) > 1).all()


def test_exact_policy_iteration_reaches_the_optimum():
    task = make_task("deceptive")
    policy, reached = task.reference, []
    for _ in range(task.horizon):
        policy = task.improved(policy)
        reached.append(task.optimality(task.value(policy).objective))
    assert reached[0] < 0.99, "one step must not be enough, or nothing is tested"
    assert reached == sorted(reached)
    np.testing.assert_allclose(task.value(policy).objective, task.best_value, atol=1e-9)


def test_the_gap_of_a_policy_is_a_divergence():
    task = make_task()
    policy = perturbed(task)
    log_p, log_best = task.flat(policy), task.flat(task.optimum)
    value = task.value(policy)
    gap = task.objective.kl_coef * (np.exp(log_p) * (log_p - log_best)).sum(1)
    assert gap.min() > 0.01
    np.testing.assert_allclose(task.best_value - value.objective, gap, atol=1e-9)
    np.testing.assert_allclose(value.score, (np.exp(log_p) * task.flat_scores).sum(1), atol=1e-9)


def test_a_model_s_table_is_what_the_model_says():
    task = make_task()
    lm = CausalLM.load(str(ASSETS / "reference"))
    ids = torch.tensor([[2, 5, 0, 7]])
    log_p = torch.log_softmax(lm.model(ids).logits[0, -1].double(), -1)
    state = 5 * 64 + 0 * 8 + 7
    np.testing.assert_allclose(task.reference[3][2, state], log_p.detach().numpy(), atol=1e-5)


def test_the_best_deterministic_policy_is_one_step_of_max():
    task = make_task()
    value = np.zeros((8, 1))
    for depth in reversed(range(task.horizon)):
        q = task.scores[depth] + task.objective.kl_coef * task.reference[depth]
        if depth < task.horizon - 1:
            q[:, :, :8] += value.reshape(8, -1, 8)
        value = q.max(2)
    np.testing.assert_allclose(task.best_deterministic.objective, value[:, 0], atol=1e-9)


def test_best_of_n_is_what_choosing_among_n_draws_is():
    task = make_task()
    rng = np.random.default_rng(0)
    p = np.exp(task.flat(task.reference)[3])
    drawn = rng.choice(len(p), size=(40_000, 4), p=p / p.sum())
    scores = task.flat_scores[3][drawn]
    chosen = scores.max(1)
    exact = task.best_of_n(4)
    assert abs(chosen.mean() - exact.score[3]) < 4 * chosen.std() / 200
    assert (exact.kl < np.log(4) - 3 / 4 + 1e-9).all()
    np.testing.assert_allclose(
        task.best_of_n(1).objective, task.value(task.reference).objective, atol=1e-6
    )


def test_the_sampled_optimum_covers_the_exact_one():
    task = make_task()
    rng = np.random.default_rng(0)
    p = np.exp(task.flat(task.reference))
    p /= p.sum(1, keepdims=True)
    inside = 0
    for _ in range(400):
        drawn = [rng.choice(p.shape[1], size=512, p=row) for row in p]
        scores = np.stack([s[d] for s, d in zip(task.flat_scores, drawn, strict=True)])
        found = best_value(scores, task.objective.kl_coef).mean()
        inside += found["low"] <= task.best_value.mean() <= found["high"]
    assert 0.92 * 400 <= inside <= 0.98 * 400


def test_three_proposals_together_find_the_exact_optimum():
    task = make_task("deceptive")
    rng = np.random.default_rng(0)
    beta, log_ref = task.objective.kl_coef, task.flat(task.reference)
    policies = [perturbed(task, seed=1, scale=0.5), task.improved(task.reference)]
    logs = [log_ref, *(task.flat(policy) for policy in policies)]
    scores, ratios = [], []
    for row in range(8):
        drawn = np.concatenate(
            [rng.choice(log_ref.shape[1], size=400, p=np.exp(x[row])) for x in logs]
        )
        scores.append(task.flat_scores[row][drawn])
        ratios.append([(x[row] - log_ref[row])[drawn] for x in logs[1:]])
    found = best_value(np.array(scores), beta, np.stack(ratios, 1), [1 / 3, 1 / 3])
    alone = best_value(np.array(scores)[:, :400], beta)
    assert found.ess.mean() > 5 * alone.ess.mean()
    assert abs(found.value.mean() - task.best_value.mean()) < 0.02
    with pytest.raises(ValueError, match="do not fit"):
        best_value(np.array(scores), beta, np.stack(ratios, 1), [0.5, 0.6])


def gradient_ascent(task: Enumeration, penalty: str, steps: int = 1500) -> float:
    """Optimality of where the expected policy gradient ends, for a penalty inside the reward."""
    reference = [torch.from_numpy(t) for t in task.reference]
    scores = [torch.from_numpy(t) for t in task.scores]
    tables = [t.clone().requires_grad_(True) for t in reference]
    optimizer = torch.optim.Adam(tables, lr=0.05)
    beta = task.objective.kl_coef
    for _ in range(steps):
        reach, loss = torch.ones(len(task.prompts), 1, dtype=torch.float64), torch.zeros(())
        logs = [torch.log_softmax(t, -1) for t in tables]
        paid = []
        for log_p, log_ref in zip(logs, reference, strict=True):
            if penalty == "exact":
                cost = exact_kl(log_p, log_ref)[..., None].expand_as(log_p)
            else:
                cost = {"k1": k1, "k2": k2, "k3": k3}[penalty](log_p, log_ref)
            paid.append(-beta * cost.detach())
        # What each action's return is, under the policy as it stands; no gradient through it.
        value = torch.zeros_like(reach)
        returns: list[torch.Tensor] = []
        for depth in reversed(range(task.horizon)):
            q = scores[depth] + paid[depth]
            if depth < task.horizon - 1:
                q[..., :8] += value.reshape(len(task.prompts), -1, 8)
            returns.insert(0, q)
            value = (logs[depth].detach().exp() * q).sum(-1)
        for log_p, q in zip(logs, returns, strict=True):
            loss = loss - (reach[..., None] * log_p.exp() * q).sum()
            reach = (reach[..., None] * log_p.detach().exp())[..., :8].reshape(len(reach), -1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy = [torch.log_softmax(t, -1).detach().numpy() for t in tables]
    return task.optimality(task.value(policy).objective)


def test_only_k1_in_the_reward_reaches_the_optimum():
    task = make_task(max_new_tokens=2)
    reached = {name: gradient_ascent(task, name) for name in ("k1", "k2", "k3", "exact")}
    assert reached["k1"] > 0.999
    assert all(reached[name] < 0.99 for name in ("k2", "k3", "exact")), reached


def test_evaluation_is_exact_here():
    env = gymnasium.make("rlhf_gym/Exact-v0", device="cpu").unwrapped
    figures, _, _ = evaluate(
        CausalLM.load(str(ASSETS / "reference")),
        env.objective,
        env.prompts,
        max_new_tokens=4,
        n_policy=4,
        n_reference=16,
    )
    assert figures["exact"]
    assert figures["optimality"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert figures["objective_optimum"]["value"] == pytest.approx(make_task().best_value.mean())
    assert figures["best_of_n_optimality"]["16"]["value"] <= 0.9


def test_what_cannot_be_listed_is_refused():
    env = gymnasium.make("rlhf_gym/Exact-v0", device="cpu").unwrapped
    assert not listable(env.objective, 8, 64)
    with pytest.raises(InputError, match="too many to list"):
        Enumeration(env.objective, env.prompts.ids, max_new_tokens=12)
    free = gymnasium.make("rlhf_gym/Exact-v0", device="cpu", kl_coef=0.0).unwrapped
    with pytest.raises(InputError, match="no soft optimum"):
        Enumeration(free.objective, free.prompts.ids, max_new_tokens=4)
    with pytest.raises(InputError, match="variant must be one of"):
        gymnasium.make("rlhf_gym/Exact-v0", variant="easy")
