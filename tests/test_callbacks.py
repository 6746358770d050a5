"""Callbacks and wrappers see a rollout of whole responses as Stable-Baselines3 promises it."""

import csv
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import PLAIN
from stable_baselines3 import PPO as StockPPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)

from agents import sb3_dqn
from agents.sb3 import PPO, OptimalityEvalCallback, TokenSB3VecEnv, build
from agents.sb3.rollout.collection import Wave
from agents.sb3.rollout.steps import batch_steps
from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.tokens import PAD, row_lengths

EXACT = "rlhf_gym/Exact-v0"
N, TOTAL = 16, 640


def make_env(**keywords: Any) -> TokenVectorEnv:
    return gymnasium.make_vec(EXACT, num_envs=N, device="cpu", **keywords).unwrapped


def make_rows(**keywords: Any) -> TokenSB3VecEnv:
    return TokenSB3VecEnv(make_env(**keywords))


def flagship(env: Any) -> PPO:
    return build(PPO, env, **PLAIN)


class Ledger(BaseCallback):
    """Adds up what it sees, and checks each step against the contract."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.tokens, self.paid = 0, 0, 0.0
        self.episodes: list[dict[str, Any]] = []
        self.kl_sums: list[float] = []

    def _on_step(self) -> bool:
        rewards, dones, infos = (self.locals[key] for key in ("rewards", "dones", "infos"))
        assert isinstance(infos, list)
        assert rewards.shape == dones.shape == (N,) == (len(infos),)
        assert self.locals["new_obs"] in self.training_env_space
        self.steps += 1
        self.paid += float(rewards.sum())
        self.tokens = self.num_timesteps
        for done, info in zip(dones, infos, strict=True):
            assert ("episode" in info) == done
            if done:
                assert row_lengths(info["terminal_observation"][None])[0] > 1
                self.episodes.append(info["episode"])
                beta = 0.4
                wanted = info["score"] - beta * info["kl_sum"]
                assert info["episode"]["r"] == pytest.approx(wanted, abs=1e-4)
                assert set(info["episode"]) >= {"r", "l", "t"}
        return True

    def _on_training_start(self) -> None:
        space = self.training_env.observation_space
        self.training_env_space = gymnasium.vector.utils.batch_space(space, N)


def test_a_rollout_of_whole_responses_keeps_the_contract():
    ledger, learner = Ledger(), flagship(make_rows())
    learner.learn(TOTAL, callback=ledger)
    assert ledger.tokens == learner.num_timesteps
    assert sum(e["l"] for e in ledger.episodes) == learner.num_timesteps
    assert ledger.paid == pytest.approx(sum(e["r"] for e in ledger.episodes), abs=1e-3)
    assert len(ledger.episodes) == learner.token_env.episodes
    # One step for every N tokens, as if each row acted in each: what n_calls and bars count.
    assert abs(ledger.steps * N - learner.num_timesteps) < N
    assert learner.ep_info_buffer is not None
    assert list(learner.ep_info_buffer) == ledger.episodes[-100:]


def test_with_equal_lengths_a_step_is_one_token_of_every_row():
    ledger, learner = Ledger(), flagship(make_rows(stop_at_eos=False))
    learner.learn(N * 8, callback=ledger)
    assert ledger.steps == 8
    assert {e["l"] for e in ledger.episodes} == {4}


def wave_of(lengths: list[int]) -> Wave:
    t = max(lengths)
    lens = np.array(lengths)
    actions = np.where(np.arange(t) < lens[:, None], 5, PAD)
    before = np.full((len(lengths), t + 2), PAD)
    before[:, 0] = np.arange(len(lengths))
    following = before.copy()
    following[:, 0] = 9
    grid = np.where(actions != PAD, 0.5, 0.0)
    infos = {"ref_log_prob": -grid, "kl": grid, "score": lens * 1.0, "kl_sum": grid.sum(1)}
    return Wave(infos, before, actions, grid, following)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 2], [1, 1, 1], [1, 1, 9], [7, 2, 5]])
@pytest.mark.parametrize("before", [0, 1, 2, 100])
def test_steps_cover_a_wave_once(lengths, before):
    wave, n = wave_of(lengths), len(lengths)
    steps = list(batch_steps(wave, before, 0.0))
    assert len(steps) == (before + sum(lengths)) // n - before // n
    assert sum(s.n_tokens for s in steps) == sum(lengths)
    assert sum(s.taken for s in steps).tolist() == lengths
    np.testing.assert_allclose(sum(s.rewards for s in steps), 0.5 * np.array(lengths))
    assert (sum(s.dones.astype(int) for s in steps) == 1).all()
    assert all(s.n_tokens > 0 for s in steps)
    for step in steps:
        for i in np.flatnonzero(step.dones):
            assert step.infos[i]["episode"]["l"] == lengths[i]
            assert step.infos[i]["terminal_observation"].tolist()[: lengths[i] + 1] == [
                i,
                *[5] * lengths[i],
            ]
            assert step.observations[i, 0] == 9, "the next prompt, as after auto-reset"
    np.testing.assert_array_equal(steps[-1].observations, wave.observations)


def test_what_counts_steps_fires_as_with_the_stock_algorithm(tmp_path):
    for name in ("ours", "theirs"):
        learner = (
            flagship(make_rows())
            if name == "ours"
            else build(StockPPO, make_rows(), n_steps=4, batch_size=64, n_epochs=1)
        )
        learner.learn(TOTAL, callback=CheckpointCallback(100 // N, str(tmp_path / name)))
        learner.learn(1, callback=Ledger(), reset_num_timesteps=False)
    ours, theirs = (
        sorted(int(p.stem.split("_")[-2]) for p in (tmp_path / name).iterdir())
        for name in ("ours", "theirs")
    )
    assert len(theirs) == 6
    assert len(ours) in (6, 7), "the last rollout may end later"
    np.testing.assert_allclose(ours[:6], theirs, atol=2 * N)


def test_training_stops_at_a_number_of_episodes():
    learner, stop = flagship(make_rows()), StopTrainingOnMaxEpisodes(3)
    learner.learn(10 * TOTAL, callback=stop)
    assert 3 * N <= stop.n_episodes < 4 * N
    assert learner.num_timesteps < TOTAL


def test_every_n_timesteps_and_the_progress_bar(monkeypatch):
    class Bar:
        def __init__(self, total: int) -> None:
            self.total, self.n = total, 0

        def update(self, n: int) -> None:
            self.n += n

        def refresh(self) -> None:
            pass

        close = refresh

    monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", Bar)

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            return True

    count, learner, bar = Count(), flagship(make_rows()), ProgressBarCallback()
    learner.learn(TOTAL, callback=[EveryNTimesteps(100, count), bar])
    assert count.n_calls in (learner.num_timesteps // 100, learner.num_timesteps // 100 - 1)
    assert abs(bar.pbar.n - learner.num_timesteps) < N


def test_eval_callback_sees_j_and_training_goes_on(tmp_path):
    learner = flagship(make_rows())
    evaluation = EvalCallback(
        *(make_rows(), None, None),
        n_eval_episodes=320,
        eval_freq=TOTAL // N // 2,
        deterministic=False,
        best_model_save_path=str(tmp_path),
        verbose=0,
        warn=False,
    )
    learner.learn(TOTAL, callback=evaluation)
    env = make_env()
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=4)
    best = PPO.load(tmp_path / "best_model", device="cpu")
    wanted = task.value(task.log_probs(best.policy.core)).objective.mean()
    assert abs(evaluation.best_mean_reward - wanted) < 4 * 1.2 / np.sqrt(320)


def test_evaluating_on_the_training_environment_does_no_harm():
    rows = make_rows()
    learner, ledger = flagship(rows), Ledger()
    evaluation = EvalCallback(rows, n_eval_episodes=8, eval_freq=3, verbose=0, warn=False)
    learner.learn(TOTAL, callback=[ledger, evaluation])
    assert sum(e["l"] for e in ledger.episodes) == learner.num_timesteps
    learner.learn(N, callback=ledger, reset_num_timesteps=False)


def test_a_training_that_was_stopped_in_a_wave_goes_on_with_whole_episodes(tmp_path):
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 2

    rows = VecMonitor(make_rows(), str(tmp_path / "log"))
    learner = flagship(rows)
    learner.learn(TOTAL, callback=Stop())
    stopped = learner.num_timesteps
    learner.learn(TOTAL, reset_num_timesteps=False)
    evaluate_policy(learner, rows, n_eval_episodes=3, deterministic=False)  # stops midway, too
    learner.learn(N, reset_num_timesteps=False)
    rows.close()
    assert stopped == 2 * N or stopped < TOTAL // 4
    lines = (tmp_path / "log.monitor.csv").read_text().splitlines()[1:]
    lengths = [int(row["l"]) for row in csv.DictReader(lines)]
    assert max(lengths) == 4


# Wrappers


def test_a_monitor_around_the_rows_records_every_episode(tmp_path):
    rows = VecCheckNan(VecMonitor(make_rows(), str(tmp_path / "log"), info_keywords=("score",)))
    learner, ledger = flagship(rows), Ledger()
    learner.learn(TOTAL, callback=ledger)
    rows.close()
    lines = (tmp_path / "log.monitor.csv").read_text().splitlines()[1:]
    recorded = list(csv.DictReader(lines))
    assert len(recorded) == len(ledger.episodes) == learner.token_env.episodes > 100
    for row, episode in zip(recorded, ledger.episodes, strict=True):
        assert int(row["l"]) == episode["l"]
        assert float(row["r"]) == pytest.approx(float(episode["r"]), abs=1e-4)
        assert float(row["score"])
    assert sum(int(row["l"]) for row in recorded) == learner.num_timesteps


def test_an_evaluation_can_be_filmed(tmp_path):
    learner = flagship(make_rows())
    filmed = VecVideoRecorder(
        make_rows(render_mode="rgb_array"), str(tmp_path), lambda step: step == 0, video_length=4
    )
    with pytest.raises(InputError, match=r"VecVideoRecorder .* film an evaluation"):
        flagship(filmed)
    evaluate_policy(learner, filmed, n_eval_episodes=N, deterministic=False, warn=False)
    filmed.close()
    (file,) = tmp_path.glob("*.mp4")
    assert file.stat().st_size > 1000


class PaysNothing(VecEnvWrapper):
    """A user's own wrapper."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, 0 * rewards, dones, infos


