"""Every registered id is a standard Gymnasium environment: checkers, wrappers, specs, pictures."""

import itertools
import json
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import BUDGET, MAX_PROMPT
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import (
    RecordEpisodeStatistics,
    RecordVideo,
    TimeLimit,
    TransformReward,
)
from gymnasium.wrappers.vector import DictInfoToList
from gymnasium.wrappers.vector import RecordEpisodeStatistics as RecordVectorStatistics
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import rlhf_gym  # noqa: F401 (registers the ids)
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError

IDS = sorted(name for name in gym.registry if name.startswith("rlhf_gym/"))
MODES = ("SameStep", "NextStep", "Disabled")


@pytest.fixture(scope="module")
def keywords(save_lm, save_reward_model, prompt_file) -> dict[str, dict[str, Any]]:
    """Keywords that let each id run here; those with packaged models need none."""
    own = {
        "reference": save_lm("llama"),
        "reward_model": save_reward_model(),
        "prompts": prompt_file,
        "max_prompt_tokens": MAX_PROMPT,
        "max_new_tokens": BUDGET,
    }
    local = {"rlhf_gym/Reviews-v0", "rlhf_gym/Exact-v0"}
    # Of a published setting, what a vocabulary of letters and any action allow (tests/
    # test_published.py runs them as they are).
    published = own | {
        "tokenizer": None,
        "prompt_format": None,
        "prompt_column": None,
        "reward_label": None,
        "reward_probability": False,
        "min_new_tokens": 0,
        "cuts": [],
        "shaping": [],
    }
    rest = {name: own if name == "rlhf_gym/Text-v0" else published for name in IDS}
    return {name: {"device": "cpu"} | ({} if name in local else rest[name]) for name in IDS}


def make(name: str, keywords: dict[str, dict[str, Any]], **more: Any) -> Any:
    return gym.make(name, **keywords[name], **more)


def episode(env: Any, seed: int = 0) -> tuple[float, dict[str, Any], int]:
    """Return, last info and length of an episode of random tokens."""
    env.reset(seed=seed)
    env.action_space.seed(seed)
    total = 0.0
    for t in itertools.count(1):
        _, reward, ended, truncated, info = env.step(env.action_space.sample())
        total += reward
        if ended or truncated:
            return total, info, t
    raise AssertionError


@pytest.mark.parametrize("name", IDS)
def test_the_checkers_have_no_complaint(name, keywords):
    check_env(make(name, keywords, render_mode="rgb_array").unwrapped)
    check_env_sb3(make(name, keywords).unwrapped)


@pytest.mark.parametrize("name", IDS)
def test_the_spec_travels_as_json(name, keywords):
    env = make(name, keywords)
    text = env.spec.to_json()
    assert json.loads(text)["kwargs"].items() >= keywords[name].items()
    assert episode(gym.make(EnvSpec.from_json(text)))[0] == episode(env)[0]


@pytest.mark.parametrize("name", IDS)
def test_pickled_it_goes_on_alike(name, keywords):
    env = make(name, keywords).unwrapped
    again = pickle.loads(pickle.dumps(env))
    # Other addresses may let a sum run in another order.
    assert episode(again)[0] == pytest.approx(episode(env)[0], rel=1e-6)


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_wrappers_work_on_the_step_path(name, keywords):
    total, _, length = episode(make(name, keywords))
    recorded, info, _ = episode(RecordEpisodeStatistics(make(name, keywords)))
    assert info["episode"]["r"] == pytest.approx(recorded, abs=1e-4)
    assert recorded == pytest.approx(total)
    assert info["episode"]["l"] == length
    tripled, _, _ = episode(TransformReward(make(name, keywords), lambda r: 3 * r))
    assert tripled == pytest.approx(3 * total)
    limited = TimeLimit(make(name, keywords), max_episode_steps=1)
    _, _, cut = episode(limited)
    assert cut == 1


@pytest.mark.parametrize("name", IDS)
def test_a_video_can_be_recorded(name, keywords, tmp_path):
    env = RecordVideo(
        make(name, keywords, render_mode="rgb_array"), str(tmp_path / "film"), disable_logger=True
    )
    episode(env)
    env.close()
    (file,) = (tmp_path / "film").glob("*.mp4")
    assert file.stat().st_size > 1000


