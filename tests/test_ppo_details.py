"""The options of the flagship do what their names say, and nothing else."""

import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PLAIN, assert_same_gradients, play_rollout, prompt_dataset
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import agents
from agents import ppo
from agents.sb3 import PPO, build
from agents.sb3.learning.checkpoint import save_checkpoint
from agents.sb3.learning.learner import SB3Learner
from agents.sb3.ptx import PretrainingMix, pretraining_mix
from agents.sb3.response_ppo import critic_start
from agents.sb3.rollout.advantages import group_mean, leave_one_out
from agents.sb3.tf1_adam import TF1Adam
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import is_causal, trunk
from rlhf_gym.lm.loading import load_pretrained
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import Sequences, pad_rows

N = 8


@pytest.fixture
def make_ppo(make_vector_env) -> Callable[..., PPO]:
    """A flagship that has played one rollout, judged but not learned from."""

    def make(env: TokenVectorEnv | None = None, **options: Any) -> PPO:
        policy_options = options.pop("policy_options", None)
        learner = build(
            PPO,
            env or make_vector_env(N),
            seed=0,
            device="cpu",
            policy_options=policy_options,
            **{**PLAIN, "n_waves": 2, "n_minibatches": 2, **options},
        )
        play_rollout(learner)
        return learner

    return make


def taken(learner: PPO) -> np.ndarray:
    return learner.rollout_buffer.actions >= 0


def test_rewards_are_whitened_and_keep_their_mean(make_ppo):
    plain, white = make_ppo(), make_ppo(whiten_rewards=True)
    mask = taken(plain)
    np.testing.assert_array_equal(mask, taken(white))
    before, after = (x.rollout_buffer.rewards[mask] for x in (plain, white))
    assert after.std() == pytest.approx(1.0, abs=1e-3)
    assert after.mean() == pytest.approx(before.mean(), abs=1e-4)
    assert not white.rollout_buffer.rewards[~mask].any()


def test_advantages_are_whitened_over_the_rollout_or_each_minibatch(make_ppo):
    whole = make_ppo(normalize_advantage=True, normalize_over="rollout")
    advantages = whole.rollout_buffer.advantages[taken(whole)]
    assert advantages.mean() == pytest.approx(0.0, abs=1e-5)
    assert advantages.std() == pytest.approx(1.0, abs=1e-3)
    plain = make_ppo(normalize_advantage=True)
    assert abs(plain.rollout_buffer.advantages[taken(plain)].std() - 1.0) > 1e-2
    # The returns that the critic learns are those of the rewards all the same.
    np.testing.assert_allclose(whole.rollout_buffer.returns, plain.rollout_buffer.returns)


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
def test_group_baselines_compare_whole_responses_to_one_prompt(
    make_ppo, make_objective, load_lm, baseline
):
    objective = make_objective()
    env = TokenVectorEnv(
        objective, _prompts(objective), num_envs=N, max_new_tokens=5, rows_per_prompt=4
    )
    learner = make_ppo(env, baseline=baseline)
    buffer = learner.rollout_buffer
    returns = torch.from_numpy(buffer.rewards.reshape(2, 5, N).sum(1).reshape(-1, 4))
    expected = (leave_one_out if baseline == "leave_one_out" else group_mean)(returns)
    first = buffer.advantages.reshape(2, 5, N)[:, 0].reshape(-1, 4)
    np.testing.assert_allclose(first, expected.numpy(), rtol=1e-5, atol=1e-6)
    # The same for every token of a response, nothing behind its end.
    for wave in range(2):
        block = buffer.advantages.reshape(2, 5, N)[wave]
        here = taken(learner).reshape(2, 5, N)[wave]
        np.testing.assert_allclose(block[here], np.broadcast_to(block[0], block.shape)[here])
        assert not block[~here].any()
    learner.train()
    assert np.isfinite(learner.logger.name_to_value["train/policy_loss"])


def test_group_baselines_need_groups(make_ppo):
    with pytest.raises(InputError, match="rows_per_prompt"):
        make_ppo(baseline="leave_one_out")


def _prompts(objective: Any) -> Any:
    return prompt_dataset(objective.reference)


def test_the_value_loss_is_clipped_as_written(make_ppo):
    learner = make_ppo(clip_range_vf=0.2)
    old = torch.tensor([0.0, 0.0, 0.0, 1.0])
    values = torch.tensor([0.1, 0.9, 0.9, 0.0])
    returns = torch.tensor([1.0, 1.0, -1.0, -1.0])
    #          near 0.1 | 0.2 is farther | 0.9 is farther | 0.8 is farther
    expected = torch.tensor([0.81, 0.64, 3.61, 3.24])
    torch.testing.assert_close(learner._loss().value_loss(values, old, returns), expected)
    learner.options = replace(learner.options, clip_range_vf=None)
    unclipped = learner._loss().value_loss(values, old, returns)
    torch.testing.assert_close(unclipped, (values - returns) ** 2)


