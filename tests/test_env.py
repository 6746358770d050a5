"""The environments keep Gymnasium's contract and their own: one stream, however it is run."""

import copy
import json
import os
import pickle
import weakref
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    BUDGET,
    ENDS,
    EOS,
    MAX_PROMPT,
    PROMPTS,
    ModelActor,
    V,
    count_forwards,
    draw_responses,
    log_probs_alone,
    text_reward,
)
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import rlhf_gym  # noqa: F401 (registers the ids)
from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD, row_lengths

WIDTH = MAX_PROMPT + BUDGET


@pytest.fixture(scope="module")
def keywords(save_lm, save_reward_model, prompt_file) -> dict[str, Any]:
    """Keywords of Text-v0."""
    return {
        "reference": save_lm("llama"),
        "reward_model": save_reward_model(),
        "prompts": prompt_file,
        "max_prompt_tokens": MAX_PROMPT,
        "max_new_tokens": BUDGET,
        "kl_coef": 0.3,
        "temperature": 0.8,
        "split": "all",
        "device": "cpu",
    }


def random_actions(n: int, steps: int, seed: int = 0) -> np.ndarray:
    """Tokens (steps, n), an EOS now and then."""
    return np.random.default_rng(seed).integers(0, V, (steps, n))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal in structure, type of number, masks and values (floats to 1e-5)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        if a.dtype == object:
            for i, pair in enumerate(zip(a, b, strict=True)):
                assert_same(*pair, f"{where}[{i}]")
        else:
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=where)
    elif isinstance(a, tuple):
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5), where
    else:
        assert a == b, where


# Gymnasium's and SB3's own checks; pytest turns a warning of theirs into an error.


def test_gymnasiums_checker_has_no_complaint(keywords):
    check_env(gym.make("rlhf_gym/Text-v0", **keywords).unwrapped)


def test_sb3s_checker_has_no_complaint(keywords):
    check_env_sb3(gym.make("rlhf_gym/Text-v0", **keywords).unwrapped)


def test_the_wrapped_env_runs_as_made(keywords):
    env = gym.make("rlhf_gym/Text-v0", **keywords)
    env.reset(seed=0)
    ended = False
    while not ended:
        _, _, ended, truncated, _ = env.step(env.action_space.sample())
        assert not truncated
    assert env.unwrapped.objective.kl_coef == 0.3


def test_the_spec_is_json_and_makes_the_env_again(keywords):
    env = gym.make("rlhf_gym/Text-v0", **keywords)
    rows = gym.make_vec("rlhf_gym/Text-v0", num_envs=2, **keywords)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    rows_again = gym.make_vec(EnvSpec.from_json(rows.spec.to_json()))
    assert json.loads(env.spec.to_json())["kwargs"] == keywords
    assert rows_again.num_envs == 2
    models = {e.unwrapped.objective.reference.model for e in (env, rows, again, rows_again)}
    rewards = {e.unwrapped.objective.reward for e in (env, rows, again, rows_again)}
    assert len(models) == len(rewards) == 1, "the same names share one frozen copy"


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_make_vec_is_natively_batched(keywords, mode):
    env = gym.make_vec("rlhf_gym/Text-v0", num_envs=3, autoreset_mode=mode, **keywords)
    assert isinstance(env, TokenVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode(mode)
    observations, info = env.reset(seed=1)
    assert not any(info[key].any() for key in info), "nothing is known yet"
    assert observations in env.observation_space
    assert env.action_space.shape == (3,)
    env.close()


def test_make_vec_defaults_to_same_step(keywords):
    env = gym.make_vec("rlhf_gym/Text-v0", num_envs=2, **keywords)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def test_a_reward_function_by_name(keywords):
    env = gym.make("rlhf_gym/Text-v0", **{**keywords, "reward_model": "conftest:text_reward"})
    env.reset(seed=0)
    *_, info = env.step(EOS)
    assert info["score"] == pytest.approx(text_reward([info["prompt"]], [info["response"]])[0])


def test_bad_settings_are_refused(keywords, make_vector_env):
    for wrong, message in (
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 60}, "context of 64"),
        ({"reference": "/no/such/model"}, "/no/such/model"),
        ({"prompts": "/no/such/file.txt"}, "/no/such/file.txt"),
        ({"max_prompt_tokens": 1}, "max_prompt_tokens"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"split": "some"}, "split"),
    ):
        with pytest.raises(InputError, match=message):
            gym.make("rlhf_gym/Text-v0", **{**keywords, **wrong})
    with pytest.raises(InputError, match="autoreset_mode"):
        make_vector_env(autoreset_mode="Sometimes")


