"""The class, `build` and the command line train alike: one dataclass holds the options."""

from dataclasses import fields

import gymnasium
import pytest
import torch
from conftest import PLAIN
from stable_baselines3 import DQN
from stable_baselines3 import PPO as StockPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed

import rlhf_gym  # noqa: F401 (registers the ids)
from agents import dpo, grpo, ppo, reinforce_pp, rloo
from agents.runs import label_samples
from agents.runs.algorithm import load_algorithm
from agents.sb3 import PPO, CausalLMPolicy, PPOOptions, TokenSB3VecEnv, build
from agents.sb3.options import ResponseOptions
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.preferences import write_comparisons


def make_env(env_id: str) -> TokenVectorEnv:
    set_random_seed(0)
    env = gymnasium.make_vec(env_id, num_envs=64, device="cpu").unwrapped
    env.reset(seed=0)
    return env


@pytest.mark.parametrize("env_id", ["rlhf_gym/Exact-v0", "rlhf_gym/Reviews-v0"])
def test_every_door_gives_the_same_weights(env_id):
    weights = []
    for door in ("command", "build", "class"):
        env = make_env(env_id)
        if door == "command":
            learner = ppo.make(ppo.Config(), env)
            learner.learn(3000)
            algorithm = learner.algorithm
        elif door == "build":
            algorithm = build(PPO, env).learn(3000)
        else:
            algorithm = PPO(CausalLMPolicy, TokenSB3VecEnv(env), device="cpu").learn(3000)
        weights.append(algorithm.policy.state_dict())
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weights[0][name]) for name in other)
    start = build(PPO, make_env(env_id)).policy.state_dict()
    assert any(not torch.equal(start[name], weights[0][name]) for name in start), "it has learned"


def test_the_defaults_are_the_documented_ones():
    options = build(PPO, make_env("rlhf_gym/Exact-v0")).options
    assert options == PPOOptions()
    assert vars(ppo.Config()) == vars(PPOOptions())
    assert (options.critic, options.critic_warmup) == ("auto", 2)
    assert (options.value_lr_scale, options.critic_lr_scale) == (14.0, 4.0)


def test_single_options_replace_those_of_a_dataclass():
    env = make_env("rlhf_gym/Exact-v0")
    given = PPOOptions(n_epochs=3, gae_lambda=0.5)
    learner = build(PPO, env, options=given, gae_lambda=0.9, **PLAIN)
    assert (learner.options.n_epochs, learner.options.gae_lambda) == (3, 0.9)
    assert given.gae_lambda == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_waves": 0}, "n_waves must be at least 1, not 0"),
        ({"gae_lambda": 1.5}, "gae_lambda must be from 0 to 1, not 1.5"),
        ({"clip_range": 0.0}, "clip_range must be above 0, not 0.0"),
        ({"clip_range_vf": -0.2}, "clip_range_vf must be above 0, not -0.2"),
        ({"kl_loss": "k4"}, "kl_loss: 'k4' is not one of exact, k2, k3 or None"),
        ({"ptx_coef": 1.0}, "give both, or neither"),
        ({"sample_every": -1}, "sample_every must be 0 or more"),
    ],
)
def test_every_door_refuses_the_same_values(options, message):
    with pytest.raises(InputError, match=message):
        ppo.Config(**options)
    with pytest.raises(InputError, match=message):
        build(PPO, make_env("rlhf_gym/Exact-v0"), **options)


def test_build_names_what_it_does_not_take(tmp_path):
    with pytest.raises(InputError, match=r"no option 'n_epoch'.*n_epochs"):
        build(PPO, make_env("rlhf_gym/Exact-v0"), n_epoch=3)
    with pytest.raises(InputError, match=r"DQN is no on-policy .* agents\.sb3_dqn\.make"):
        build(DQN, make_env("rlhf_gym/Exact-v0"))
    with pytest.raises(InputError, match=r"starts from a model: .*build"):
        StockPPO(CausalLMPolicy, make_vec_env("rlhf_gym/Exact-v0", env_kwargs={"device": "cpu"}))
    learner = build(
        *(PPO, make_env("rlhf_gym/Exact-v0")),
        policy_kwargs={"lora_rank": 2}, tensorboard_log=str(tmp_path), **PLAIN,
    )  # fmt: skip
    assert learner.options.lora_rank == 2
    learner.learn(1)
    assert (tmp_path / "PPO_1").is_dir()


def test_options_of_another_class_are_refused():
    with pytest.raises(
        InputError, match=r"takes options of agents\.sb3\.options\.PPOOptions, not of Resp"
    ):
        build(PPO, make_env("rlhf_gym/Exact-v0"), options=ResponseOptions())


CRITIC_OPTIONS = {
    *("critic", "critic_lr_scale", "value_lr_scale", "gae_lambda", "critic_lambda"),
    *("critic_warmup", "clip_range_vf", "vf_coef"),
}


@pytest.mark.parametrize("module", [rloo, grpo, reinforce_pp])
def test_without_a_critic_there_are_no_options_of_one(module):
    names = {field.name for field in fields(module.Config)}
    assert not names & CRITIC_OPTIONS
    assert {"clip_range", "kl_coef", "samples_per_prompt", "n_minibatches"} <= names
    # Of the options that only some baselines have, each algorithm shows those that act in it.
    scaled = module is not rloo
    assert ("scale_by_std" in names) == scaled


# Read only where another option asks for them.
CONDITIONAL = {
    "kl_target": {"kl_control": "adaptive"},
    "kl_horizon": {"kl_control": "adaptive"},
    "kl_rate": {"kl_control": "lagrangian"},
    "normalize_over": {"normalize_advantage": True},
}
NEED_A_FILE = {"ptx_coef", "ptx_data"}