@pytest.mark.parametrize("start", ["separate", "reward_model"])
def test_a_critic_of_its_own(make_vector_env, make_ppo, save_reward_model, save_lm, start):
    reward = RewardModel.load(save_reward_model())
    env = make_vector_env(N, reward=reward)
    config = ppo.Config(critic=start)
    name = critic_start(config, env).name_or_path
    assert name == (save_lm("llama") if start == "separate" else reward.model.name_or_path)
    learner = make_ppo(env, policy_options={"critic": name, "critic_lr_scale": 3.0})
    policy = learner.policy
    source = env.objective.reference.model if start == "separate" else reward.model
    for ours, theirs in zip(
        policy.critic.trunk.state_dict().values(), trunk(source).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert [g["lr_scale"] for g in policy.optimizer.param_groups] == [1.0, 3.0, 1.0]
    # Values come from the critic alone, whichever way they are asked for.
    (batch,) = list(learner.rollout_buffer.get())
    with torch.no_grad():
        expected = policy.critic.head(policy.critic.states(batch.observations, None)).flatten()
        torch.testing.assert_close(batch.old_values, expected, atol=1e-5, rtol=1e-4)
        values = policy.predict_values(batch.observations).flatten()
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)
        rows = torch.from_numpy(env.reset(seed=0)[0])
        stepped = policy.forward(rows)[1]
        torch.testing.assert_close(stepped, policy.predict_values(rows), atol=1e-5, rtol=1e-4)
    learner.train()
    assert learner.logger.name_to_value["train/ratio_first_max_error"] < 1e-5
    # The value loss teaches the critic's trunk, and leaves the policy's alone.
    policy.set_training_mode(True)
    values, _, _ = policy.evaluate_actions(batch.observations, batch.actions)
    policy.optimizer.zero_grad()
    (values**2).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.lm.parameters())
    assert any(p.grad is not None and p.grad.any() for p in policy.critic.trunk.parameters())


def test_a_critic_of_its_own_is_saved_and_taken_over(make_ppo, make_vector_env, save_lm, tmp_path):
    env = make_vector_env(N)
    options = {"policy_options": {"critic": save_lm("llama", seed=4)}}
    learner = make_ppo(env, **options)
    learner.train()
    SB3Learner(learner).save(tmp_path / "policy")
    other = make_ppo(make_vector_env(N), **options)
    SB3Learner(other).start_from(tmp_path / "policy")
    for a, b in zip(
        learner.policy.state_dict().values(), other.policy.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b)
    path = save_checkpoint(learner, tmp_path / "checkpoints")
    assert any(k.startswith("critic.trunk.") for k in load_file(path / "policy.safetensors"))


def test_a_critic_with_another_vocabulary_is_refused(make_ppo, save_lm):
    with pytest.raises(InputError, match="critic"):
        make_ppo(policy_options={"critic": save_lm("llama", seed=4, vocab_size=12)})


def test_critic_of_the_reward_model_needs_one(make_vector_env):
    with pytest.raises(InputError, match="critic=separate"):
        critic_start(ppo.Config(critic="reward_model"), make_vector_env(2))


def test_the_critic_is_chosen_by_what_the_environment_pays_by(
    make_vector_env, save_reward_model, load_lm
):
    auto = ppo.Config()
    assert auto.critic == "auto"
    by_function = make_vector_env(2)
    assert critic_start(auto, by_function) is by_function.objective.reference.model
    name = save_reward_model()
    reward = RewardModel.load(name, device="cpu")
    by_model = make_vector_env(2, reward=reward)
    assert critic_start(auto, by_model) is reward.model
    reference = by_model.objective.reference.model
    assert critic_start(ppo.Config(critic="separate"), by_model) is reference
    # Adapters are one model in memory, or nothing.
    assert critic_start(ppo.Config(lora_rank=2), by_model) is None


