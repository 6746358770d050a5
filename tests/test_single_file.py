"""The single file computes what the flagship computes, and imports nothing of its folder."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import ppo, ppo_single_file
from rlhf_gym.rewards.reward_model import RewardModel

N = 8


def weights(*modules: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.parametrize("updates", [1, 3])
def test_its_updates_are_the_flagships(make_vector_env, save_reward_model, by_model, updates):
    def env():
        made = make_vector_env(
            N, **({"reward": RewardModel.load(save_reward_model())} if by_model else {})
        )
        made.reset(seed=4)
        return made

    options = {"n_waves": 2, "n_minibatches": 3, "n_epochs": 2, "critic_warmup": 1}
    flagship = ppo.make(ppo.Config(learning_rate=1e-3, **options), env())
    single = ppo_single_file.make(ppo_single_file.Config(learning_rate=1e-3, **options), env())
    theirs = flagship.policy
    before = weights(single.policy.model)
    counts = {"flagship": 0, "single": 0}

    class Enough(Exception):
        pass

    def stop_after(owner, name: str, key: str) -> None:
        work = getattr(owner, name)

        def counted(*arguments):
            out = work(*arguments)
            counts[key] += 1
            if counts[key] == updates:
                raise Enough
            return out

        setattr(owner, name, counted)

    stop_after(flagship.algorithm, "train", "flagship")
    stop_after(single, "update", "single")
    for learner in (flagship, single):
        torch.manual_seed(0)
        np.random.seed(0)
        with pytest.raises(Enough):
            learner.learn(1000)
    ours = weights(single.policy.model, single.critic.model, single.value_head)
    for a, b in zip(ours, weights(theirs.lm, theirs.critic.trunk, theirs.critic.head), strict=True):
        # Adam makes much of a gradient that is all rounding; a whole step is 1e-3.
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)
    moved = any(not torch.equal(a, b) for a, b in zip(before, ours[: len(before)], strict=True))
    assert moved == (updates > 1), "the first update is the critic's alone"


def test_it_is_one_short_file_without_this_folder():
    file = Path(ppo_single_file.__file__)
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 350
    nodes = list(ast.walk(ast.parse(text)))
    imported = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    imported += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    assert "rlhf_gym.lm.batching" in imported
    assert not [name for name in imported if name.split(".")[0] in ("agents", "stable_baselines3")]
