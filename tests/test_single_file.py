"""The single file computes what the flagship computes, needs little and runs wherever it is."""

import ast
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import ppo, ppo_single_file
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
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
    ours = weights(single.policy.model, single.critic, single.value_head)
    for a, b in zip(ours, weights(theirs.lm, theirs.critic.trunk, theirs.critic.head), strict=True):
        # Adam makes much of a gradient that is all rounding; a whole step is 1e-3.
        # Adam's first steps divide small gradients by their own size, rounding included.
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    moved = any(not torch.equal(a, b) for a, b in zip(before, ours[: len(before)], strict=True))
    assert moved == (updates > 1), "the first update is the critic's alone"


@pytest.mark.parametrize("tokens", [1, 24])
def test_how_a_minibatch_is_cut_changes_nothing(make_vector_env, tokens):
    def trained(microbatch_tokens):
        env = make_vector_env(N)
        env.reset(seed=4)
        torch.manual_seed(0)
        np.random.seed(0)
        options = {"n_minibatches": 1, "n_epochs": 1, "critic_warmup": 0}
        config = ppo_single_file.Config(microbatch_tokens=microbatch_tokens, **options)
        learner = ppo_single_file.make(config, env)
        batch, _, _ = learner.rollout(env.reset()[0])
        widths = (batch.obs != ppo_single_file.PAD).sum(1)
        parts = ppo_single_file.passes(widths, microbatch_tokens)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(N))
        assert all(len(p) == 1 or len(p) * widths[p].max() <= microbatch_tokens for p in parts)
        return len(parts), learner.update(batch, critic_only=False)

    (whole, losses), (cut, others) = trained(4096), trained(tokens)
    assert whole == 1 < cut
    assert others == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert losses["train/gradient_norm"] > 1e-3


def test_its_first_ratio_is_one(make_vector_env):
    env = make_vector_env(N)
    env.reset(seed=4)
    learner = ppo_single_file.make(ppo_single_file.Config(n_waves=2), env)
    batch, _, _ = learner.rollout(env.reset()[0])
    logprobs, _ = learner.evaluate(batch.obs, batch.starts, batch.actions)
    torch.testing.assert_close(logprobs, batch.logprobs, atol=1e-5, rtol=1e-5)
    assert ((batch.actions == ppo_single_file.PAD) == (batch.logprobs == 0)).all()


def test_masks_that_differ_from_state_to_state_are_refused(make_vector_env):
    env = make_vector_env(N, mask={"top_k": 4})
    with pytest.raises(InputError, match="the same in every state"):
        ppo_single_file.make(ppo_single_file.Config(), env)


def test_a_copy_of_it_runs(tmp_path):
    copy = shutil.copy(ppo_single_file.__file__, tmp_path / "mine.py")
    options = ["--env", "rlhf_gym/Exact-v0", "--num-envs", "16", "--total-tokens", "100"]
    options += ["--env-kwargs", "kl_coef", "0.5", "--device", "cpu", "--n-epochs", "1"]
    command = [sys.executable, str(copy), *options, "--output", str(tmp_path / "policy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train/policy_loss" in done.stdout.splitlines()[-1]
    assert CausalLM.load(str(tmp_path / "policy")).vocab_size > 0


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--help"], 0, "passes over the responses of an update"),
        (["--env", "rlhf_gym/Nowhere-v0"], 2, "error: "),
        (["--env-kwargs", "top_k", "4"], 2, "the same in every state"),
    ],
)
def test_as_a_script_it_explains_itself_and_bad_input(monkeypatch, capsys, options, status, said):
    file = ppo_single_file.__file__
    monkeypatch.setattr(sys, "argv", [file, *options])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(file, run_name="__main__")
    torch.set_flush_denormal(False)
    assert left.value.code == status
    assert said in "".join(capsys.readouterr())


def test_it_is_one_short_file_without_this_folder():
    file = Path(ppo_single_file.__file__)
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    nodes = list(ast.walk(ast.parse(text)))
    imported = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    imported += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    assert {name for name in imported if name.split(".")[0] == "rlhf_gym"} == {
        "rlhf_gym.envs",
        "rlhf_gym.errors",
        "rlhf_gym.lm.decoding.sampling",
        "rlhf_gym.rewards",
    }
    assert not [name for name in imported if name.split(".")[0] in ("agents", "stable_baselines3")]
