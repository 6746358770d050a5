"""Shaping is a pure function of (x, y): paid alike by `step` and `play`, and part of R."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import PLAIN

from agents.sb3 import PPO, build
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.rewards import shaping
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tasks.exact import ASSETS
from rlhf_gym.tokens import PAD, continuations, pad_rows, row_sums

EOS = 8
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"dense": True},
    "token_bonus": {"token_rewards": [["token_bonus", {"bonus": {"a": 0.5, "</s>": -0.25}}]]},
    "cuts": {
        "cuts": [["stop_token", {"token": "b", "after": 1}]],
        "shaping": [["missing_token", {"token": "b", "score": -1.0}]],
    },
    "many": {
        "shaping": [
            ["length_penalty", {"coef": 0.1, "free": 1}],
            ["missing_eos", {"penalty": 0.7}],
            ["repetition_penalty", {"coef": 1.0, "n": 1}],
            ["clip", {"low": -0.5, "high": 0.5}],
        ],
        "dense": True,
        "token_rewards": [["token_bonus", {"bonus": {"c": 1.0}}]],
    },
}


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM.load(str(ASSETS / "reference"))


def responses_of(lm: CausalLM, *texts: str) -> Responses:
    rows = [lm.tokenizer(text)["input_ids"] for text in texts]
    prompts = torch.zeros(len(rows), 1, dtype=torch.int64)
    return Responses(lm, continuations(prompts, torch.from_numpy(pad_rows(rows))))


def play_both(keywords: dict[str, Any], actions: np.ndarray) -> tuple[Any, ...]:
    """Rewards and scores of the same responses by `play` and by `step`, nobody bound."""
    n = len(actions)
    make = {"num_envs": n, "device": "cpu", "autoreset_mode": "Disabled", **keywords}
    played, stepped = (gymnasium.make_vec("rlhf_gym/Exact-v0", **make) for _ in range(2))
    played.reset(seed=0), stepped.reset(seed=0)
    rewards, infos, _ = played.play(actions)
    paid, scores, over = np.zeros(actions.shape), np.zeros(n), np.zeros(n, dtype=bool)
    for t in range(actions.shape[1]):
        live = np.flatnonzero(~over)
        # Rows that are over wait for the others on a prompt of their own.
        if over.any():
            stepped.reset(options={"reset_mask": over, "prompt_index": 0})
        _, r, ended, _, info = stepped.step(
            np.where(over | (actions[:, t] == PAD), 0, actions[:, t])
        )
        paid[live, t] = r[live]
        for i in live[ended[live]]:
            scores[i] = info["score"][i]
        over |= ended
    return rewards, infos["score"], paid, scores, played


@pytest.mark.parametrize("name", SHAPES)
def test_step_and_play_pay_the_same(name):
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 9, (32, 4))
    for row in actions:
        ends = np.flatnonzero(row == EOS)
        if len(ends):
            row[ends[0] + 1 :] = PAD
    rewards, score, paid, stepped, env = play_both(SHAPES[name], actions)
    np.testing.assert_allclose(rewards, paid, atol=1e-5)
    np.testing.assert_allclose(score, stepped, atol=1e-5)
    # Σ r = R + β Σ log π_ref (nobody is bound), whatever the shaping.
    objective = env.objective
    prompts = torch.tensor([[i] for i in env.reset(seed=0)[0][:, 0]])
    sequences = continuations(prompts, torch.from_numpy(actions))
    known = objective.kl_coef * row_sums(objective.ref_log_probs(sequences), sequences.lengths)
    np.testing.assert_allclose(rewards.sum(1), score + known.numpy(), atol=1e-5)


def enumerated(**keywords: Any) -> Enumeration:
    env = gymnasium.make("rlhf_gym/Exact-v0", device="cpu", max_new_tokens=3, **keywords).unwrapped
    return Enumeration(env.objective, env.prompts.ids[:2], max_new_tokens=3)


def test_dense_rewards_change_no_policy_s_objective():
    sparse, dense = enumerated(), enumerated(dense=True)
    for depth in range(3):
        np.testing.assert_allclose(sparse.scores[depth], dense.scores[depth], atol=1e-5)
    actions = np.array([[0, 1, 2]])
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", device="cpu", max_new_tokens=3, dense=True)
    env.reset(seed=0)
    rewards, infos, _ = env.play(actions, np.zeros((1, 3)))
    plain = rewards + env.objective.kl_coef * infos["kl"]
    assert np.abs(plain).min() > 1e-3, "the signal comes at every token"


def test_the_optimum_knows_the_shaping():
    shaped = enumerated(shaping=[["length_penalty", {"coef": 1.0}]])
    assert shaped.best_value.mean() < enumerated().best_value.mean() - 0.5
    np.testing.assert_allclose(shaped.best_value, shaped.best_value_by_sum, atol=1e-9)


def test_each_shaping_by_hand(lm):
    scores = torch.tensor([1.0, 2.0, 3.0])
    seen = responses_of(lm, "a b a b </s>", "a a a", "c </s>")
    cases = [
        (shaping.length_penalty(lm, 0.5, free=2), [-0.5, 1.5, 3.0]),
        (shaping.missing_eos(lm, score=-1.0), [1.0, -1.0, 3.0]),
        (shaping.missing_eos(lm, penalty=0.5), [1.0, 1.5, 3.0]),
        (shaping.clip(lm, high=2.5), [1.0, 2.0, 2.5]),
        (shaping.repetition_penalty(lm, 1.0, n=1), [1 - 2 / 5, 2 - 2 / 3, 3.0]),
        (shaping.missing_token(lm, "a", -9.0), [-9.0, 2.0, -9.0]),
    ]
    for shape, expected in cases:
        torch.testing.assert_close(shape(seen, scores), torch.tensor(expected))


def test_cuts_by_hand(lm):
    seen = responses_of(lm, "a b a b </s>", "a a a", "b c b c")
    assert shaping.stop_token(lm, "b")(seen).texts == [" a b", " a a a", " b"]
    assert shaping.stop_token(lm, "b", after=2)(seen).texts == [" a b a b", " a a a", " b c b"]
    cut = shaping.stop_strings(lm, ["b a", "c"])(seen)
    assert cut.texts == [" a b a", " a a a", " b c"]
    assert cut.sequences.lengths.tolist() == [3, 3, 2]
    assert (cut.sequences.tokens[2, 3:] == PAD).all()
    # However little of it is scored, an EOS ended the first one.
    assert cut.stopped.tolist() == [True, False, False]
    before = shaping.stop_strings(lm, ["b a", "c"], included=False)(seen)
    assert before.texts == [" a", " a a a", " b"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shaping": ["no_such"]}, "cannot import"),
        ({"shaping": [["length_penalty", {"size": 1}]]}, "does not take"),
        ({"shaping": [3]}, r"a name or \[name"),
        ({"shaping": [["missing_eos", {}]]}, "either a score"),
        ({"cuts": [["stop_token", {"token": "zebra"}]]}, "not one token"),
        ({"cuts": [["stop_strings", {"strings": "b"}]]}, "a list of non-empty strings"),
        ({"shaping": [["clip", {"low": 1.0, "high": 0.0}]]}, "low < high"),
        ({"shaping": [["stop_token", {"token": "a"}]]}, "belongs in cuts"),
        ({"cuts": [["token_bonus", {"bonus": {"a": 1.0}}]]}, "belongs in token_rewards"),
        ({"kl_estimator": "k4"}, "kl_estimator: 'k4' is not one of k1, k2, k3"),
        ({"dense": True, "reward_model": "rlhf_gym.tasks.exact:plain"}, "dense=True needs"),
    ],
)
def test_bad_shaping_is_refused(keywords, message):
    with pytest.raises(InputError, match=message):
        gymnasium.make("rlhf_gym/Exact-v0", device="cpu", **keywords)


def test_biased_estimators_need_an_actor():
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", device="cpu", kl_estimator="k3", num_envs=2)
    env.reset(seed=0)
    with pytest.raises(InputError, match="bind an actor"):
        env.step(np.array([1, 1]))
    log_probs = np.full((2, 4), -1.0)
    rewards, infos, _ = env.play(np.ones((2, 4), dtype=np.int64), log_probs)
    ratio = infos["ref_log_prob"] - log_probs
    k3 = np.exp(ratio) - 1 - ratio
    expected = -env.objective.kl_coef * k3
    expected[:, -1] += infos["score"]
    np.testing.assert_allclose(rewards, expected, atol=1e-5)


def test_an_agent_that_plays_whole_responses_refuses_a_wrapped_environment():
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", device="cpu", num_envs=2)
    wrapped = gymnasium.wrappers.vector.TransformReward(env, lambda reward: 2 * reward)
    with pytest.raises(InputError, match="which a wrapper never sees"):
        build(PPO, wrapped, **PLAIN)
