"""The doctor finds each fault that is planted, and nothing in a healthy subject."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import ConstantSchedule
from transformers import AutoModelForSequenceClassification

import rlhf_gym.lm.decoding.sampling
from agents.doctor import CHECKS, Subject, examine, seam, seam_check
from agents.doctor.subject import changed_weights
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.vec_env import policy_kwargs
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.envs.actor import ActorBinding
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import DecodeCache
from rlhf_gym.lm.masks import Mask
from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import row_lengths

SCRIPTS = Path(__file__).parents[1] / "scripts"


def healthy(**keywords) -> tuple[TokenVectorEnv, CausalLMPolicy]:
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", device="cpu", **keywords).unwrapped
    policy = CausalLMPolicy(
        env.single_observation_space,
        env.single_action_space,
        ConstantSchedule(0.0),
        **policy_kwargs(env),
    )
    return env, policy


def found(env: TokenVectorEnv, policy: CausalLMPolicy, fresh: bool = True) -> set[str]:
    return {problem.check for problem in examine(Subject(env, policy, fresh=fresh, rows=64))}


@pytest.mark.parametrize("keywords", [{}, {"temperature": 0.7}, {"dense": True}])
def test_the_healthy_are_let_go_as_they_came(keywords):
    env, policy = healthy(**keywords)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert found(env, policy) == set()
    assert torch.equal(torch.rand(1), drawn), "the global generator is left as it was"
    assert all(torch.equal(t, before[name]) for name, t in policy.state_dict().items())


@pytest.mark.parametrize(("off_by", "faults"), [(0.0, set()), (0.02, {"ratio"}), (0.2, {"ratio"})])
def test_a_ratio_of_bfloat16_is_held_to_its_mean(monkeypatch, off_by, faults):
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", device="cpu").unwrapped
    space = env.single_observation_space, env.single_action_space, ConstantSchedule(0.0)
    policy = CausalLMPolicy(*space, precision="bf16", **policy_kwargs(env))
    evaluate = CausalLMPolicy.evaluate_actions

    def shifted(self, obs, actions):
        values, log_probs, entropy = evaluate(self, obs, actions)
        return values, log_probs + off_by * torch.is_grad_enabled(), entropy

    monkeypatch.setattr(CausalLMPolicy, "evaluate_actions", shifted)
    assert found(env, policy) == faults


def test_a_trained_policy_is_healthy_unless_it_should_be_the_reference():
    env, policy = healthy()
    with torch.no_grad():
        for p in policy.lm.parameters():
            p.mul_(1.1)
    assert found(env, policy, fresh=False) == set()
    assert found(env, policy) == {"start"}


def plant_dropout(env, policy, monkeypatch):
    for layer in policy.lm.model.layers:
        layer.self_attn.attention_dropout = 0.3


def plant_stale_cache(env, policy, monkeypatch):
    last_hidden = DecodeCache.last_hidden

    def stale(self, tokens):
        # Whatever has happened to the weights, what is remembered counts as theirs.
        weights = ((p._version, p.data_ptr()) for p in self.lm.model.parameters())
        self._versions = (rlhf_gym.lm.decoding.decode_cache._optimizer_steps, *weights)
        return last_hidden(self, tokens)

    monkeypatch.setattr(DecodeCache, "last_hidden", stale)


def plant_shifted_positions(env, policy, monkeypatch):
    step = rlhf_gym.lm.decoding.decode_cache.SlotDecoder.step
    monkeypatch.setattr(
        rlhf_gym.lm.decoding.decode_cache.SlotDecoder,
        "step",
        lambda self, t, p, *last: step(self, t, (p - 1).clamp(min=0), *last),
    )


def plant_sampling_temperature(env, policy, monkeypatch):
    drawn = rlhf_gym.lm.decoding.sampling._drawn

    def colder(probabilities, generator):
        powers = probabilities**2.5
        return drawn(powers / powers.sum(-1, keepdim=True), generator)

    monkeypatch.setattr(rlhf_gym.lm.decoding.sampling, "_drawn", colder)


def plant_policy_temperature(env, policy, monkeypatch):
    object.__setattr__(policy.core, "temperature", 0.7)


def plant_score_on_the_pad(env, policy, monkeypatch):
    def last_column(self, tokens):
        hidden = self.model.model(input_ids=tokens.clamp(min=0)).last_hidden_state
        return self.model.score(hidden[:, -1])

    monkeypatch.setattr(RewardModel, "_raw", last_column)


def plant_padded_vocabulary(env, policy, monkeypatch):
    policy.lm.resize_token_embeddings(16)
    object.__setattr__(policy.core, "vocab_size", 16)


def plant_padding_from_ids(env, policy, monkeypatch):
    states = CausalLM.states

    def masked(self, sequences):
        # A row's own length is forgotten: what is computed depends on the padding behind it.
        hidden = states(self, sequences)
        return hidden * (1 + 0.01 * sequences.tokens.shape[1])

    monkeypatch.setattr(CausalLM, "states", masked)


def plant_shared_weights(env, policy, monkeypatch):
    policy.lm.model.embed_tokens.weight = env.objective.reference.model.model.embed_tokens.weight


def plant_biased_estimator(env, policy, monkeypatch):
    env.objective.kl_estimator = "k3"
    with torch.no_grad():
        for p in policy.lm.parameters():
            p.mul_(1.1)


def plant_early_payment(env, policy, monkeypatch):
    play = TokenVectorEnv.play

    def early(self, actions, log_probs=None):
        rewards, infos, prompts = play(self, actions, log_probs)
        last = row_lengths(actions) - 1
        rows = np.arange(len(actions))
        rewards[rows, last] -= infos["score"]
        rewards[:, 0] += infos["score"]
        return rewards, infos, prompts

    monkeypatch.setattr(TokenVectorEnv, "play", early)


def plant_another_ratio(env, policy, monkeypatch):
    evaluate = policy.evaluate_actions

    def half(observations, actions):
        values, log_probs, entropy = evaluate(observations, actions)
        return values, log_probs + 0.01, entropy

    policy.evaluate_actions = half


def plant_text_behind_the_eos(env, policy, monkeypatch):
    sample = policy.sample_with_log_probs

    def on_and_on(prompts, max_new_tokens, stop_at_eos=True):
        return sample(prompts, max_new_tokens, False)

    policy.sample_with_log_probs = on_and_on


def plant_off_by_one(env, policy, monkeypatch):
    log_probs_of = CausalLM.log_probs_of
    monkeypatch.setattr(
        CausalLM, "log_probs_of", lambda self, h, *rest: log_probs_of(self, h.roll(1, 0), *rest)
    )


def plant_decoding_that_drifts(env, policy, monkeypatch):
    sample = policy.sample_with_log_probs

    def drifting(*arguments):
        found = sample(*arguments)
        return found._replace(log_probs=1.02 * found.log_probs)

    policy.sample_with_log_probs = drifting


def plant_another_mask(env, policy, monkeypatch):
    policy.core = replace(policy.core, mask=Mask(never=(3,)))


FAULTS = {
    plant_another_mask: "mask",
    plant_dropout: "dropout",
    plant_stale_cache: "cache",
    plant_shifted_positions: "cache",
    plant_sampling_temperature: "drawn as scored",
    plant_policy_temperature: "temperature",
    plant_score_on_the_pad: "score",
    plant_padded_vocabulary: "vocabulary",
    plant_padding_from_ids: "neighbours",
    plant_shared_weights: "frozen",
    plant_biased_estimator: "rewards",
    plant_early_payment: "rewards",
    plant_another_ratio: "ratio",
    plant_decoding_that_drifts: "decoding",
    plant_text_behind_the_eos: "ends",
    plant_off_by_one: "recomputed",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_each_planted_fault_is_found(plant, monkeypatch):
    env, policy = healthy()
    plant(env, policy, monkeypatch)
    assert FAULTS[plant] in found(env, policy)


def test_every_check_has_a_fault():
    names = {problem for problem in FAULTS.values()} | {"start"}
    assert {check.__name__.replace("_", " ") for check in CHECKS} == names


def test_the_script_exits_with_what_to_fix(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "doctor.py", "--env", "rlhf_gym/Exact-v0", *arguments]
        return subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)

    assert run().returncode == 0
    ill = run("--env-kwargs", "kl_estimator", "k3", "--policy", "no/such/folder")
    assert ill.returncode == 2
    _, policy = healthy()
    with torch.no_grad():
        for p in policy.lm.parameters():
            p.mul_(1.2)
    policy.core.save_pretrained(tmp_path)
    ill = run("--env-kwargs", "kl_estimator", "k3", "--policy", str(tmp_path))
    assert ill.returncode == 1
    assert "rewards" in ill.stdout
    assert "fix:" in ill.stdout


def test_one_token_is_enough_and_so_is_one_label_of_several(tmp_path):
    env, policy = healthy(max_new_tokens=1)
    assert found(env, policy) == set()
    # A classifier with two labels, of which one is the reward.
    reward = env.objective.reward
    config = copy.deepcopy(reward.model.config)
    config.num_labels, config.id2label = 2, {0: "BAD", 1: "GOOD"}
    config.label2id = {"BAD": 0, "GOOD": 1}
    del config.reward_gain, config.reward_bias  # a stranger's classifier has none
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    reward.tokenizer.save_pretrained(tmp_path)
    env, policy = healthy(reward_model=str(tmp_path), reward_label="GOOD")
    assert found(env, policy) == set()


def test_a_masked_environment_is_healthy_by_the_script():
    command = [sys.executable, str(SCRIPTS / "doctor.py"), "--env", "rlhf_gym/Exact-v0"]
    options = ["--env-kwargs", "top_k", "4", "min_new_tokens", "2", "device", "cpu"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_policy_has_one_j_in_three_programs():
    env, policy = healthy()
    figures, problem = seam(Subject(env, policy, rows=32))
    assert problem is None
    np.testing.assert_allclose(figures.by_sb3, figures.by_hand, atol=1e-4)
    assert len(figures.by_sb3) == 128
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=4)
    with changed_weights(policy, 1.1):
        wanted = task.value(task.log_probs(policy.core)).objective.mean()
    for part in (figures.by_hand, figures.by_evaluation):
        assert abs(part.mean() - wanted) < 5 * part.std() / np.sqrt(len(part))
    assert task.value(task.log_probs(policy.core)).kl.mean() < 1e-6, "the weights are put back"


def unbound(self, observations, actions, rows):
    return None


def stale(self, observations, actions, rows):
    return np.full(len(actions), -2.0, dtype=np.float32)


@pytest.mark.parametrize("fault", [unbound, stale])
def test_another_actors_rewards_are_found_at_the_seam(fault, monkeypatch):
    env, policy = healthy()
    monkeypatch.setattr(ActorBinding, "log_probs", fault)
    figures, problem = seam(Subject(env, policy))
    assert problem is not None
    assert problem.check == "seam"
    assert np.abs(figures.by_sb3 - figures.by_hand).max() > 0.1


def test_another_evaluation_is_found_at_the_seam(monkeypatch):
    env, policy = healthy()
    draw = seam_check.draw_responses

    def too_good(*args, **kwargs):
        drawn = draw(*args, **kwargs)
        return replace(drawn, scores=drawn.scores + 1)

    monkeypatch.setattr(seam_check, "draw_responses", too_good)
    assert seam(Subject(env, policy, rows=32))[1] is not None


def test_another_estimator_of_the_penalty_is_no_fault_of_the_seam():
    env, policy = healthy(kl_estimator="k3")
    figures, problem = seam(Subject(env, policy))
    assert problem is None
    np.testing.assert_allclose(figures.by_sb3, figures.by_hand, atol=1e-4)


def test_a_policy_that_must_know_where_the_prompt_ends_has_no_seam():
    env, policy = healthy(min_new_tokens=2)
    assert seam(Subject(env, policy)) == (None, None)