def test_each_mode_shows_the_conversation(keywords, capsys):
    env = make("rlhf_gym/Exact-v0", keywords, render_mode="ansi")
    env.reset(options={"prompt": "c"})
    for token in (0, 1, 8):
        env.step(token)
    prompt, response, footer = env.render().split("\n")
    assert (prompt, response) == ("c", "a b </s>")
    assert "3 tokens" in footer
    assert "stop, score" in footer

    frames = make("rlhf_gym/Exact-v0", keywords, render_mode="rgb_array")
    frames.reset(options={"prompt": "c"})
    before = frames.render()
    frames.step(0)
    after = frames.render()
    assert before.shape == after.shape == (360, 640, 3)
    assert before.dtype == np.uint8
    assert (before != after).any()

    human = make("rlhf_gym/Exact-v0", keywords, render_mode="human")
    capsys.readouterr()
    human.reset(options={"prompt": "c"})
    human.step(0)
    human.step(8)
    shown = capsys.readouterr().out
    assert "c a" in shown
    assert "score" in shown
    with (
        pytest.warns(UserWarning, match="not in the possible render_modes"),
        pytest.raises(InputError, match="render_mode must be one of"),
    ):
        make("rlhf_gym/Exact-v0", keywords, render_mode="film", disable_env_checker=True)


