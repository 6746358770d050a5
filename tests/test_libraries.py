"""Other libraries train in the same environment; each test is skipped where its library is not."""

import importlib
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import set_random_seed

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.enumeration import Enumeration

pytestmark = pytest.mark.filterwarnings("ignore")


def learned(name: str, folder: Path, tokens: int, **options: object) -> float:
    """Optimality on Exact-v0 of a policy that was trained, saved and loaded again."""
    library = name.split("_")[0].replace("rllib", "ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)
        module = importlib.import_module(f"agents.{name}")
    set_random_seed(0)
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=64, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    env.reset(seed=0)
    learner = module.make(module.Config(**options), env)
    learner.learn(tokens)
    learner.save(folder)
    policy = CausalLM.load(str(folder)).following(env.objective.reference)
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    found = task.value(task.log_probs(policy)).objective
    return float(task.optimality(found))


def test_tianshou_learns_the_enumerable_task(tmp_path):
    assert 0.3 < learned("tianshou_ppo", tmp_path / "policy", 8000, learning_rate=1e-3) <= 1


def test_rllib_learns_the_enumerable_task(tmp_path):
    assert 0.2 < learned("rllib_ppo", tmp_path / "policy", 4096, learning_rate=1e-3) <= 1


def test_tianshou_is_paid_what_the_environment_pays_a_bound_actor():
    pytest.importorskip("tianshou")
    from agents import tianshou_ppo

    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=16, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    learner = tianshou_ppo.make(tianshou_ppo.Config(), env)
    with torch.no_grad():
        for p in learner.policy.model.parameters():
            p.mul_(1.1)  # away from the reference, so that there is something to pay
    observations, _ = learner.env.reset()
    sums = np.zeros(16)
    episodes: list[float] = []
    for _ in range(40):
        with torch.no_grad():
            logits, _ = learner.actor(observations)
        actions = torch.distributions.Categorical(logits=logits).sample().numpy()
        observations, rewards, ended, _, _ = learner.env.step(actions)
        sums += rewards
        for i in np.flatnonzero(ended):
            episodes.append(sums[i])
            sums[i] = 0.0
        if ended.any():
            observations = observations.copy()
            observations[ended], _ = learner.env.reset(np.flatnonzero(ended))
    beta = env.objective.kl_coef
    expected = [x["score"] - beta * x["kl_sum"] for x in learner.env.finished]
    assert len(expected) > 16
    np.testing.assert_allclose(episodes, expected, atol=1e-5)
    assert max(abs(x["kl_sum"]) for x in learner.env.finished) > 1e-3


def test_rllib_is_paid_what_the_environment_pays_a_bound_actor(monkeypatch):
    pytest.importorskip("ray")
    from agents import rllib_ppo

    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=16, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    step, paid, came, sums = rllib_ppo.LiveEnv.step, [], [], np.zeros(16)

    def watched(self, actions):
        out = step(self, actions)
        sums[:] += out[1]
        ended = np.flatnonzero(out[2])
        paid.extend(sums[ended])
        came.extend(self.seen.finished[len(self.seen.finished) - len(ended) :])
        sums[ended] = 0.0
        return out

    monkeypatch.setattr(rllib_ppo.LiveEnv, "step", watched)
    learner = rllib_ppo.make(rllib_ppo.Config(learning_rate=1e-2), env)
    learner.learn(1000)
    assert len(came) > 100
    expected = [score - env.objective.kl_coef * kl for score, kl in came]
    np.testing.assert_allclose(paid, expected, atol=1e-5)
    assert max(abs(kl) for _, kl in came) > 0.5
