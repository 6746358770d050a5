"""Estimators of a KL, controllers of its weight, and where an agent may put it."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from agents import ppo
from agents.sb3.kl_control import AdaptiveKL, FixedKL, LagrangianKL
from rlhf_gym.errors import InputError
from rlhf_gym.kl import exact_kl, k1, k2, k3
from rlhf_gym.lm.causal_lm import kl_to


def two_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    log_p, log_q = torch.log_softmax(logits, -1)
    return log_p, log_q


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    log_p, log_q = two_distributions()
    exact = float(exact_kl(log_p, log_q))
    expected = {f.__name__: float((log_p.exp() * f(log_p, log_q)).sum()) for f in (k1, k2, k3)}
    assert expected["k1"] == pytest.approx(exact, abs=1e-12)
    assert expected["k3"] == pytest.approx(exact, abs=1e-12)
    assert abs(expected["k2"] - exact) > 0.01
    assert k1(log_p, log_q).min() < 0 <= min(k2(log_p, log_q).min(), k3(log_p, log_q).min())


def test_k2_as_a_loss_has_the_gradient_of_the_divergence():
    _, log_q = two_distributions()
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad(exact_kl(log_p, log_q), logits, retain_graph=True)
    (sampled,) = torch.autograd.grad(
        (log_p.detach().exp() * k2(log_p, log_q)).sum(), logits, retain_graph=True
    )
    torch.testing.assert_close(sampled, exact)
    (of_k1,) = torch.autograd.grad((log_p.detach().exp() * k1(log_p, log_q)).sum(), logits)
    assert of_k1.abs().max() < 1e-12, "k1 as a loss has no gradient at all"


def test_a_token_that_cannot_be_taken_costs_nothing():
    log_p = torch.log(torch.tensor([0.5, 0.5, 0.0]))
    log_q = torch.log(torch.tensor([0.25, 0.75, 0.0]))
    assert float(exact_kl(log_p, log_q)) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_the_adaptive_controller_is_zieglers():
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(kl=6.6, episodes=512)  # 10 % too much
    assert controller.kl_coef == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000))
    before = controller.kl_coef
    controller.update(kl=60.0, episodes=512)  # clipped at 20 %
    assert controller.kl_coef == pytest.approx(before * (1 + 0.2 * 512 / 10_000))


def test_the_lagrangian_controller_climbs_while_the_constraint_is_broken():
    controller = LagrangianKL(0.1, target=2.0, rate=0.5)
    controller.update(kl=3.0, episodes=1)
    assert controller.kl_coef == pytest.approx(0.1 * np.exp(0.5))
    controller.update(kl=0.0, episodes=1)
    assert controller.kl_coef == pytest.approx(0.1 * np.exp(-0.5))
    controller.update(kl=1e9, episodes=1)
    assert controller.kl_coef == pytest.approx(0.1 * np.exp(0.5))
    fixed = FixedKL(0.1)
    fixed.update(kl=1e9, episodes=1)
    assert fixed.kl_coef == 0.1


def learner(**options):
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=64, device="cpu")
    made = ppo.make(ppo.Config(n_waves=1, n_minibatches=2, **options), env)
    made.algorithm.set_random_seed(0)
    return env, made


def perturb(policy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("options", "weight"), [({}, 0.4), ({"kl_coef": 1.5}, 1.5), ({"kl_loss": "k2"}, 0.0)]
)
def test_the_agents_weight_replaces_the_environments(options, weight):
    env, made = learner(**options)
    perturb(made.policy)
    algorithm = made.algorithm
    algorithm._setup_learn(1)
    buffer = algorithm.rollout_buffer
    infos = algorithm._play_wave(env, buffer).infos
    expected = -weight * infos["kl"].sum(1) + infos["score"]
    assert np.abs(infos["kl"]).max() > 0.01
    np.testing.assert_allclose(buffer.rewards.sum(0), expected, atol=1e-4)


@pytest.mark.parametrize("kl_loss", ["exact", "k2", "k3"])
def test_the_penalty_in_the_loss_is_what_it_says(kl_loss):
    env, made = learner(kl_loss=kl_loss)
    perturb(made.policy)
    algorithm = made.algorithm
    algorithm._setup_learn(1)
    algorithm._play_wave(env, algorithm.rollout_buffer)
    algorithm.rollout_buffer.compute_returns_and_advantage(torch.zeros(64), np.ones(64))
    batch = next(iter(algorithm.rollout_buffer.get(10_000)))
    core, reference = made.policy.core, env.objective.reference
    with torch.no_grad():
        at_policy, at_reference = (lm.states(batch.observations) for lm in (core, reference))
        log_p, log_q = core.log_probs(batch.observations), reference.log_probs(batch.observations)
        expected = {
            "exact": kl_to(at_policy, core, at_reference, reference),
            "k2": k2(log_p, log_q),
            "k3": k3(log_p, log_q),
        }[kl_loss]
    with_penalty = algorithm._loss().terms(batch)["objective"]
    algorithm.options = replace(algorithm.options, kl_loss=None)
    without = algorithm._loss().terms(batch)["objective"]
    torch.testing.assert_close(with_penalty, without - 0.4 * expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("target", "rises"), [(0.001, True), (5.0, False)])
def test_a_controller_steers_by_what_the_episodes_cost(target, rises):
    _, made = learner(kl_control="lagrangian", kl_target=target, kl_rate=1.0, learning_rate=3e-3)
    made.learn(64 * 4 * 6)
    assert (made.algorithm.kl_controller.kl_coef > 0.4) == rises


def test_an_unknown_place_for_the_penalty_is_refused():
    with pytest.raises(InputError, match="kl_loss: 'k1' is not one of exact, k2, k3"):
        learner(kl_loss="k1")


def test_an_adaptive_weight_stays_positive():
    controller = AdaptiveKL(0.1, target=6.0, horizon=50.0)
    for _ in range(5):
        controller.update(0.0, episodes=256)
        assert controller.kl_coef > 0
    for bad in ({"target": 0.0, "horizon": 1.0}, {"target": 1.0, "horizon": 0.0}):
        with pytest.raises(InputError, match="positive"):
            AdaptiveKL(0.1, **bad)


@pytest.mark.parametrize("make", [AdaptiveKL, LagrangianKL])
def test_a_weight_of_nothing_cannot_be_controlled(make):
    with pytest.raises(InputError, match="would never change"):
        make(0.0, 6.0, 1.0)