# Observations, ends, infos


def test_spaces(make_env):
    env = make_env(vocab_size=V + 6)
    assert env.observation_space == gym.spaces.Box(-1, V - 1, (WIDTH,), np.int64)
    assert env.action_space == gym.spaces.Discrete(V), "ids without a name are no actions"


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_observations_are_prompt_and_response_padded_on_the_right(make_env, pad_is_eos):
    env = make_env(pad_is_eos=pad_is_eos)
    seen = []
    for index, text in enumerate(PROMPTS):
        obs, _ = env.reset(seed=0, options={"prompt_index": index})
        row = env.objective.reference.tokenizer(text)["input_ids"]
        for action in (4, 0, 5, EOS):
            assert obs.dtype == np.int64
            assert obs.tolist() == row + [PAD] * (WIDTH - len(row))
            seen.append(obs)
            obs, *_ = env.step(action)
            row = [*row, action]
        assert obs.tolist() == row + [PAD] * (WIDTH - len(row)), "the EOS is seen at the end"
    assert not any(np.shares_memory(a, b) for i, a in enumerate(seen) for b in seen[i + 1 :]), (
        "an observation is a fresh copy"
    )


def test_writing_into_an_observation_changes_nothing(make_vector_env):
    env, other = make_vector_env(), make_vector_env()
    obs, _ = env.reset(seed=0)
    other.reset(seed=0)
    obs[:] = 9
    for actions in random_actions(3, 12):
        one, two = env.step(actions), other.step(actions)
        assert_same(one[0], two[0])
        assert_same(one[1], two[1])
        one[0][:] = 9
        for last in one[4].get("final_obs", []):
            if last is not None:
                last[:] = 9


@pytest.mark.parametrize("end", [EOS, ENDS[3]])
def test_any_eos_terminates(make_env, end):
    env = make_env()
    env.reset(seed=0)
    *_, ended, truncated, info = env.step(4)
    assert not ended
    assert not truncated
    assert {key for key, value in info.items() if value} == {"ref_log_prob"}
    *_, ended, truncated, info = env.step(end)
    assert ended
    assert not truncated
    assert info["finish_reason"] == "stop"


def test_the_budget_terminates_and_never_truncates(make_env):
    env = make_env()
    env.reset(seed=0)
    for t in range(BUDGET):
        *_, ended, truncated, info = env.step(5)
        assert ended is (t == BUDGET - 1)
        assert not truncated
    assert info["finish_reason"] == "length"


def test_with_stop_at_eos_off_only_the_budget_ends(make_env):
    env = make_env(stop_at_eos=False)
    prompt, _ = env.reset(seed=0)
    for action in (EOS, 5, EOS, 6, 7):
        obs, _, ended, _, info = env.step(action)
    assert ended
    assert row_lengths(obs) == row_lengths(prompt) + BUDGET
    assert info["finish_reason"] == "length"


def test_infos_of_a_bound_episode(make_env, actor):
    env = make_env()
    env.bind_actor(actor)
    prompt, _ = env.reset(seed=0, options={"prompt": "d e f"})
    response = [4, 9, 5, EOS]
    reference = log_probs_alone(env.objective.reference, prompt, response)
    k = log_probs_alone(actor.lm, prompt, response) - reference
    score = text_reward(["d e f"], [" a f b"])[0]
    for t, action in enumerate(response):
        _, reward, ended, _, info = env.step(action)
        assert info["actor_bound"] is True
        assert info["ref_log_prob"] == pytest.approx(float(reference[t]), abs=1e-5)
        assert info["kl"] == pytest.approx(float(k[t]), abs=1e-5)
        assert isinstance(reward, float)
        assert reward == pytest.approx(-0.3 * float(k[t]) + (score if ended else 0), abs=1e-5)
        assert bool(info["finish_reason"]) is ended
    assert info["score"] == pytest.approx(score)
    assert info["kl_sum"] == pytest.approx(float(k.sum()), abs=1e-5)
    assert (info["prompt"], info["response"], info["finish_reason"]) == ("d e f", " a f b", "stop")