def test_a_critic_that_sees_the_future_is_refused(make_ppo, load_lm, tmp_path):
    tokens = load_lm()
    encoder = BertModel(
        BertConfig(
            vocab_size=tokens.vocab_size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    encoder.save_pretrained(tmp_path)
    assert is_causal(tokens.model)
    assert not is_causal(encoder)
    with pytest.raises(InputError, match="sees later tokens"):
        make_ppo(policy_options={"critic": str(tmp_path)})


def test_options_reach_adam(make_vector_env):
    learner = ppo.make(ppo.Config(adam="tf1", adam_eps=1e-3), make_vector_env(2))
    optimizer = learner.policy.optimizer
    assert isinstance(optimizer, TF1Adam)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-3}
    rate = ppo.Config().learning_rate
    assert learner.algorithm.lr_schedule(0.5) == pytest.approx(rate / 2)
    constant = ppo.make(ppo.Config(anneal=False), make_vector_env(2))
    assert constant.algorithm.lr_schedule(0.5) == pytest.approx(rate)


def test_the_rate_falls_from_its_start_and_the_last_update_learns(make_vector_env):
    once = {"n_waves": 1, "n_epochs": 1, "n_minibatches": 1, "critic_warmup": 0}
    config = ppo.Config(critic="shared", learning_rate=1e-3, **once)
    env = make_vector_env(N)
    learner = ppo.make(config, env)
    taken, lives = [], []
    train = learner.algorithm.train

    def watched() -> None:
        before = [p.detach().clone() for p in learner.policy.lm.parameters()]
        train()
        now = learner.policy.lm.parameters()
        lives.append(any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)))
        taken.append(learner.policy.optimizer.param_groups[0]["lr"])

    learner.algorithm.train = watched
    total, sampled = 60 * N, []
    learner.algorithm.collect_rollouts = _noting(learner.algorithm, sampled)
    learner.learn(total)
    assert len(taken) > 3
    assert taken == pytest.approx([1e-3 * (1 - tokens / total) for tokens in sampled])
    assert taken[0] == pytest.approx(1e-3)
    assert all(lives)

    again = len(taken)
    learner.learn(total)  # a second training has a schedule of its own
    assert taken[again] == pytest.approx(1e-3)


def _noting(algorithm: PPO, sampled: list[int]) -> Callable[..., bool]:
    collect = algorithm.collect_rollouts

    def collected(*args: Any, **options: Any) -> bool:
        sampled.append(algorithm.num_timesteps)
        return collect(*args, **options)

    return collected


PRESETS = [
    module.name
    for module in pkgutil.iter_modules(agents.__path__)
    if module.name.startswith("ppo_") and module.name != "ppo_single_file"
]


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_learns(make_vector_env, save_reward_model, name):
    module = importlib.import_module(f"agents.{name}")
    env = make_vector_env(N, reward=RewardModel.load(save_reward_model()))
    learner = module.make(module.Config(), env)
    before = {k: v.clone() for k, v in learner.policy.lm.state_dict().items()}
    learner.learn(300)
    assert learner.algorithm.logger.name_to_value["train/ratio_first_max_error"] < 1e-4
    changed = [not torch.equal(v, before[k]) for k, v in learner.policy.lm.state_dict().items()]
    assert any(changed)
    json.dumps(vars(module.Config()))


def test_there_are_the_presets_of_the_literature():
    assert set(PRESETS) == {"ppo_seed", "ppo_ziegler2019", "ppo_nplus2024", "ppo_rl4lms"}


@pytest.mark.parametrize(
    ("option", "value"),
    [("normalize_over", "all"), ("baseline", "mean"), ("kl_loss", "k1"), ("mean_over", "row")],
)
def test_bad_options_are_refused(make_vector_env, option, value):
    with pytest.raises(InputError, match=option):
        build(PPO, make_vector_env(2), **PLAIN, device="cpu", **{option: value})