class OwnMonitor(VecMonitor):
    """It may change anything."""


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda env: VecNormalize(env, norm_obs=False), "VecNormalize .* whiten_rewards"),
        (lambda env: VecNormalize(env, norm_reward=False), "VecNormalize"),
        (lambda env: VecFrameStack(env, 2), "VecFrameStack"),
        (PaysNothing, "PaysNothing .*shaping, token_rewards"),
        (lambda env: VecMonitor(PaysNothing(env)), "PaysNothing"),
        (OwnMonitor, "OwnMonitor"),
    ],
)
def test_a_layer_that_would_be_skipped_is_refused(wrap, said, tmp_path):
    with pytest.raises(InputError, match=said):
        flagship(wrap(make_rows()))
    learner = flagship(make_rows())
    with pytest.raises(InputError, match=said):
        learner.set_env(wrap(make_rows()))
    learner.save(tmp_path / "model")
    with pytest.raises(InputError, match=said):
        PPO.load(tmp_path / "model", env=wrap(make_rows()), device="cpu")


def free(kind: type) -> type:
    """A class of `kind` whose steps pay nothing."""

    def step(self: Any, actions: Any) -> Any:
        observations, rewards, *rest = kind.step(self, actions)  # type: ignore[attr-defined]
        return (observations, 0 * rewards, *rest)

    return type(f"Free{kind.__name__}", (kind,), {"step": step})


