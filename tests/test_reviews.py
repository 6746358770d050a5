"""The embedded task works offline, at once, and is what its page says."""

import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import rlhf_gym  # noqa: F401
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.rewards import human
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tasks.grammar import sample_review
from rlhf_gym.tasks.reviews import ASSETS, DEFAULTS
from rlhf_gym.tokens import continuations


def test_gym_make_is_quick_and_needs_no_network():
    program = (
        "import time, gymnasium, rlhf_gym, rlhf_gym.tasks.reviews\n"
        "begun = time.process_time()\n"
        "env = gymnasium.make('rlhf_gym/Reviews-v0', device='cpu')\n"
        "env.reset(seed=0); env.step(5)\n"
        "print(time.process_time() - begun)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0  # seconds of CPU, so that a busy machine does not matter


def test_checkers_pass_on_it():
    env = gym.make("rlhf_gym/Reviews-v0", device="cpu")
    check_env(env.unwrapped, skip_render_check=True)
    assert json.loads(env.spec.to_json())["id"] == "rlhf_gym/Reviews-v0"


def test_the_reference_speaks_and_the_reward_model_agrees_with_the_human():
    env = gym.make_vec("rlhf_gym/Reviews-v0", num_envs=64, device="cpu").unwrapped
    observations, _ = env.reset(seed=0)

    lm = env.objective.reference
    prompts = torch.from_numpy(observations[:, : env.prompts.max_tokens])
    generator = torch.Generator().manual_seed(0)
    replies = sample_responses(lm, prompts, env.max_new_tokens, generator=generator)
    responses = Responses(lm, continuations(prompts, replies))
    gold = np.array(human.compound(responses.prompts, responses.texts))
    scores = env.objective.scores(responses).numpy()
    assert float(responses.stopped.float().mean()) > 0.8
    assert gold.std() > 0.4
    assert np.corrcoef(gold, scores)[0, 1] > 0.6
    assert abs(scores.mean()) < 0.5
    assert 0.6 < scores.std() < 1.4


def test_the_packaged_files_are_small_and_safe():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    assert CausalLM.load(DEFAULTS["reference"]).vocab_size > 300
    assert RewardModel.load(DEFAULTS["reward_model"]).scale.gain > 0


def test_reviews_survive_the_tokenizer():
    lm = CausalLM.load(DEFAULTS["reference"])
    rng = np.random.default_rng(1)
    for _ in range(200):
        review = sample_review(rng)
        ids = lm.tokenizer(review)["input_ids"]
        assert lm.tokenizer.unk_token_id not in ids
        assert lm.texts([ids]) == [review]


def test_choices_are_boltzmann_rational():
    rng = np.random.default_rng(0)
    utilities = np.tile([0.0, 0.5, 1.0], (20_000, 1))
    chosen = np.bincount(human.choose(utilities, 0.5, rng), minlength=3) / 20_000
    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    assert np.abs(chosen - expected).max() < 0.015
    assert (human.choose(utilities, 0.0, rng) == 2).all()
    coin = np.bincount(human.choose(utilities, float("inf"), rng), minlength=3) / 20_000
    np.testing.assert_allclose(coin, 1 / 3, atol=0.02)
    for bad in (-1.0, float("nan")):
        with pytest.raises(InputError, match="at least 0"):
            human.choose(utilities, bad, rng)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_both_splits_have_prompts(split):
    env = gym.make("rlhf_gym/Reviews-v0", split=split, device="cpu").unwrapped
    assert len(env.prompts) > 100
    assert env.prompts.dropped == 0