def test_unbound_pays_the_half_that_is_known_and_says_so(make_env, actor):
    bound, unbound = make_env(), make_env()
    bound.bind_actor(actor)
    prompt, _ = bound.reset(seed=0)
    unbound.reset(seed=0)
    response = [4, 9, 5, 7, 8]
    owed = -0.3 * log_probs_alone(actor.lm, prompt, response)
    for t, action in enumerate(response):
        _, whole, *_ = bound.step(action)
        _, half, *_, info = unbound.step(action)
        assert whole == pytest.approx(half + float(owed[t]), abs=1e-5)
        assert info["actor_bound"] is False
        assert info["kl"] == info["kl_sum"] == 0


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_reward_model_pays_on_the_eos(make_env, save_reward_model, pad_is_eos):
    reward = RewardModel.load(save_reward_model(pad_is_eos=pad_is_eos))
    env = make_env(reward=reward, kl_coef=0.0, pad_is_eos=pad_is_eos)
    env.reset(seed=0)
    rewards = []
    for action in (4, 6, EOS):
        obs, paid, *_ = env.step(action)
        rewards.append(paid)
    row = torch.tensor([[t for t in obs.tolist() if t != PAD]])
    assert rewards == [0, 0, pytest.approx(float(reward.scores(row)), abs=1e-5)]


# One row of many


def test_single_env_is_a_row_of_the_vector_env(make_vector_env, make_env, actor):
    env = make_vector_env(num_envs=3)
    env.bind_actor(actor)
    actions = random_actions(3, 14)
    observations, _ = env.reset(seed=11)
    singles = [make_env() for _ in range(3)]
    now = []
    for i, single in enumerate(singles):
        single.bind_actor(actor)
        now.append(single.reset(seed=11 + i)[0])
    assert_same(np.stack(now), observations)
    episodes = 0
    for row in actions:
        observations, rewards, ended, _, infos = env.step(row)
        for i, single in enumerate(singles):
            obs, reward, done, _, info = single.step(row[i])
            assert done == ended[i]
            assert reward == pytest.approx(rewards[i], abs=1e-5)
            if done:
                episodes += 1
                assert_same(infos["final_obs"][i], obs)
                obs, _ = single.reset()
            batched = infos["final_info"] if done else infos
            known = {key for key in batched if batched.get(f"_{key}", [False] * 3)[i]}
            known -= {"final_info", "final_obs"}
            for key, value in info.items():
                if key in known:
                    assert_same(value, batched[key][i], key)
                else:
                    assert not value, key
            assert_same(observations[i], obs)
    assert episodes > 5


def assert_infos_agree(ours: dict[str, Any], theirs: dict[str, Any], same_step: bool) -> None:
    """Equal values; only our masks tell what is known from what a single environment fills in."""
    missing = theirs.keys() - ours.keys()
    # With "SameStep" our texts are in `final_info`; a single environment fills them in on a reset.
    texts = {"finish_reason", "prompt", "response"}
    assert {key.removeprefix("_") for key in missing} in ([set(), texts] if same_step else [set()])
    for key in [key for key in ours if not key.startswith("_")]:
        known = ours[f"_{key}"]
        assert not (known & ~theirs[f"_{key}"]).any(), key
        if key == "final_info":
            assert_infos_agree(ours[key], theirs[key], same_step=False)
            continue
        for i in range(len(known)):
            if known[i]:
                assert_same(ours[key][i], theirs[key][i], key)
            else:
                assert not ours[key][i] and not theirs[key][i], key


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_autoreset_is_gymnasiums(make_vector_env, make_env, actor, mode, bound):
    env = make_vector_env(num_envs=3, autoreset_mode=mode)
    singles = [make_env() for _ in range(3)]
    sync = SyncVectorEnv(
        [lambda single=single: single for single in singles], autoreset_mode=AutoresetMode(mode)
    )
    if bound:
        for each in (env, *singles):
            each.bind_actor(actor)
    assert env.single_observation_space == sync.single_observation_space
    assert env.observation_space == sync.observation_space
    assert env.action_space == sync.action_space
    same_step = mode == "SameStep"
    ours, theirs = env.reset(seed=5), sync.reset(seed=5)
    assert_same(ours[0], theirs[0])
    assert_infos_agree(ours[1], theirs[1], same_step)
    together = 0
    for actions in random_actions(3, 40, seed=2):
        ours, theirs = env.step(actions), sync.step(actions)
        assert_same(ours[:4], theirs[:4])
        assert_infos_agree(ours[4], theirs[4], same_step)
        ended = ours[2]
        together += ended.sum() > 1
        if mode == "Disabled" and ended.any():
            options = {"reset_mask": ended}
            assert_same(env.reset(options=dict(options))[0], sync.reset(options=dict(options))[0])
    assert together, "the test needs rows that end in the same step, too"