def test_a_class_with_steps_of_its_own_is_refused():
    env = make_env()
    options = {"num_envs": N, "max_new_tokens": 4}
    with pytest.raises(InputError, match="FreeTokenVectorEnv"):
        flagship(free(TokenVectorEnv)(env.objective, env.prompts, **options))
    single = free(TokenEnv)(env.objective, env.prompts, max_new_tokens=4)
    with pytest.raises(InputError, match="FreeTokenEnv"):
        flagship(single)
    with pytest.raises(InputError, match="FreeTokenSB3VecEnv"):
        flagship(free(TokenSB3VecEnv)(env))


def test_a_wrapper_of_the_users_stays_around_its_own_environment():
    rows = VecMonitor(DummyVecEnv([lambda: gymnasium.make(EXACT, device="cpu")] * N))
    stock = build(StockPPO, rows, n_steps=4, batch_size=64, n_epochs=1).learn(4 * N)
    ours = flagship(rows).learn(4 * N)
    stock.learn(4 * N, reset_num_timesteps=False)
    assert isinstance(rows.venv, DummyVecEnv)
    assert isinstance(ours.get_env().unwrapped, TokenSB3VecEnv)


def test_reset_options_reach_the_rows_once():
    rows = make_rows()
    rows.set_options([{"prompt_index": i % 8} for i in range(N)])
    assert rows.reset()[:, 0].tolist() == [i % 8 for i in range(N)]
    rows.seed(0)
    assert rows.reset()[:, 0].tolist() != [i % 8 for i in range(N)]
    rows.set_options([{"prompt_index": 0}, *({} for _ in range(N - 1))])
    with pytest.raises(InputError, match="same reset options"):
        rows.reset()