def ptx_texts(learner: PPO) -> Sequences:
    """Six texts of different lengths, the first token of each given."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, learner.policy.core.vocab_size, n) for n in (9, 5, 7, 3, 9, 6)]
    lengths = torch.tensor([len(row) - 1 for row in rows])
    return Sequences(torch.from_numpy(pad_rows(rows)), torch.ones_like(lengths), lengths)


def test_ptx_adds_the_gradient_of_the_texts_likelihood(make_ppo):
    learner = make_ppo()
    (minibatch,) = learner.rollout_buffer.get(None)
    learner._gradient(minibatch)
    without = [p.grad.clone() for p in learner.policy.lm.parameters()]
    texts = ptx_texts(learner)
    learner.ptx = PretrainingMix(texts, 0.7)
    learner.options = replace(
        learner.options, microbatch_tokens=20
    )  # the texts take several passes
    statistics = learner._gradient(minibatch)
    together = [p.grad.clone() for p in learner.policy.lm.parameters()]
    core = learner.policy.core
    learner.policy.optimizer.zero_grad()
    # The minibatch has more tokens than the texts: all are drawn.
    mean = core.log_probs_of(core.states(texts), texts.chosen()).mean()
    (-0.7 * mean).backward()
    assert statistics["ptx_loss"] == pytest.approx(-float(mean.detach()), rel=1e-5)
    added = [both - alone for both, alone in zip(together, without, strict=True)]
    assert_same_gradients(added, [p.grad for p in core.model.parameters()], 1e-3)


def test_ptx_draws_about_as_many_tokens_as_it_is_asked_for(make_ppo):
    learner = make_ppo()
    texts = ptx_texts(learner)
    mix = PretrainingMix(texts, 1.0)
    np.random.seed(0)
    drawn = [mix.draw(10) for _ in range(200)]
    assert all(10 <= int(d.lengths.sum()) <= 10 + 8 for d in drawn)
    firsts = {tuple(d.tokens[0, :3].tolist()) for d in drawn}
    assert len(firsts) == len(texts.tokens)  # each has its turn


def test_ptx_keeps_a_policy_near_its_texts(make_vector_env, tmp_path):
    env = make_vector_env(N)
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(["a b c d", "b c d", "c d a b"] * 4))

    def loss_after(coef: float) -> float:
        env.reset(seed=0)
        options = {"ptx_coef": coef, "ptx_data": str(file) if coef else None}
        torch.manual_seed(0)
        np.random.seed(0)
        learner = ppo.make(ppo.Config(learning_rate=3e-3, **options), env)
        learner.learn(400)
        mix = pretraining_mix(ppo.Config(ptx_coef=1.0, ptx_data=str(file)), env)
        assert mix is not None
        return mix.backward(learner.policy.core, 100, 1000)

    assert loss_after(5.0) < loss_after(0.0) - 0.1


def test_ptx_needs_both_of_its_options(make_vector_env):
    with pytest.raises(InputError, match="ptx_coef and ptx_data"):
        ppo.make(ppo.Config(ptx_coef=1.0), make_vector_env(N))


def test_the_critic_learns_returns_of_its_own_lambda(make_ppo):
    one, both = make_ppo(gae_lambda=0.5), make_ppo(gae_lambda=0.5, critic_lambda=1.0)
    mask = taken(one)
    np.testing.assert_array_equal(mask, taken(both))
    first, second = one.rollout_buffer, both.rollout_buffer
    np.testing.assert_allclose(first.advantages[mask], second.advantages[mask], atol=1e-6)
    # At λ = 1 a return is the sum of the rewards to come, whatever the critic says.
    to_come = second.rewards.reshape(2, 5, N)[:, ::-1].cumsum(1)[:, ::-1].reshape(mask.shape)
    np.testing.assert_allclose(second.returns[mask], to_come[mask], atol=1e-5)
    assert np.abs(first.returns[mask] - to_come[mask]).max() > 1e-2


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize(("tokens", "alone"), [(600, True), (120, False)])
def test_the_critic_learns_alone_at_first_unless_the_training_is_short(
    make_vector_env, make_ppo, monkeypatch, critic, tokens, alone
):
    env = make_vector_env(N)
    env.reset(seed=0)
    options = {"kl_control": "adaptive", "kl_target": 0.5, "kl_old": "exact", "kl_old_coef": 0.1}
    config = ppo.Config(critic_warmup=1, n_epochs=2, critic=critic, target_kl=1.0, **options)
    learner = ppo.make(config, env)
    policy, moved, weights = learner.policy, [], []
    learner.algorithm.ptx = PretrainingMix(ptx_texts(make_ppo(make_vector_env(N))), 0.5)
    before = [p.clone() for p in policy.lm.parameters()]
    train = PPO.train

    def watched(self: PPO) -> None:
        weights.append(self.kl_controller.kl_coef)
        train(self)
        same = all(torch.equal(p, q) for p, q in zip(before, policy.lm.parameters(), strict=True))
        moved.append(not same)
        # Neither Adam's moments nor the gradient's norm have anything of the policy.
        remembered = any(p in policy.optimizer.state for p in policy.lm.parameters())
        assert remembered == (not same)
        assert ("train/policy_loss" in self.logger.name_to_value) == (not same)
        assert policy.critic.head.weight.any()

    monkeypatch.setattr(PPO, "train", watched)
    learner.learn(tokens)
    assert moved[:2] == [not alone, True]
    # A KL of 0, where the policy cannot move, is nothing to steer by.
    assert weights[0] == env.objective.kl_coef
    assert weights[1] != env.objective.kl_coef


def test_a_critic_that_was_taken_over_need_not_be_waited_for(make_vector_env, tmp_path):
    learner = ppo.make(ppo.Config(critic_warmup=3), make_vector_env(N))
    assert learner.algorithm._waits(0)
    learner.save(tmp_path / "policy")
    learner.start_from(tmp_path / "policy")
    assert not learner.algorithm._waits(0)


def test_a_pinned_critic_is_loaded_at_its_commit(make_vector_env, save_reward_model, monkeypatch):
    reward = RewardModel.load(save_reward_model())
    env = make_vector_env(N, reward=reward)
    monkeypatch.setattr(reward.model.config, "_commit_hash", "abc123", raising=False)
    asked = []

    def load(kind, name, **options):
        asked.append((name, options["revision"]))
        return load_pretrained(kind, name)

    monkeypatch.setattr("agents.sb3.policy.critic.load_pretrained", load)
    ppo.make(ppo.Config(), env)
    assert asked == [(reward.model.name_or_path, "abc123")]