@pytest.mark.parametrize(
    "name",
    ["trajectory_balance", "online_dpo", "expert_iteration", "dpo", "rloo", "grpo", "reinforce_pp"],
)
def test_an_option_that_is_shown_is_read(name, monkeypatch):
    """No learner without a critic shows an option that its training never looks at."""
    module = load_algorithm(name)
    shown = {field.name for field in fields(module.Config)}
    assert ("sample_every" in shown) == (name != "dpo"), "dpo has no samples of its policy"
    read: set[str] = set()
    plain = object.__getattribute__

    def recorded(self: object, attribute: str) -> object:
        read.add(attribute)
        return plain(self, attribute)

    conditions = [given for option, given in CONDITIONAL.items() if option in shown]
    for given in [{}, *conditions]:
        config = module.Config(**given)
        env = make_env("rlhf_gym/Exact-v0")
        with monkeypatch.context() as patch:
            for kind in (module.Config, PPOOptions):
                patch.setattr(kind, "__getattribute__", recorded, raising=False)
            learner = module.make(config, env)
            learner.learn(1)
    assert shown - NEED_A_FILE <= read


def make_small(**keywords) -> TokenVectorEnv:
    return gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=8, device="cpu", **keywords).unwrapped


def test_a_loaded_algorithm_has_its_options_and_its_new_environment(tmp_path):
    learner = build(PPO, make_small(), n_epochs=3, gae_lambda=0.9, **PLAIN)
    learner.save(tmp_path / "model")
    env = make_small(kl_coef=1.0)
    loaded = PPO.load(tmp_path / "model", env=TokenSB3VecEnv(env), device="cpu")
    assert loaded.options == learner.options
    assert loaded._kl_coef(env) == 1.0, "the environment's β, unless an option names another"
    assert (loaded.gae_lambda, loaded.vf_coef) == (0.9, loaded.options.vf_coef)
    loaded.learn(1)


def test_single_options_replace_those_that_were_saved(tmp_path):
    build(PPO, make_small(), **PLAIN).save(tmp_path / "model")
    loaded = PPO.load(
        *(tmp_path / "model", TokenSB3VecEnv(make_small())),
        device="cpu", n_epochs=7, n_waves=3, learning_rate=1e-2, max_grad_norm=0.5,
    )  # fmt: skip
    assert (loaded.options.n_epochs, loaded.options.n_waves) == (7, 3)
    assert loaded.max_grad_norm == 0.5
    assert loaded.lr_schedule(1.0) == pytest.approx(1e-2)
    loaded.learn(1)
    with pytest.raises(InputError, match="n_epochs must be at least 1"):
        PPO.load(tmp_path / "model", TokenSB3VecEnv(make_small()), device="cpu", n_epochs=0)


def test_custom_objects_that_are_options_replace_them_too(tmp_path):
    build(PPO, make_small(), **PLAIN).save(tmp_path / "model")
    loaded = PPO.load(
        tmp_path / "model", device="cpu", custom_objects={"learning_rate": 2e-5, "n_epochs": 3}
    )
    assert (loaded.options.learning_rate, loaded.options.n_epochs) == (2e-5, 3)
    assert loaded.lr_schedule(1.0) == pytest.approx(2e-5)
    assert loaded.learning_rate == 2e-5


def test_a_new_environment_is_adopted(tmp_path):
    config = rloo.Config(samples_per_prompt=4, n_minibatches=1)
    rloo.make(config, make_small()).algorithm.save(tmp_path / "model")
    loaded, env = PPO.load(tmp_path / "model", device="cpu"), make_small(kl_coef=2.0)
    loaded.set_env(TokenSB3VecEnv(env))
    assert env.rows_per_prompt == 4
    assert loaded._kl_coef(env) == 2.0
    loaded.learn(1)


def test_a_critic_that_was_loaded_needs_no_reward_model(tmp_path):
    learner = build(PPO, make_env("rlhf_gym/Reviews-v0"), critic="reward_model")
    learner.save(tmp_path / "model")
    env = gymnasium.make_vec(
        "rlhf_gym/Reviews-v0", num_envs=8, reward_model="rlhf_gym.rewards.human:compound"
    ).unwrapped
    PPO.load(tmp_path / "model", env=TokenSB3VecEnv(env), device="cpu")


def test_adapters_may_be_asked_for_either_way():
    one = build(PPO, make_small(), lora_rank=2)
    other = build(PPO, make_small(), policy_options={"lora_rank": 2})
    assert one.options == other.options
    assert one.policy.critic.shared and other.policy.critic.shared


def test_an_optimiser_of_ones_own_keeps_the_epsilon():
    learner = build(
        *(PPO, make_small()),
        adam_eps=1e-3,
        policy_options={"optimizer_kwargs": {"betas": (0.5, 0.9)}},
        **PLAIN,
    )
    (group, *_) = learner.policy.optimizer.param_groups
    assert (group["eps"], group["betas"]) == (1e-3, (0.5, 0.9))


def test_offline_dpo_learns_on_after_loading(tmp_path):
    file = tmp_path / "comparisons.jsonl"
    write_comparisons(file, label_samples(make_small(), 32, progress=False))
    learner = dpo.make(dpo.Config(data=str(file), n_minibatches=1), make_small()).algorithm
    learner.save(tmp_path / "model")
    env = TokenSB3VecEnv(make_small())
    loaded = dpo.OfflineDPO.load(tmp_path / "model", env=env, device="cpu")
    assert loaded.pairs == learner.pairs
    loaded.learn(1)