def test_next_step_mode_ignores_the_action_of_a_row_that_waits(make_vector_env, actor):
    env = make_vector_env(num_envs=2, autoreset_mode="NextStep")
    env.bind_actor(actor)
    env.reset(seed=0)
    env.step(np.array([EOS, 4]))
    observations, rewards, ended, _, infos = env.step(np.array([EOS, 5]))
    assert rewards[0] == 0
    assert not ended[0]
    assert infos["_kl"].tolist() == [False, True]
    assert row_lengths(observations)[0] <= MAX_PROMPT


# reset


def test_equal_seeds_give_equal_prompts_and_a_list_seeds_each_row(make_vector_env):
    env = make_vector_env(num_envs=3)
    first, _ = env.reset(seed=4)
    again, _ = env.reset(seed=[4, 5, 6])
    assert_same(first, again)
    unseeded, _ = env.reset()
    env.reset(seed=4)
    assert_same(unseeded, env.reset(seed=[None, None, None])[0])
    drawn = {tuple(row) for _ in range(30) for row in env.reset()[0].tolist()}
    assert len(drawn) == len(PROMPTS), "every prompt is drawn"


def test_a_prompt_of_your_own(make_vector_env):
    env = make_vector_env(num_envs=2)
    tokenizer = env.objective.reference.tokenizer
    for options, text in (({"prompt": "z z"}, "z z"), ({"prompt_index": 3}, PROMPTS[3])):
        observations, _ = env.reset(options=options)
        row = tokenizer(text)["input_ids"]
        assert observations.tolist() == [row + [PAD] * (WIDTH - len(row))] * 2
    for options in (
        {"prompt_index": len(PROMPTS)},
        {"prompt_index": -1},
        {"prompt": "a b c d e f"},
        {"colour": "red"},
        {"reset_mask": np.array([True])},
        {"reset_mask": np.array([False, False])},
    ):
        with pytest.raises(InputError):
            env.reset(options=options)


def test_reset_mask_leaves_the_other_rows_alone(make_vector_env, actor):
    env = make_vector_env(num_envs=3, autoreset_mode="Disabled")
    env.bind_actor(actor)
    env.reset(seed=0)
    before, *_ = env.step(np.array([4, EOS, 5]))
    after, _ = env.reset(
        options={"reset_mask": np.array([False, True, False]), "prompt": "z"}, seed=9
    )
    assert_same(after[[0, 2]], before[[0, 2]])
    assert after[1].tolist()[:3] == [2, 29, PAD]
    *_, infos = env.step(np.array([6, 7, EOS]))
    whole = log_probs_alone(actor.lm, before[2][before[2] != PAD][:-1], [5, EOS])
    k = whole - log_probs_alone(env.objective.reference, before[2][before[2] != PAD][:-1], [5, EOS])
    assert infos["kl_sum"][2] == pytest.approx(float(k.sum()), abs=1e-5)


# play