def test_the_colour_is_the_log_ratio(keywords):
    env = make("rlhf_gym/Exact-v0", keywords, render_mode="rgb_array").unwrapped
    actor = Sure()
    env.bind_actor(actor)
    env.reset(options={"prompt": "c"})
    _, _, _, _, info = env.step(0)
    assert env._rows.traces.rows[0].log_ratios == [pytest.approx(info["kl"])]
    assert info["kl"] > 0
    red = (env.render() == (255, 102, 102)).all(-1)
    assert info["kl"] < 2 or red.any()
    assert ((env.render()[..., 0] == 255) & (env.render()[..., 1] < 250)).any()


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_collects_frames(name, keywords):
    env = make(name, keywords, render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(5)
    before, after = env.render()
    assert before.shape == after.shape == (360, 640, 3)
    assert (before != after).any()


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_a_vector_shows_each_row_as_a_single_environment_does(name, mode, keywords):
    rows = gym.make_vec(name, num_envs=3, render_mode=mode, **keywords[name])
    assert rows.render_mode == mode
    assert mode in rows.metadata["render_modes"]
    assert rows.metadata["render_fps"] == make(name, keywords).metadata["render_fps"]
    singles = [make(name, keywords, render_mode=mode) for _ in range(3)]
    rows.reset(seed=5)
    for i, env in enumerate(singles):
        env.reset(seed=5 + i)
    for ended in (False, True):
        frames = rows.render()
        assert isinstance(frames, tuple)
        for frame, env in zip(frames, singles, strict=True):
            np.testing.assert_array_equal(frame, env.render())
        if not ended:  # ids that are no EOS in these vocabularies
            rows.step(np.array([5, 6, 7]))
            for token, env in zip((5, 6, 7), singles, strict=True):
                env.step(token)


def test_a_row_shows_its_end_until_its_next_prompt():
    frames = {}
    for mode in MODES:
        env = gym.make_vec(
            "rlhf_gym/Exact-v0",
            num_envs=2,
            autoreset_mode=mode,
            render_mode="ansi",
            device="cpu",
        )
        env.reset(options={"prompt": "c"})
        env.step(np.array([0, 8]))
        frames[mode] = env.render()
        assert frames[mode][0].startswith("c\na\n[1 tokens")
    assert frames["NextStep"][1] == frames["Disabled"][1]
    prompt, response, footer = frames["Disabled"][1].split("\n")
    assert (prompt, response) == ("c", "</s>")
    assert "stop, score" in footer
    assert frames["SameStep"][1].split("\n")[1:] == ["", "[0 tokens, Σ log π_ref 0.00 nats]"]


def test_a_vector_without_a_render_mode_shows_nothing():
    assert gym.make_vec("rlhf_gym/Exact-v0", device="cpu").render() is None
    for mode in ("human", "film"):
        with pytest.raises(InputError, match="render_mode must be one of"):
            gym.make_vec("rlhf_gym/Exact-v0", render_mode=mode, device="cpu")


NUMBERS = {"ref_log_prob": np.float64, "kl": np.float64, "actor_bound": bool} | {
    "score": np.float64,
    "kl_sum": np.float64,
}
TEXTS = {"finish_reason": str, "prompt": str, "response": str}


class Sure:
    """An actor that takes every token for certain."""

    def log_prob(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.zeros(len(actions), dtype=np.float32)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("name", IDS)
def test_every_info_has_the_same_keys_and_types(name, bound, keywords):
    """Minari and TorchRL stack the infos of an episode, that of `reset` included."""
    env = make(name, keywords).unwrapped
    actor = Sure()
    if bound:
        env.bind_actor(actor)
    env.action_space.seed(0)
    unknown = dict.fromkeys(NUMBERS, 0.0) | dict.fromkeys(TEXTS, "")
    for seed in range(3):
        _, info = env.reset(seed=seed)
        assert info == unknown
        ended = False
        while not ended:
            assert {key: type(value) for key, value in info.items()} == NUMBERS | TEXTS
            assert isinstance(info["score"], float)
            *_, ended, _, info = env.step(env.action_space.sample())
            known = {"ref_log_prob", "actor_bound"} | ({"kl"} if bound else set())
            if ended:
                known |= {"score", *TEXTS} | ({"kl_sum"} if bound else set())
            assert info["actor_bound"] is bound
            assert bool(info["finish_reason"]) is ended
            unsaid = [key for key in unknown if key not in known]
            assert [info[key] for key in unsaid] == [unknown[key] for key in unsaid]
            assert info["ref_log_prob"] < 0


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["rlhf_gym/Exact-v0", "rlhf_gym/Reviews-v0"])
def test_vector_infos_have_the_same_keys_and_types_and_true_masks(name, mode, bound, keywords):
    env = gym.make_vec(name, num_envs=3, autoreset_mode=mode, **keywords[name])
    actor = Sure()
    if bound:
        env.unwrapped.bind_actor(actor)

    def described(infos: dict[str, Any]) -> dict[str, Any]:
        final = ("final_obs", "_final_obs", "final_info", "_final_info")
        return {key: (v.dtype, v.shape) for key, v in infos.items() if key not in final}

    _, first = env.reset(seed=0)
    env.action_space.seed(0)
    waiting, finished = np.zeros(3, dtype=bool), 0
    for _ in range(3 * env.unwrapped.max_new_tokens + 3):
        if mode == "Disabled" and waiting.any():
            assert described(env.reset(options={"reset_mask": waiting})[1]) == described(first)
            waiting[:] = False
        *_, ended, _, infos = env.step(env.action_space.sample())
        assert described(infos) == described(first)
        acted = ~waiting if mode == "NextStep" else np.ones(3, dtype=bool)
        at_end = infos
        if mode == "SameStep":
            np.testing.assert_array_equal(infos["_score"], False)
            acted = ~ended
            at_end = infos["final_info"] if ended.any() else None
        np.testing.assert_array_equal(infos["_ref_log_prob"], acted)
        np.testing.assert_array_equal(infos["_actor_bound"], acted)
        np.testing.assert_array_equal(infos["_kl"], acted & bound)
        if at_end is not None:
            for key in ("score", *TEXTS):
                np.testing.assert_array_equal(at_end[f"_{key}"], ended)
            np.testing.assert_array_equal(at_end["_kl_sum"], ended & bound)
            assert not any(at_end[key][~at_end[f"_{key}"]].any() for key in (*NUMBERS, *TEXTS))
        if mode == "SameStep" and ended.any():
            assert described(at_end).keys() == {
                name for key in (*NUMBERS, *TEXTS) for name in (key, f"_{key}")
            }
        waiting = ended.copy()
        finished += int(ended.sum())
    assert finished > 6


@pytest.mark.parametrize("mode", MODES)
def test_infos_as_a_list_have_only_what_is_known(mode):
    env = gym.make_vec("rlhf_gym/Exact-v0", num_envs=3, autoreset_mode=mode, device="cpu")
    env = DictInfoToList(env)
    assert env.reset(seed=0)[1] == [{}, {}, {}]
    ends = {"ref_log_prob", "actor_bound", "score", *TEXTS}
    *_, rows = env.step(np.array([8, 0, 0]))
    known = rows[0]["final_info"] if mode == "SameStep" else rows[0]
    assert known.keys() == ends
    assert known["finish_reason"] == "stop"
    assert rows[1].keys() == rows[2].keys() == {"ref_log_prob", "actor_bound"}


# The vector counterpart of Gymnasium's checker: what its VectorEnv documentation promises.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", IDS)
def test_the_vector_env_keeps_the_contract(name, mode, keywords):
    env = gym.make_vec(name, num_envs=3, autoreset_mode=mode, **keywords[name])
    assert isinstance(env, TokenVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode(mode)
    first, info = env.reset(seed=5)
    again, _ = env.reset(seed=5)
    np.testing.assert_array_equal(first, again)
    assert first in env.observation_space
    # TorchRL and Minari read the keys of all steps off the first info, so it has them all.
    assert {key for key in info if not key.startswith("_")} == {
        *NUMBERS,
        *(() if mode == "SameStep" else TEXTS),
    }
    assert not any(info[key].any() for key in info), "nothing is known yet"
    env.action_space.seed(0)
    waiting = np.zeros(3, dtype=bool)
    finished = 0
    for _ in range(3 * env.max_new_tokens + 3):
        if mode == "Disabled" and waiting.any():
            observations, _ = env.reset(options={"reset_mask": waiting})
            assert observations in env.observation_space
            waiting[:] = False
        observations, rewards, ended, truncated, infos = env.step(env.action_space.sample())
        assert observations in env.observation_space
        assert rewards.dtype == np.float64
        assert rewards.shape == ended.shape == truncated.shape == (3,)
        assert ended.dtype == truncated.dtype == np.bool_
        assert not truncated.any()
        if mode == "NextStep":
            assert (rewards[waiting] == 0).all(), "the step that resets pays nothing"
            assert not ended[waiting].any()
        if mode == "SameStep":
            assert ("final_info" in infos) == ended.any()
            if ended.any():
                np.testing.assert_array_equal(infos["_final_obs"], ended)
                for i in np.flatnonzero(ended):
                    assert infos["final_obs"][i] in env.single_observation_space
                    assert infos["final_info"]["score"][i] != 0
        else:
            assert "final_info" not in infos
            np.testing.assert_array_equal(infos["_score"], ended)
        waiting = ended.copy()
        finished += int(ended.sum())
    assert finished >= 6
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_vector_statistics_agree(name, keywords):
    make_plain = {"num_envs": 4, "autoreset_mode": "NextStep", **keywords[name]}
    env = RecordVectorStatistics(gym.make_vec(name, **make_plain))
    env.reset(seed=0)
    env.action_space.seed(0)
    totals, seen = np.zeros(4), 0
    for _ in range(2 * env.unwrapped.max_new_tokens + 2):
        _, rewards, ended, _, infos = env.step(env.action_space.sample())
        totals += rewards
        for i in np.flatnonzero(ended):
            assert infos["episode"]["r"][i] == pytest.approx(totals[i], abs=1e-4)
            totals[i], seen = 0.0, seen + 1
    assert seen >= 4


def test_rows_can_share_a_prompt():
    env = gym.make_vec("rlhf_gym/Exact-v0", num_envs=4, device="cpu")
    observations, _ = env.reset(options={"prompt_index": 3})
    assert (observations[:, 0] == 3).all()
    observations, _ = env.reset(options={"prompt_index": [0, 0, 5, 5]})
    assert observations[:, 0].tolist() == [0, 0, 5, 5]
    observations, _ = env.reset(options={"prompt": ["b", "b", "h", "a"]})
    assert observations[:, 0].tolist() == [1, 1, 7, 0]
    for bad in ({"prompt_index": [0, 1]}, {"prompt_index": [0, 1, 2, 8]}, {"prompt": ["a"] * 3}):
        with pytest.raises(InputError, match="prompt"):
            env.reset(options=bad)


def test_groups_of_rows_play_the_same_prompts():
    make_groups = {"num_envs": 6, "rows_per_prompt": 3, "device": "cpu"}
    env = gym.make_vec("rlhf_gym/Exact-v0", **make_groups)
    observations, _ = env.reset(seed=0)
    played: list[list[int]] = [[int(p)] for p in observations[:, 0]]
    rng = np.random.default_rng(0)
    for _ in range(60):
        observations, _, ended, _, _ = env.step(rng.integers(0, 9, 6))
        for i in np.flatnonzero(ended):
            played[i].append(int(observations[i, 0]))
    for group in (played[:3], played[3:]):
        lengths = sorted(map(len, group))
        assert lengths[0] != lengths[2], "rows must have got ahead of each other"
        assert all(row[: lengths[0]] == group[0][: lengths[0]] for row in group)
    assert played[0][:5] != played[3][:5]

    # Whole waves, and a copy of the state midway through the groups' queues.
    whole = gym.make_vec("rlhf_gym/Exact-v0", **make_groups)
    whole.reset(seed=0)
    one_ahead = np.array([True] + [False] * 5)
    whole.reset(options={"reset_mask": one_ahead})
    again = gym.make_vec("rlhf_gym/Exact-v0", **make_groups)
    again.set_state(json.loads(json.dumps(whole.get_state())))
    for _ in range(3):
        ends = np.full((6, 1), 8)
        np.testing.assert_array_equal(whole.play(ends)[2], again.play(ends)[2])
    with pytest.raises(InputError, match="must divide"):
        gym.make_vec("rlhf_gym/Exact-v0", num_envs=6, rows_per_prompt=4, device="cpu")
