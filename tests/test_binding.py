"""Whoever acts is paid by its own log-probs, whichever door of Stable-Baselines3 it came in by.

Each test compares what is paid with the J or KL of the same policy, which Exact-v0 knows exactly.
"""

import copy
import gc
import logging
import pickle
import subprocess
import sys
import threading
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import PLAIN
from stable_baselines3 import DQN
from stable_baselines3 import PPO as StockPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize

from agents import sb3_dqn
from agents.sb3 import PPO, CausalLMPolicy, TokenSB3VecEnv, build
from agents.sb3.policy import causal_lm_policy
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.envs import actor as acting
from rlhf_gym.envs.acts import announce
from rlhf_gym.errors import InputError
from rlhf_gym.objective.enumeration import Enumeration, Table, Value

EXACT = "rlhf_gym/Exact-v0"
N = 16

pytestmark = pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")


def make_env(num_envs: int = N, **keywords: Any) -> TokenVectorEnv:
    return gymnasium.make_vec(EXACT, num_envs=num_envs, device="cpu", **keywords).unwrapped


def make(algorithm: Any, env: Any) -> Any:
    if algorithm is PPO:
        return build(PPO, env, **PLAIN)
    return build(StockPPO, env, n_steps=8, batch_size=64, n_epochs=1)