def play_by_steps(env: TokenVectorEnv, whole: np.ndarray) -> tuple[Any, dict[str, Any], Any]:
    """What `step` says of each row's first response: rewards, {info: {(row, t): value}}, prompts.

    Rows that are over take any action: in "SameStep" they are in another episode already.
    """
    rewards, following = np.zeros(whole.shape), np.zeros(env.observation_space.shape, np.int64)
    over, seen = np.zeros(len(whole), dtype=bool), {}
    for t, actions in enumerate(whole.T):
        obs, paid, ended, _, notes = env.step(np.where(actions == PAD, 4, actions))
        for i in np.flatnonzero(~over):
            rewards[i, t] = paid[i]
            source = notes["final_info"] if ended[i] else notes
            for key in source:
                if not key.startswith(("_", "final")) and source[f"_{key}"][i]:
                    seen.setdefault(key, {})[i, t] = source[key][i]
        following[ended & ~over] = obs[ended & ~over]
        over |= ended
    assert over.all()
    return rewards, seen, following


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"stop_at_eos": False}, {"family": "gpt2", "pad_is_eos": True}]
)
def test_play_is_step(make_vector_env, load_lm, bound, options):
    played, stepped = (make_vector_env(num_envs=6, **options) for _ in range(2))
    actor = ModelActor(load_lm(options.get("family", "llama"), seed=3, temperature=0.8))
    if bound:
        played.bind_actor(actor)
        stepped.bind_actor(actor)
    for wave in range(2):
        assert_same(played.reset(seed=wave), stepped.reset(seed=wave))
        whole = draw_responses(6, BUDGET, seed=wave)
        if not played.stop_at_eos:
            whole = np.abs(whole)  # PAD becomes a token
        rewards, infos, prompts = played.play(whole)
        expected, seen, following = play_by_steps(stepped, whole)
        np.testing.assert_allclose(rewards, expected, atol=1e-5, rtol=1e-5)
        assert_same(prompts, following, "the next prompts")
        assert ("kl_sum" in seen) is bound
        named = {key for key in infos if not key.startswith("_")}
        assert {key for key in named if infos[f"_{key}"].all()} == seen.keys()
        assert not any(infos[key].any() for key in named - seen.keys())
        for key, values in seen.items():
            per_token = key in ("ref_log_prob", "kl")
            for (i, t), value in values.items():
                assert infos[f"_{key}"][i]
                assert_same(infos[key][i, t] if per_token else infos[key][i], value, key)
            assert not per_token or not infos[key][whole == PAD].any()


def test_play_takes_the_actors_log_probs(make_vector_env, actor):
    asked, told = make_vector_env(), make_vector_env()
    asked.bind_actor(actor)
    prompts, _ = asked.reset(seed=0)
    told.reset(seed=0)
    whole = draw_responses(3, BUDGET)
    log_probs = np.full(whole.shape, np.nan, dtype=np.float32)  # behind an end nothing is read
    for i in range(3):
        alone = log_probs_alone(actor.lm, prompts[i], whole[i])
        log_probs[i, : len(alone)] = alone
    for a, b in zip(asked.play(whole), told.play(whole, log_probs), strict=True):
        assert_same(a, b)


def test_play_needs_no_columns_behind_the_longest_response(make_vector_env):
    one, two = make_vector_env(), make_vector_env()
    one.reset(seed=0)
    two.reset(seed=0)
    whole = np.array([[4, EOS], [EOS, PAD], [5, ENDS[1]]])
    short = one.play(whole)
    full = two.play(np.pad(whole, ((0, 0), (0, BUDGET - 2)), constant_values=PAD))
    np.testing.assert_allclose(short[0], full[0][:, :2])
    assert not full[0][:, 2:].any()
    assert_same(short[2], full[2])


def test_a_step_costs_one_reference_step_and_one_reward_call_for_all_rows(make_vector_env):
    calls = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(len(prompts))
        return text_reward(prompts, responses)

    env = make_vector_env(num_envs=6, reward=reward)
    env.reset(seed=0)
    begun = np.ones(6, dtype=bool)
    for actions in random_actions(6, 12, seed=1):
        calls.clear()
        with count_forwards(env.objective.reference) as shapes:
            _, _, ended, _, _ = env.step(actions)
        assert calls == ([ended.sum()] if ended.any() else [])
        prefills, steps = ([s for s in shapes if (s[1] == 1) is one] for one in (False, True))
        assert len(prefills) <= 1, "the rows with a new prompt, together"
        assert sum(rows for rows, _ in prefills) <= begun.sum()
        assert steps in ([], [(6, 1)]), "the rows that grew, together"
        begun = ended


def test_play_costs_one_pass_of_the_reference(make_vector_env):
    env = make_vector_env()
    env.reset(seed=0)
    with count_forwards(env.objective.reference) as shapes:
        env.play(draw_responses(3, BUDGET))
    assert len(shapes) == 1