def test_a_wrapper_acts_where_the_algorithm_steps():
    learner = build(StockPPO, PaysNothing(make_rows()), n_steps=4, batch_size=64, n_epochs=1)
    learner.learn(N * 4)
    assert not learner.rollout_buffer.rewards.any()


def test_whatever_stable_baselines_takes_becomes_rows():
    keywords = {"device": "cpu", "kl_coef": 0.7}
    single = gymnasium.make(EXACT, **keywords)
    for env, n in (
        (single, 1),
        (Monitor(single), 1),
        (make_vec_env(EXACT, 3, seed=5, env_kwargs=keywords), 3),
        (VecMonitor(DummyVecEnv([lambda: gymnasium.make(EXACT, **keywords)] * 2)), 2),
        (gymnasium.make_vec(EXACT, num_envs=4, **keywords), 4),
    ):
        learner = flagship(env)
        assert (learner.n_envs, learner.token_env.num_envs) == (n, n)
        assert learner.token_env.objective.kl_coef == 0.7
        learner.learn(1)
    assert isinstance(build(PPO, EXACT, **PLAIN).get_env(), TokenSB3VecEnv)
    seeded = flagship(make_vec_env(EXACT, 3, seed=5, env_kwargs=keywords)).get_env()
    assert isinstance(seeded, VecEnv)
    again = make_vec_env(EXACT, 3, seed=5, env_kwargs=keywords)
    np.testing.assert_array_equal(seeded.reset(), again.reset())


def test_rows_that_cannot_play_whole_responses_are_refused(tmp_path):
    def make(**keywords: Any) -> gymnasium.Env[Any, Any]:
        return gymnasium.make(EXACT, device="cpu", **keywords)

    to_file = Monitor(make(), str(tmp_path / "m"))
    for env, said in (
        (gymnasium.wrappers.TransformReward(make(), lambda r: r), "TransformReward"),
        (to_file, "VecMonitor"),
        (DummyVecEnv([make, lambda: make(kl_coef=2.0)]), "one id with the same"),
        (gymnasium.make("CartPole-v1"), "CartPole"),
    ):
        with pytest.raises(InputError, match=said):
            build(PPO, env, **PLAIN)
    to_file.close()