def moved(learner: Any) -> Any:
    """The learner, away from the reference, so that its KL is clearly above 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in learner.policy.lm.parameters():
            p += 2.5 * p.std() * torch.randn_like(p) if p.ndim > 1 else 0
    return learner


def exact(policy: CausalLMPolicy, greedy: bool = False) -> Value:
    env = make_env(1)
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    table: Table = task.log_probs(policy.core)
    if greedy:
        table = [np.where(p == p.max(2, keepdims=True), 0.0, -np.inf) for p in table]
    return task.value(table)


def assert_near(samples: Any, wanted: float) -> None:
    """The mean of samples is within four of its standard errors of a value."""
    error = np.std(samples) / np.sqrt(len(samples))
    assert abs(np.mean(samples) - wanted) < 4 * error + 1e-4


def seeded(env: Any) -> Any:
    """The environment with its next prompts fixed, so that the test says the same each time."""
    if isinstance(env, gymnasium.Env):
        env.reset(seed=0)
    else:
        env.seed(0)
    return env


DOORS = {
    "get_env": (lambda learner: learner.get_env(), 320),
    "adapter": (lambda _: TokenSB3VecEnv(make_env()), 320),
    "make_vec_env": (lambda _: make_vec_env(EXACT, 4, env_kwargs={"device": "cpu"}), 160),
    "make": (lambda _: gymnasium.make(EXACT, device="cpu"), 100),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("algorithm", [PPO, StockPPO])
def test_evaluate_policy_pays_j(algorithm, door):
    learner = moved(make(algorithm, make_env()))
    wanted, (env, episodes) = exact(learner.policy), DOORS[door]
    rewards, _ = evaluate_policy(
        *(learner, seeded(env(learner))),
        n_eval_episodes=episodes, deterministic=False, return_episode_rewards=True,
    )  # fmt: skip
    assert_near(rewards, wanted.objective.mean())
    beta = make_env(1).objective.kl_coef
    with pytest.raises(AssertionError):  # were it not bound, or bound to the reference
        assert_near(rewards, wanted.objective.mean() + beta * wanted.kl.mean())


def test_the_greedy_policy_is_paid_its_own_j(caplog):
    learner = moved(make(PPO, make_env()))
    causal_lm_policy.warn_of_greedy.cache_clear()
    with caplog.at_level(logging.WARNING):
        rewards, _ = evaluate_policy(
            learner, seeded(TokenSB3VecEnv(make_env())), 400, return_episode_rewards=True
        )
    assert "greedy policy acts" in caplog.text
    wanted = exact(learner.policy, greedy=True)
    assert_near(rewards, wanted.objective.mean())
    assert abs(wanted.objective.mean() - exact(learner.policy).objective.mean()) > 0.1


def kl_paid(model: Any, env: TokenVectorEnv) -> list[float]:
    """KL sums of the episodes of a training that changes nothing, checked against the rewards."""
    model.learning_rate = 0.0
    if algorithm_has_options := isinstance(model, PPO):
        model.options = type(model.options)(**{**vars(model.options), "learning_rate": 0.0})
    model._setup_lr_schedule()
    assert algorithm_has_options or model.lr_schedule(1.0) == 0.0
    found: list[float] = []

    def keep(local: dict[str, Any], _: Any) -> bool:
        for i in np.flatnonzero(local["dones"]):
            info = local["infos"][i]
            wanted = info["score"] - env.objective.kl_coef * info["kl_sum"]
            assert info["episode"]["r"] == pytest.approx(wanted, abs=1e-4)
            found.append(info["kl_sum"])
        return True

    model.learn(600, callback=keep)
    return found


@pytest.mark.parametrize("occupied", [False, True], ids=["new", "occupied"])
@pytest.mark.parametrize("way", ["load", "set_env"])
@pytest.mark.parametrize("algorithm", [PPO, StockPPO])
def test_a_loaded_model_is_paid_by_its_own_log_probs(algorithm, way, occupied, tmp_path):
    env = make_env()
    older = make(algorithm, env)  # stays bound to it until another acts there
    moved(make(algorithm, make_env())).save(tmp_path / "model")
    rows = TokenSB3VecEnv(env if occupied else make_env())
    first = rows if way == "load" else TokenSB3VecEnv(make_env())
    model = algorithm.load(tmp_path / "model", env=first, device="cpu")
    if way == "set_env":
        model.set_env(rows)
    wanted = exact(model.policy).kl.mean()
    assert_near(kl_paid(model, rows.token_env), wanted)
    assert wanted > 0.3
    assert rows.token_env.actor is model.policy
    assert older.policy is not model.policy


def test_a_q_network_acts_in_an_environment_of_an_older_model():
    env = make_env()
    older = moved(make(PPO, env))
    learner = sb3_dqn.make(sb3_dqn.Config(learning_starts=0), env)
    paid: list[tuple[float, float]] = []

    def keep(local: dict[str, Any], _: Any) -> bool:
        for reward, info in zip(local["rewards"], local["infos"], strict=True):
            owed = env.objective.kl_coef * info["ref_log_prob"] + info.get("score", 0.0)
            paid.append((float(reward), owed))
        return True

    learner.algorithm.exploration_initial_eps = 0.5
    learner.algorithm.learn(160, callback=keep)
    ours, owed = np.array(paid).T
    np.testing.assert_allclose(ours, owed, atol=1e-5)
    assert older.policy is not env.actor


def test_a_policy_binds_itself_on_reset_after_another_has_acted():
    env = make_env()
    one, other = moved(make(PPO, env)), moved(make(PPO, make_env()))
    for learner in (one, other, one):
        observations, _ = env.reset(seed=0)
        actions, _ = learner.predict(observations)
        env.step(actions)
        assert env.actor is learner.policy


def test_actions_that_were_exchanged_on_the_way_are_still_the_policys():
    env, learner = make_env(stop_at_eos=False), moved(make(PPO, make_env()))
    observations, _ = env.reset(seed=0)
    learner.predict(observations)
    others = np.arange(N) % 8
    infos = env.step(others)[4]
    log_probs = learner.policy.log_prob(observations, others)
    np.testing.assert_allclose(infos["kl"] + infos["ref_log_prob"], log_probs, atol=1e-5)


def test_what_was_chosen_before_the_present_observations_counts_no_more():
    env, learner = make_env(), make(PPO, make_env())
    observations, _ = env.reset(seed=0)
    actions, _ = learner.predict(observations)
    env.reset(seed=0)  # the same prompts, but nobody has acted since
    assert not env.step(actions)[4]["actor_bound"].any()


class Sure:
    """An actor that gives each action the same log-prob, and does not announce by itself."""

    def __init__(self, log_prob: float = 0.0) -> None:
        self._log_prob = log_prob

    def log_prob(self, observations: Any, actions: Any) -> Any:
        return np.full(len(actions), self._log_prob, dtype=np.float32)


def log_prob_paid(infos: dict[str, Any]) -> Any:
    return infos["kl"] + infos["ref_log_prob"]


def test_two_policies_that_act_alike_are_told_apart_or_refused():
    env, sure, torn = make_env(stop_at_eos=False), Sure(), Sure(-1.0)
    observations, _ = env.reset(seed=0)
    actions = np.zeros(N, dtype=np.int64)
    for actor in (sure, torn):
        announce(actor, observations, actions, actor.log_prob(observations, actions))
    with pytest.raises(InputError, match=r"2 policies have acted.*bind_actor"):
        env.step(actions)
    env.bind_actor(torn)
    np.testing.assert_allclose(log_prob_paid(env.step(actions)[4]), -1.0)


def test_actions_changed_in_place_are_paid_as_they_are_taken():
    env, learner = make_env(stop_at_eos=False), moved(make(PPO, make_env()))
    observations, _ = env.reset(seed=0)
    actions, _ = learner.predict(observations)
    actions[:] = (actions + 1) % 8
    wanted = learner.policy.log_prob(observations, actions)
    np.testing.assert_allclose(log_prob_paid(env.step(actions)[4]), wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, N])
def test_an_act_may_come_in_parts_and_with_other_padding(rows):
    env, learner = make_env(stop_at_eos=False), moved(make(PPO, make_env()))
    observations, _ = env.reset(seed=0)
    wide = np.pad(observations, ((0, 0), (0, 2)), constant_values=-1)
    learner.policy.set_training_mode(False)
    with torch.no_grad():
        pieces = torch.from_numpy(wide).split(rows)
        parts = [learner.policy(piece)[0].numpy() for piece in pieces]
    infos = env.step(actions := np.concatenate(parts))[4]
    assert infos["actor_bound"].all()
    wanted = learner.policy.log_prob(observations, actions)
    np.testing.assert_allclose(log_prob_paid(infos), wanted, atol=1e-5)


def test_many_environments_may_be_predicted_first_and_stepped_then():
    envs = [gymnasium.make(EXACT, device="cpu", stop_at_eos=False) for _ in range(20)]
    learner = moved(make(PPO, make_env()))
    seen = [env.reset(seed=i)[0] for i, env in enumerate(envs)]
    actions = [learner.predict(row)[0] for row in seen]
    infos = [env.step(action)[4] for env, action in zip(envs, actions, strict=True)]
    assert all(info["actor_bound"] for info in infos)


def test_an_actor_bound_by_name_stays_while_others_look_on(caplog):
    env, learner, own = make_env(stop_at_eos=False), moved(make(PPO, make_env())), Sure(-1.5)
    env.bind_actor(own)
    observations, _ = env.reset(seed=0)
    for shift in (1, 0):  # other tokens than the spectator's, and the same
        actions = (learner.predict(observations)[0] + shift) % 9
        observations, *_, infos = env.step(actions)
        np.testing.assert_allclose(log_prob_paid(infos), -1.5, atol=1e-5)
        assert env.actor is own
    assert "a policy acts here, but a Sure was bound by name" in caplog.text


def test_nobody_bound_by_name_stays_nobody(caplog):
    env, learner = make_env(stop_at_eos=False), moved(make(PPO, make_env()))
    env.bind_actor(None)
    observations, _ = env.reset(seed=0)
    rewards, *_, infos = env.step(learner.predict(observations)[0])[1:]
    beta = env.objective.kl_coef
    np.testing.assert_allclose(rewards, beta * infos["ref_log_prob"], atol=1e-5)
    assert "nobody was bound by name" in caplog.text
    assert caplog.text.count("the agent owes") == 1


def test_nobody_known_to_act_is_said_once(caplog):
    acting._said.clear()
    for _ in range(2):
        env = make_env()
        env.reset(seed=0)
        env.step(np.zeros(N, dtype=np.int64))
    assert caplog.text.count("nobody is known to act in this environment") == 1


def test_an_act_on_other_observations_is_said(caplog):
    env, learner = make_env(), make(PPO, make_env())
    env.reset(seed=0)
    learner.predict(np.full((N, 5), 3))
    env.step(np.zeros(N, dtype=np.int64))
    assert "has acted since this environment gave out its observations, but not on" in caplog.text


def test_a_loaded_q_network_explores_in_an_occupied_environment(tmp_path):
    env = make_env(stop_at_eos=False)
    learner = sb3_dqn.make(sb3_dqn.Config(), make_env(stop_at_eos=False)).algorithm
    learner.save(tmp_path / "q")
    older = moved(make(PPO, env))
    model = DQN.load(tmp_path / "q", env=TokenSB3VecEnv(env), device="cpu")
    paid: list[float] = []

    def keep(local: dict[str, Any], _: Any) -> bool:
        paid.extend(info["kl"] + info["ref_log_prob"] for info in local["infos"])
        return True

    model.learning_starts = 10**6  # random tokens alone
    model.learn(5 * N, callback=keep)
    np.testing.assert_allclose(paid, 0.0, atol=1e-5)
    assert older.policy is not env.actor


def test_threads_may_announce_at_once():
    env, learner, stop = make_env(stop_at_eos=False), make(PPO, make_env()), threading.Event()

    def others() -> None:
        rows = np.zeros((4, 5), dtype=np.int64)
        while not stop.is_set():
            announce(Sure(), rows, rows[:, 0], np.zeros(4, dtype=np.float32))

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(20):
            observations, _ = env.reset(seed=0)
            assert env.step(learner.predict(observations)[0])[4]["actor_bound"].all()
    finally:
        stop.set()
        thread.join()


def test_an_episode_that_began_unbound_has_no_sum():
    env, learner = make_env(1), make(PPO, make_env())
    observations, _ = env.reset(seed=0)
    observations, *_, infos = env.step(np.array([0]))
    assert not infos["actor_bound"].any()
    while "final_info" not in infos:
        actions, _ = learner.predict(observations)
        observations, *_, infos = env.step(actions)
    assert infos["final_info"]["actor_bound"].all()
    assert not infos["final_info"].get("_kl_sum", np.zeros(1)).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_is_bound_by_acting_and_not_by_name(copied):
    env = make_env(stop_at_eos=False)
    learner = moved(make(PPO, env))
    learner.predict(env.reset(seed=0)[0])  # it has acted
    policy = copied(learner.policy)
    with pytest.raises(InputError, match=r"a copy .* that has not acted"):
        env.bind_actor(policy)
    observations, _ = env.reset(seed=0)
    actions, _ = policy.predict(observations)
    infos = env.step(actions)[4]
    np.testing.assert_allclose(
        infos["kl"] + infos["ref_log_prob"], policy.log_prob(observations, actions), atol=1e-5
    )
    assert env.actor is policy
    env.bind_actor(policy)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's, of the worker that ends
def test_a_copy_in_another_process_is_refused():
    learner = make(PPO, make_env())
    env = gymnasium.vector.AsyncVectorEnv([lambda: gymnasium.make(EXACT, device="cpu")])
    try:
        with pytest.raises(InputError, match="is a copy"):
            env.call("bind_actor", learner.policy)
    finally:
        env.close(terminate=True)


def test_environments_of_other_processes_are_refused():
    rows = SubprocVecEnv([lambda: gymnasium.make(EXACT, device="cpu")], start_method="fork")
    try:
        for algorithm in (PPO, StockPPO):
            with pytest.raises(InputError, match="SubprocVecEnv has its environments in other"):
                make(algorithm, rows)
    finally:
        rows.close()


def test_a_worker_says_that_it_pays_the_known_half():
    code = f"""
import gymnasium, rlhf_gym
if __name__ == "__main__":
    make = lambda: gymnasium.make("{EXACT}", device="cpu")
    env = gymnasium.vector.AsyncVectorEnv([make, make], context="fork")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.step(env.action_space.sample())
    env.close()
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr.count("nobody is known to act") == 2, "once per process"


def test_wrappers_that_change_observations_are_refused_by_the_policy():
    env = make_env()
    with pytest.raises(InputError, match="VecNormalize"):
        build(StockPPO, VecNormalize(TokenSB3VecEnv(env)), n_steps=8).learn(N * 8)
    with pytest.raises(InputError, match="VecFrameStack"):
        build(StockPPO, VecFrameStack(TokenSB3VecEnv(env), 2), n_steps=8).learn(N * 8)
    learner = make(StockPPO, make_env())
    with pytest.raises(InputError, match="are float32"):
        learner.policy.forward(torch.zeros(2, 5))


def test_an_act_is_forgotten_with_its_actor():
    env, learner = make_env(), make(PPO, make_env())
    observations, _ = env.reset(seed=0)
    actions, _ = learner.predict(observations)
    del learner
    gc.collect()
    assert not env.step(actions)[4]["actor_bound"].any()