def test_play_refuses_what_is_not_one_whole_response_a_row(make_vector_env):
    env = make_vector_env(num_envs=2)
    observations, _ = env.reset(seed=0)
    good = [4, 5, EOS, PAD, PAD]
    for bad in (
        [4, 5, PAD, PAD, PAD],  # half a response
        [4, EOS, 5, 6, 7],  # tokens after the EOS
        [4, EOS, EOS, PAD, PAD],
        [4, PAD, 5, EOS, PAD],  # a hole
        [PAD] * 5,  # nothing
        [4, 5, V, EOS, PAD],  # no such token
        [4, 5, -2, EOS, PAD],
    ):
        with pytest.raises(InputError, match=r"rows \[1\]"):
            env.play(np.array([good, bad]))
    for shape in ((1, 5), (3, 5), (2, 6), (2,), (2, 5, 1), (2, 0)):
        with pytest.raises(InputError):
            env.play(np.full(shape, 4))
    for shape in ((2, 4), (2,), (5, 2)):
        with pytest.raises(InputError, match="log_probs"):
            env.play(np.array([good, good]), np.zeros(shape))
    # A refusal leaves the rows where they were.
    _, infos, _ = env.play(np.array([good, good]))
    tokenizer = env.objective.reference.tokenizer
    assert infos["prompt"].tolist() == tokenizer.batch_decode(
        [[t for t in row if t != PAD] for row in observations.tolist()], skip_special_tokens=True
    )


def test_play_begins_at_prompts_only(make_vector_env):
    env = make_vector_env(num_envs=2)
    whole = np.full((2, BUDGET), 4)
    with pytest.raises(InputError, match="reset"):
        env.play(whole)
    env.reset(seed=0)
    env.step(np.array([4, 5]))
    with pytest.raises(InputError, match="not at a prompt"):
        env.play(whole)


def test_step_and_play_take_turns(make_vector_env, actor):
    env = make_vector_env(num_envs=2)
    env.bind_actor(actor)
    env.reset(seed=0)
    env.play(np.full((2, BUDGET), 4))
    *_, infos = env.step(np.array([EOS, EOS]))
    assert infos["final_info"]["kl_sum"].shape == (2,)
    assert_same(infos["final_info"]["kl_sum"], infos["final_info"]["kl"])
    env.play(np.full((2, BUDGET), 4))


# Refusals


def test_stepping_an_ended_row_is_refused(make_env, make_vector_env):
    env = make_env()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(4)
    env.reset(seed=0)
    env.step(EOS)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(4)
    rows = make_vector_env(num_envs=2, autoreset_mode="Disabled")
    rows.reset(seed=0)
    rows.step(np.array([4, EOS]))
    with pytest.raises(gym.error.ResetNeeded, match=r"\[1\]"):
        rows.step(np.array([4, 4]))


def test_bad_actions_are_refused_and_change_nothing(make_env, make_vector_env):
    env = make_env(vocab_size=V + 6)
    before, _ = env.reset(seed=0)
    for bad in (-1, V, 1.0, True, None, [4], "a"):
        with pytest.raises(InputError, match="actions must be"):
            env.step(bad)
    after, *_ = env.step(4)
    assert row_lengths(after) == row_lengths(before) + 1
    rows = make_vector_env(num_envs=2)
    rows.reset(seed=0)
    for bad in ([4], [4, 4, 4], [[4], [4]], [4, -1], [4.0, 4.0]):
        with pytest.raises(InputError, match="actions must be"):
            rows.step(np.array(bad))


# The actor