# J and optimality in the log


@pytest.mark.parametrize("algorithm", ["flagship", "stock", "dqn"])
def test_optimality_in_the_log_of_any_algorithm(algorithm, tmp_path):
    env = make_env()
    if algorithm == "dqn":
        learner: Any = sb3_dqn.make(sb3_dqn.Config(learning_starts=0), env).algorithm
    elif algorithm == "stock":
        learner = build(StockPPO, env, n_steps=8, batch_size=64, n_epochs=1, learning_rate=1e-2)
    else:
        learner = flagship(env)
    callback = OptimalityEvalCallback(
        make_env(), every=200, best_model_save_path=tmp_path, log_path=tmp_path
    )
    learner.learn(TOTAL, callback=callback)
    rows = callback.evaluations
    tokens = [row["tokens"] for row in rows]
    assert (tokens[0], tokens[-1]) == (0, learner.num_timesteps)
    assert len(rows) in (4, 5, 6)
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=4)
    if algorithm != "dqn":
        now = task.value(task.log_probs(learner.policy.core))
        assert rows[-1]["objective"] == pytest.approx(now.objective.mean(), abs=1e-5)
        assert rows[-1]["kl"] == pytest.approx(now.kl.mean(), abs=1e-5)
        assert rows[-1]["optimality"] == pytest.approx(task.optimality(now.objective), abs=1e-5)
        assert rows[0]["optimality"] == pytest.approx(0, abs=1e-5)
    else:
        assert rows[-1]["objective"] <= task.best_deterministic.objective.mean() + 1e-3
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == len(rows)
    best = type(learner).load(tmp_path / "best_model", device="cpu")
    after = OptimalityEvalCallback(make_env())
    after.init_callback(best)
    best.set_logger(learner.logger)
    after._on_training_start()
    found = max(row["objective"] for row in rows)
    assert after.evaluations[0]["objective"] == pytest.approx(found, abs=1e-5)


def test_the_callback_changes_no_training():
    weights = []
    for callback in (None, OptimalityEvalCallback(make_env(), every=100)):
        learner = build(PPO, make_env(), seed=0, **PLAIN)
        learner.learn(300, callback=callback)
        weights.append(learner.policy.state_dict())
    assert all((weights[0][k] == v).all() for k, v in weights[1].items())


def test_the_callback_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match="is no environment"):
        OptimalityEvalCallback("rlhf_gym/Exact-v0")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="every must be at least 1"):
        OptimalityEvalCallback(make_env(), every=0)
    with pytest.raises(InputError, match="PaysNothing"):
        OptimalityEvalCallback(PaysNothing(make_rows()))


@pytest.mark.parametrize("algorithm", ["flagship", "stock"])
def test_the_last_evaluation_is_of_the_last_update(algorithm, tmp_path):
    env = make_env()
    learner: Any = flagship(env) if algorithm == "flagship" else build(
        *(StockPPO, env), n_steps=8, batch_size=64, n_epochs=1, learning_rate=1e-2
    )  # fmt: skip
    rows = make_vec_env(EXACT, 2, env_kwargs={"device": "cpu"})
    callback = OptimalityEvalCallback(rows, every=1, best_model_save_path=tmp_path)
    learner.learn(2 * N * 8, callback=callback)
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=4)
    now = task.value(task.log_probs(learner.policy.core)).objective.mean()
    assert callback.evaluations[-1]["objective"] == pytest.approx(now, abs=1e-5)
    assert callback.evaluations[-1]["objective"] != callback.evaluations[-2]["objective"]