class ZeroActor:
    """Takes every token for certain."""

    def log_prob(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.zeros(len(actions), dtype=np.float32)


def step_info(env: TokenEnv) -> dict[str, Any]:
    env.reset(seed=0)
    return env.step(4)[4]


def test_pickle_and_deepcopy_drop_the_actor(make_env, save_reward_model):
    env = make_env(reward=RewardModel.load(save_reward_model()))
    actor = ZeroActor()
    env.bind_actor(actor)
    ours = step_info(env)
    assert ours["actor_bound"]
    for other in (pickle.loads(pickle.dumps(env)), copy.deepcopy(env)):
        info = step_info(other)
        assert not info["actor_bound"]
        assert info["ref_log_prob"] == pytest.approx(ours["ref_log_prob"], abs=1e-6)
    assert step_info(env)["actor_bound"], "the copy's loss is not ours"


def test_a_copy_midway_goes_on_alike(make_vector_env):
    env = make_vector_env()
    env.reset(seed=0)
    env.step(np.array([4, 5, 6]))
    other = pickle.loads(pickle.dumps(env))
    for actions in random_actions(3, 10):
        assert_same(env.step(actions), other.step(actions))


def test_a_restored_env_goes_on_alike(make_vector_env):
    env, other = make_vector_env(), make_vector_env()
    env.reset(seed=3)
    env.play(draw_responses(3, BUDGET))
    state = json.loads(json.dumps(env.get_state()))
    obs = other.set_state(state)
    for wave in range(4):
        whole = draw_responses(3, BUDGET, seed=wave)
        ours, theirs = env.play(whole), other.play(whole)
        assert_same(ours, theirs)
        assert not wave or not np.array_equal(obs, ours[2])
    assert env.episodes == other.episodes == 15
    env.step(np.array([4, 4, 4]))
    with pytest.raises(InputError, match="in the middle"):
        env.get_state()


def test_the_actor_is_weakly_held(make_env):
    env, actor = make_env(), ZeroActor()
    env.bind_actor(actor)
    assert step_info(env)["actor_bound"]
    gone = weakref.ref(actor)
    del actor
    assert gone() is None
    assert not step_info(env)["actor_bound"]


def test_an_actor_can_be_unbound(make_env):
    env, actor = make_env(), ZeroActor()
    env.bind_actor(actor)
    env.bind_actor(None)
    assert not step_info(env)["actor_bound"]


def test_an_actor_of_another_process_is_refused(make_env, monkeypatch):
    env, actor = make_env(), ZeroActor()
    env.bind_actor(actor)
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(RuntimeError, match="process"):
        step_info(env)


def test_without_an_end_nothing_is_stopped(make_vector_env):
    env = make_vector_env(num_envs=2, stop_at_eos=False)
    env.reset(seed=0)
    whole = np.array([[4, 5, 6, 7, EOS], [4, EOS, 6, 7, 8]])
    _, infos, _ = env.play(whole)
    assert infos["finish_reason"].tolist() == ["length", "length"]


def test_rows_of_a_group_are_in_step_again_after_a_reset_of_all(make_vector_env):
    env = make_vector_env(2)
    env.group_rows(2)
    env.reset(seed=0)
    env.step(np.array([env.objective.reference.eos_ids[0], 4]))  # row 0 is one episode ahead
    for _ in range(20):
        tokens, _ = env.reset()
        assert tokens[0].tolist() == tokens[1].tolist()


def test_rows_that_end_together_by_chance_keep_their_place_in_the_group(make_vector_env):
    env = make_vector_env(4, autoreset_mode="Disabled")
    env.group_rows(2)
    env.reset(seed=0)
    eos = env.objective.reference.eos_ids[0]
    seen: list[list[list[int]]] = [[], []]

    def reset(*rows: int) -> None:
        mask = np.isin(np.arange(4), rows)
        tokens, _ = env.reset(options={"reset_mask": mask})
        for row in rows:
            seen[row].append(tokens[row].tolist())

    env.step(np.array([eos, 4, 4, 4]))
    reset(0)  # row 0 is one episode ahead
    env.step(np.array([eos, eos, 4, 4]))
    reset(0, 1)
    env.step(np.array([4, eos, 4, 4]))
    reset(1)
    assert seen[0] == seen[1]


def test_a_step_whose_reward_fails_can_be_taken_again(make_vector_env, actor):
    down = [True]

    def sometimes(prompts, responses):
        if down.pop():
            raise TimeoutError("the judge does not answer")
        return [1.0] * len(prompts)

    def constant(prompts, responses):
        return [1.0] * len(prompts)

    def length(responses):
        return torch.ones(int(responses.sequences.lengths.sum()))

    envs = []
    for reward in (sometimes, constant):
        env = make_vector_env(2, reward=reward)
        env.objective.token_rewards = (length,)
        env.bind_actor(actor)
        env.reset(seed=0)
        env.step(np.array([5, 6]))
        envs.append(env)
    actions = np.array([5, envs[0].objective.reference.eos_ids[0]])
    with pytest.raises(InputError, match=r"sometimes.*TimeoutError"):
        envs[0].step(actions)
    down.append(False)
    ours, theirs = (env.step(actions) for env in envs)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    infos = [out[4]["final_info"] for out in (ours, theirs)]
    for key in ("kl_sum", "score"):
        assert infos[0][key][1] == infos[1][key][1] != 0
    assert envs[0].episodes == envs[1].episodes == 1
