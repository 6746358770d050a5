"""Stable-Baselines3 runs unedited on the policy, on rows and on whole sequences alike."""

import copy
import gc
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BUDGET,
    MAX_PROMPT,
    PLAIN,
    PROMPTS,
    V,
    count_forwards,
    draw_responses,
    hidden_alone,
    log_probs_alone,
)
from stable_baselines3 import A2C
from stable_baselines3 import PPO as StockPPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from agents.sb3 import PPO, CausalLMPolicy, SequenceRolloutBuffer, TokenSB3VecEnv, build
from agents.sb3.ptx import PretrainingMix
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.envs.acts import acts_since, look_up, next_number
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.precision import warn_if_emulated
from rlhf_gym.tokens import PAD, Sequences, continuations, pad_rows

N = 4


@pytest.fixture
def make_learner(make_vector_env) -> Callable[..., Any]:
    def make(
        algorithm: type[BaseAlgorithm] = PPO,
        env: TokenVectorEnv | None = None,
        env_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        env = env or make_vector_env(N, **(env_options or {}))
        plain = PLAIN if algorithm is PPO else {}
        return build(algorithm, env, device="cpu", **{"seed": 0, **plain, **kwargs})

    return make


@pytest.fixture
def make_policy(make_learner) -> Callable[..., CausalLMPolicy]:
    """A policy with a value head that says something."""

    def make(family: str = "llama") -> CausalLMPolicy:
        options = stock_options(StockPPO, BUDGET)
        policy = make_learner(StockPPO, env_options={"family": family}, **options).policy
        torch.manual_seed(5)
        nn.init.normal_(policy.critic.head.weight, std=0.3)
        nn.init.normal_(policy.critic.head.bias)
        return policy

    return make


class Watch(BaseCallback):
    """Calls functions where SB3 calls back."""

    def __init__(self, rollout_end: Any = None, step: Any = None) -> None:
        super().__init__()
        self._rollout_end, self._step = rollout_end, step

    def _on_step(self) -> bool:
        if self._step is not None:
            self._step(self.locals.get("wave", self.locals["infos"]))
        return True

    def _on_rollout_end(self) -> None:
        if self._rollout_end is not None:
            self._rollout_end(self.model)


def stock_options(algorithm: type[BaseAlgorithm], n_steps: int) -> dict[str, Any]:
    options: dict[str, Any] = {"n_steps": n_steps, "learning_rate": 1e-3}
    if algorithm is StockPPO:
        options |= {"batch_size": n_steps * N // 2, "n_epochs": 2}
    return options


def digest(model: nn.Module) -> str:
    parts = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        parts.update(name.encode() + tensor.numpy().tobytes())
    return parts.hexdigest()


def assert_states_close(
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    atol: float = 1e-5,
    rtol: float = 1e-4,
) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}"
        )


def prompt_rows(lm: CausalLM) -> torch.Tensor:
    rows = [lm.tokenizer(text)["input_ids"] for text in PROMPTS]
    return torch.from_numpy(pad_rows(rows, MAX_PROMPT))


def some_sequences(policy: CausalLMPolicy) -> Sequences:
    responses = draw_responses(len(PROMPTS), BUDGET)
    return continuations(prompt_rows(policy.core), torch.from_numpy(responses))


def row_a_token(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """The same states as SB3 has them: observations (M, L), actions (M,)."""
    observations, actions = [], []
    for tokens, start, length in zip(*(part.tolist() for part in sequences), strict=True):
        for t in range(start, start + length):
            observations.append(tokens[:t])
            actions.append(tokens[t])
    return torch.from_numpy(pad_rows(observations, MAX_PROMPT + BUDGET)), torch.tensor(actions)


# Stock algorithms


@pytest.mark.parametrize("n_steps", [BUDGET - 2, BUDGET, BUDGET + 2])
@pytest.mark.parametrize("buffer", [RolloutBuffer, SequenceRolloutBuffer])
@pytest.mark.parametrize("algorithm", [StockPPO, A2C])
def test_stock_algorithms_run_unedited(make_learner, algorithm, buffer, n_steps):
    learner = make_learner(
        algorithm, rollout_buffer_class=buffer, **stock_options(algorithm, n_steps)
    )
    kl, errors, tokens = [], [], []

    def check(model: Any) -> None:
        """What train() is about to compute first equals what the rollout computed."""
        model.policy.set_training_mode(True)
        for batch in model.rollout_buffer.get(getattr(model, "batch_size", None)):
            values, log_prob, entropy = model.policy.evaluate_actions(
                batch.observations, batch.actions.long().flatten()
            )
            ratio = (log_prob.detach() - batch.old_log_prob).exp()
            errors.append(float((ratio - 1).abs().max()))
            errors.append(float((values.detach().flatten() - batch.old_values).abs().max()))
            tokens.append(len(log_prob))
            assert entropy.shape == log_prob.shape

    def note(infos: list[dict[str, Any]]) -> None:
        for info in infos:
            kl.append(info["kl"])
            if "episode" in info:
                assert info["TimeLimit.truncated"] is False
                paid = info["score"] - 0.3 * info["kl_sum"]
                assert info["episode"]["r"] == pytest.approx(paid, abs=1e-5)

    before = digest(learner.policy)
    learner.learn(2 * n_steps * N, callback=Watch(check, note))
    assert max(errors) < 1e-5
    assert sum(tokens) == len(kl) == 2 * n_steps * N
    first, second = np.abs(kl[: n_steps * N]), np.abs(kl[n_steps * N :])
    assert first.max() < 1e-5, "KL is 0 before the first update"
    assert second.max() > 1e-4
    assert digest(learner.policy) != before


@pytest.mark.parametrize("n_steps", [BUDGET - 2, 2 * BUDGET + 2])
def test_rows_and_sequences_make_the_same_update(make_learner, n_steps):
    """One minibatch of everything: no shuffle differs, so neither may a parameter."""
    ends, moved = [], 0.0
    for buffer in (RolloutBuffer, SequenceRolloutBuffer):
        learner = make_learner(  # seeds everything
            StockPPO,
            rollout_buffer_class=buffer,
            n_steps=n_steps,
            batch_size=n_steps * N,
            n_epochs=2,
            ent_coef=0.01,
            learning_rate=0.05,
            policy_options={"optimizer_class": torch.optim.SGD},
        )
        start = {k: v.clone() for k, v in learner.policy.state_dict().items()}
        learner.learn(2 * n_steps * N)
        ends.append(learner.policy.state_dict())
        moved = max(float((ends[-1][k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3
    assert_states_close(*ends)


# The policy


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_sequences_are_rows_a_token(make_policy, family):
    policy = make_policy(family)
    sequences = some_sequences(policy)
    observations, actions = row_a_token(sequences)
    assert torch.equal(sequences.chosen(), actions)
    whole = policy.evaluate_actions(sequences, actions)
    rows = policy.evaluate_actions(observations, actions)
    m = len(actions)
    for a, b, shape in zip(whole, rows, [(m, 1), (m,), (m,)], strict=True):
        assert a.shape == b.shape == shape
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    values, log_probs, entropies = rows
    flat = zip(observations, actions.tolist(), values, log_probs, entropies, strict=True)
    with torch.no_grad():
        for state, action, value, log_prob, entropy in flat:
            hidden = hidden_alone(policy.core, state.tolist())
            log_p = torch.log_softmax(policy.lm.get_output_embeddings()(hidden)[:V] / 0.8, -1)
            assert float(value) == pytest.approx(float(policy.critic.head(hidden)), abs=2e-5)
            assert float(log_prob) == pytest.approx(float(log_p[action]), abs=2e-5)
            assert float(entropy) == pytest.approx(-float(log_p.exp() @ log_p), abs=2e-5)
    for form in (sequences, observations):
        torch.testing.assert_close(policy.predict_values(form), values, atol=1e-5, rtol=1e-5)
        distribution = policy.get_distribution(form)
        torch.testing.assert_close(distribution.log_prob(actions), log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(distribution.entropy(), entropies, atol=1e-5, rtol=1e-5)
    scored = policy.score(sequences)
    torch.testing.assert_close(scored[0], values.flatten(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored[1], log_probs, atol=1e-5, rtol=1e-5)


def test_sequences_have_the_gradient_of_rows_a_token(make_policy):
    policy = make_policy()
    sequences = some_sequences(policy)
    observations, actions = row_a_token(sequences)
    weights = torch.randn(3, len(actions))
    gradients = []
    for form in (sequences, observations):
        policy.zero_grad()
        values, log_probs, entropy = policy.evaluate_actions(form, actions)
        (weights @ torch.stack([values.flatten(), log_probs, entropy]).T).trace().backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    assert_states_close(*gradients, atol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_gradients_flow_wherever_they_are_enabled(make_policy):
    """TRPO asks for distributions and values inside train(); a memo would freeze the trunk."""
    policy = make_policy()
    observations, _ = row_a_token(some_sequences(policy))
    policy.set_training_mode(False)
    with torch.no_grad():
        policy(observations)
    embedding = policy.lm.get_input_embeddings().weight
    for output in (
        policy.predict_values(observations).sum(),
        policy.get_distribution(observations).entropy().sum(),
    ):
        (gradient,) = torch.autograd.grad(output, embedding)
        assert gradient.abs().max() > 0


@torch.no_grad()
def test_acting_equals_evaluating(make_policy):
    policy = make_policy()
    policy.set_training_mode(False)
    observations, _ = row_a_token(some_sequences(policy))
    with count_forwards(policy.core) as shapes:
        actions, values, log_probs = policy(observations)
        assert len(shapes) == 1
    expected = policy.evaluate_actions(observations, actions)
    torch.testing.assert_close(values, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs, expected[1], atol=1e-5, rtol=1e-5)
    best, *_ = policy(observations, deterministic=True)
    assert torch.equal(best, policy.get_distribution(observations).mode())
    predicted, _ = policy.predict(observations.numpy(), deterministic=True)
    assert predicted.tolist() == best.tolist()


def test_no_entropy_is_computed_where_none_is_asked_for(make_learner):
    learner = make_learner(
        StockPPO, n_steps=4, batch_size=8, n_epochs=1, policy_options={"entropy": False}
    )
    assert learner.policy.evaluate_actions(*row_a_token(some_sequences(learner.policy)))[2] is None
    learner.learn(4 * N)


def test_critic_starts_at_zero_and_only_its_own_weights_are_in_the_policy(make_learner):
    learner = make_learner()
    assert not learner.policy.predict_values(some_sequences(learner.policy)).any()
    reference = learner.env.token_env.objective.reference
    names = {name.split(".")[0] for name, _ in learner.policy.named_parameters()}
    assert names == {"lm", "critic"}
    ours = {p.data_ptr() for p in learner.policy.parameters()}
    assert not ours & {p.data_ptr() for p in reference.model.parameters()}
    for name, value in reference.model.state_dict().items():
        assert torch.equal(learner.policy.lm.state_dict()[name], value), name


@torch.no_grad()
def test_new_parameters_are_acted_on_at_once(make_learner):
    one, two = make_learner(), make_learner(env_options={"seed": 3})
    observations, _ = row_a_token(some_sequences(one.policy))
    for learner in (one, two):
        learner.policy.set_training_mode(False)
        learner.policy(observations)
    one.set_parameters(two.get_parameters())
    torch.testing.assert_close(
        one.policy.get_distribution(observations).log_p,
        two.policy.get_distribution(observations).log_p,
    )


# The actor binding


@torch.no_grad()
def test_the_environment_knows_what_the_forward_chose(make_learner):
    learner = make_learner()
    policy, env = learner.policy, learner.env.token_env
    policy.set_training_mode(False)
    observations, _ = env.reset(seed=0)
    for _ in range(12):
        actions, _, log_probs = policy(torch.from_numpy(observations))
        with count_forwards(policy.core) as shapes:
            observations, *_, infos = env.step(actions.numpy())
        assert shapes == [], "no forward of the policy"
        paid = whole(infos, "kl") + whole(infos, "ref_log_prob")
        np.testing.assert_allclose(paid, log_probs.numpy(), atol=1e-6)
        np.testing.assert_allclose(whole(infos, "kl"), 0, atol=1e-5)


@torch.no_grad()
def test_the_actor_is_asked_only_for_what_it_did_not_choose(make_learner):
    learner = make_learner()
    policy, env = learner.policy, learner.env.token_env
    policy.set_training_mode(False)
    observations, _ = env.reset(seed=0)
    actions, _, log_probs = policy(torch.from_numpy(observations))
    others = actions.numpy().copy()
    others[1] = (others[1] + 1) % V
    with count_forwards(policy.core) as shapes:
        infos = env.step(others)[4]
        assert [rows for rows, _ in shapes] == [1], "one row was not known"
    got = whole(infos, "kl") + whole(infos, "ref_log_prob")
    np.testing.assert_allclose(got[[0, 2, 3]], log_probs.numpy()[[0, 2, 3]], atol=1e-6)
    alone = log_probs_alone(policy.core, observations[1], others[1:2])
    assert got[1] == pytest.approx(float(alone), abs=1e-5)
    fresh = make_learner().policy
    np.testing.assert_allclose(fresh.log_prob(observations, others), got, atol=1e-5)


def whole(infos: dict[str, Any], key: str) -> np.ndarray:
    """An info of all rows, ended or not."""
    final = infos.get("final_info", {}).get(key, np.zeros(N))
    return np.where(infos.get("_final_info", np.zeros(N, bool)), final, infos[key])


@torch.no_grad()
def test_equal_rows_with_different_actions_are_told_apart(make_learner):
    policy = make_learner().policy
    policy.set_training_mode(False)
    rows = np.repeat(prompt_rows(policy.core).numpy()[:1], 50, axis=0)
    before = next_number()
    actions, _, log_probs = policy(torch.from_numpy(rows))
    assert len(set(actions.tolist())) > 1
    turned = slice(None, None, -1)
    found, known = look_up(acts_since(before)[policy], rows[turned], actions.numpy()[turned])
    assert known.all()
    np.testing.assert_array_equal(found, log_probs.numpy()[turned])


def test_the_helper_binds_and_a_dropped_learner_unbinds(make_vector_env):
    env = make_vector_env(2)
    learner = build(PPO, env, **PLAIN, device="cpu")
    env.reset(seed=0)
    assert env.step(np.array([4, 5]))[4]["actor_bound"].all()
    copy.deepcopy(env).bind_actor(None)
    del learner
    gc.collect()
    assert not env.step(np.array([4, 5]))[4]["actor_bound"].any()


# The buffer


def gae_of(rewards: list[float], values: list[float], last: float, lam: float) -> list[float]:
    """Advantages of one sequence, γ = 1."""
    advantages, running = [], 0.0
    following = [*values[1:], last]
    for reward, value, after in list(zip(rewards, values, following, strict=True))[::-1]:
        running = reward + after - value + lam * running
        advantages.insert(0, running)
    return advantages


def filled_buffer(make_vector_env, waves: int = 3, lam: float = 0.9) -> Any:
    """A buffer of whole responses and what was put in, response by response."""
    env = make_vector_env(N)
    buffer = SequenceRolloutBuffer(
        waves * BUDGET,
        env.single_observation_space,
        env.single_action_space,
        device="cpu",
        gae_lambda=lam,
        gamma=1.0,
        n_envs=N,
    )
    rng = np.random.default_rng(0)
    held = []
    for wave in range(waves):
        actions = draw_responses(N, BUDGET, seed=wave)
        prompts, _ = env.reset(seed=wave)
        rewards, values, log_probs = rng.normal(size=(3, N, BUDGET))  # junk behind the ends, too
        buffer.add_responses(prompts, actions, rewards, values, log_probs)
        for i in range(N):
            n = int((actions[i] != PAD).sum())
            held.append(
                (prompts[i], actions[i][:n], rewards[i][:n], values[i][:n], log_probs[i][:n])
            )
    buffer.compute_returns_and_advantage(torch.full((N,), 9.0), np.ones(N))
    return buffer, held


def test_ragged_gae_is_a_loop_over_each_sequence(make_vector_env):
    buffer, held = filled_buffer(make_vector_env)
    assert len({len(actions) for _, actions, *_ in held}) > 2
    assert buffer.n_tokens == sum(len(actions) for _, actions, *_ in held)
    empty = buffer.actions == PAD
    assert empty.any()
    for name in ("rewards", "values", "log_probs", "advantages"):
        assert not getattr(buffer, name)[empty].any(), f"{name} behind a response's end"
    assert buffer.episode_starts[empty].all()
    (batch,) = buffer.get(None)
    rows = zip(
        batch.observations.tokens,
        batch.observations.starts.tolist(),
        *(
            part.split(batch.observations.lengths.tolist())
            for part in batch[1:6]  # actions, values, log-probs, advantages, returns
        ),
        strict=True,
    )
    # The first value tells the responses apart.
    got = {round(float(parts[1][0]), 5): (tokens, start, parts) for tokens, start, *parts in rows}
    assert len(got) == len(held)
    for prompt, actions, rewards, values, log_probs in held:
        tokens, start, parts = got[round(float(np.float32(values[0])), 5)]
        prompt = prompt[prompt != PAD]
        assert tokens[tokens != PAD].tolist() == [*prompt.tolist(), *actions.tolist()]
        assert start == len(prompt)
        advantages = gae_of(rewards.tolist(), values.tolist(), 0.0, 0.9)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        for part, expected in zip(
            parts, (actions, values, log_probs, advantages, returns), strict=True
        ):
            np.testing.assert_allclose(part.flatten(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_minibatches_hold_each_token_once(make_vector_env, batch_size):
    buffer, held = filled_buffer(make_vector_env)
    total = buffer.n_tokens
    batches = list(buffer.get(batch_size))
    got = np.sort(np.concatenate([batch.old_values.flatten() for batch in batches]))
    expected = np.sort(np.concatenate([values for *_, values, _ in held]))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert len(batches) <= max(1, round(total / batch_size))
    for batch in batches:
        assert len(batch.actions) <= batch_size + BUDGET
        sequences = batch.observations
        assert torch.equal(sequences.chosen(), batch.actions.flatten())
        assert sequences.tokens.shape[1] == sequences.width, "no padding that no row needs"
    one, two = (next(iter(buffer.get(batch_size))).actions.tolist() for _ in range(2))
    assert batch_size == 1000 or one != two, "reshuffled each pass"


@pytest.mark.parametrize("n_steps", [3, 12])
def test_steps_and_rows_make_the_same_segments_and_advantages(make_learner, n_steps):
    learner = make_learner(
        StockPPO,
        rollout_buffer_class=SequenceRolloutBuffer,
        n_steps=n_steps,
        batch_size=n_steps * N,
        gae_lambda=0.9,
    )
    nn.init.normal_(learner.policy.critic.head.weight, std=0.3)
    steps: list[Any] = []
    ends: list[Any] = []

    class Recorder(SequenceRolloutBuffer):
        def add(self, *args: Any) -> None:
            steps.append([np.asarray(arg).copy() for arg in args])
            super().add(*args)

        def compute_returns_and_advantage(self, last_values: Any, dones: Any) -> None:
            ends.append((last_values.flatten().tolist(), dones.copy()))
            super().compute_returns_and_advantage(last_values, dones)

    learner.rollout_buffer.__class__ = Recorder
    batches = []
    learner.learn(
        n_steps * N,
        callback=Watch(lambda model: batches.extend(model.rollout_buffer.get(None))),
    )
    expected = []
    last_values, dones = ends[0]
    for env in range(N):
        cuts = [t for t in range(n_steps) if t == 0 or steps[t][3][env]]
        for begin, end in zip(cuts, [*cuts[1:], n_steps], strict=True):
            rewards, values = (
                [float(steps[t][k].flatten()[env]) for t in range(begin, end)] for k in (2, 4)
            )
            open_end = end == n_steps and not dones[env]
            last = last_values[env] if open_end else 0.0
            state = steps[begin][0][env]
            actions = [int(steps[t][1].flatten()[env]) for t in range(begin, end)]
            row = [*state[state != PAD].tolist(), *actions]
            expected.append((row, len(row) - len(actions), gae_of(rewards, values, last, 0.9)))
    sequences = batches[0].observations
    advantages = batches[0].advantages.split(sequences.lengths.tolist())
    got = [
        ([t for t in tokens if t != PAD], start, parts.tolist())
        for tokens, start, parts in zip(
            sequences.tokens.tolist(), sequences.starts.tolist(), advantages, strict=True
        )
    ]
    assert [g[:2] for g in sorted(got)] == [e[:2] for e in sorted(expected)]
    for g, e in zip(sorted(got), sorted(expected), strict=True):
        np.testing.assert_allclose(g[2], e[2], atol=1e-5, rtol=1e-5)


# The flagship


def test_flagships_first_ratio_is_one_and_first_kl_zero(make_learner):
    learner = make_learner(n_waves=3, n_epochs=2, n_minibatches=2, learning_rate=1e-3)
    kls = []

    def check(model: Any) -> None:
        record, buffer = model.logger.name_to_value, model.rollout_buffer
        kls.append(record["rollout/kl_per_sequence"])
        episodes = record["rollout/episodes"]
        assert episodes == 3 * N
        paid = float(buffer.rewards.sum()) / episodes
        assert paid == pytest.approx(record["rollout/objective"], abs=1e-5)

    for turn in range(1, 4):
        before = learner.num_timesteps
        learner.learn(1, callback=Watch(check), reset_num_timesteps=False)
        record = learner.logger.name_to_value
        assert record["train/ratio_first_max_error"] < 1e-5, f"update {turn}"
        assert record["train/n_updates"] == 2 * turn
        assert learner.num_timesteps - before == learner.rollout_buffer.n_tokens
    assert kls[0] == pytest.approx(0, abs=1e-5)
    assert abs(kls[1]) > 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("own_critic", [False, True])
def test_a_rollout_holds_what_the_training_code_says_of_it(
    make_learner, save_lm, own_critic, precision
):
    policy_options: dict[str, Any] = {"precision": precision}
    if own_critic:
        policy_options["critic"] = save_lm(seed=7)
    learner = make_learner(n_waves=2, policy_options=policy_options)
    policy, scored, passes = learner.policy, [], []
    score = policy.score

    def watched(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        passes.append(score(sequences))
        return passes[-1]

    policy.score = watched
    nn.init.normal_(policy.critic.head.weight, std=0.3)
    # In bfloat16 other neighbours in a product round otherwise.
    close = {"atol": 1e-5 if precision == "fp32" else 5e-2, "rtol": 1e-5}

    def check(model: Any) -> None:
        buffer = model.rollout_buffer
        rollout = [torch.cat(parts) for parts in zip(*passes, strict=True)]
        for minibatch in buffer.get(None):
            kept = (minibatch.old_values, minibatch.old_log_prob)
            for ours, theirs in zip(kept, rollout, strict=False):  # in bfloat16, to the last bit
                assert torch.equal(ours.sort().values, theirs.sort().values)
            values, log_probs = policy.score(minibatch.observations)
            torch.testing.assert_close(minibatch.old_values, values, **close)
            torch.testing.assert_close(minibatch.old_log_prob, log_probs, **close)
            scored.append(values)

    learner.learn(1, callback=Watch(check))
    assert torch.cat(scored).std() > 0.1
    # The check's own is one; in bfloat16 each wave took another.
    assert len(passes) == (1 if precision == "fp32" else 3)


def test_flagship_costs_one_forward_an_episode_not_one_a_token(make_learner):
    learner = make_learner(n_epochs=2, n_minibatches=1)
    with count_forwards(learner.policy.core) as shapes:
        learner.learn(1)
    lengths = (learner.rollout_buffer.actions != PAD).sum(0)
    whole = [rows for rows, tokens in shapes if tokens > 1]
    assert whole[1:] == [N] * 2, "one for each epoch; decoding has already scored"
    assert whole[0] <= N, "a prefill of the distinct prompts"
    assert len(shapes) - 3 == lengths.max() - 1, "decode steps"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_critic_decoding_has_already_scored_what_it_chose(
    make_learner, make_vector_env, precision
):
    env = make_vector_env(2 * N)
    env.group_rows(2)
    learner = make_learner(
        env=env,
        policy_options={"precision": precision},
        baseline="leave_one_out",
        n_epochs=2,
        n_minibatches=1,
        learning_rate=1e-2,
    )
    passes = {"fp32": 3, "bf16": 4}[precision]  # bfloat16 rounds otherwise a token at a time
    for _ in range(3):
        with count_forwards(learner.policy.core) as shapes:
            learner.learn(1, reset_num_timesteps=False)
        whole = [rows for rows, tokens in shapes if tokens > 1]
        assert whole[0] <= N, "one prefill for both rows of a prompt"
        assert whole[1:] == [2 * N] * (passes - 1)
        record = learner.logger.name_to_value
        if precision == "fp32":
            assert record["train/ratio_first_max_error"] < 1e-5
        assert "train/value_loss" not in record
        assert record["train/gradient_norm"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_parameter_moves_in_one_update(make_learner, family):
    learner = make_learner(env_options={"family": family}, n_waves=2, n_minibatches=1, n_epochs=1)
    before = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    learner.learn(1)
    for name, parameter in learner.policy.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"


@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
def test_microbatches_do_not_change_the_gradient(make_learner, ent_coef):
    states = []
    for microbatch_tokens in (1, 30, 1 << 14):
        learner = make_learner(
            n_waves=3,
            n_epochs=1,
            n_minibatches=1,
            kl_old_coef=0.1,
            ent_coef=ent_coef,
            learning_rate=1.0,
            max_grad_norm=1e9,
            microbatch_tokens=microbatch_tokens,
            policy_options={"optimizer_class": torch.optim.SGD},
        )
        start = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
        learner.learn(1)
        assert len(set((learner.rollout_buffer.actions != PAD).sum(0).tolist())) > 1
        # With SGD and learning rate 1 a step is the gradient.
        states.append({n: start[n] - p.detach() for n, p in learner.policy.named_parameters()})
        states[-1]["value_loss"] = torch.tensor(learner.logger.name_to_value["train/value_loss"])
    assert min(float(part.abs().max()) for part in states[2].values()) > 1e-4
    for other in states[:2]:
        assert_states_close(other, states[2], atol=2e-5)


def test_the_loss_is_the_documented_one(make_learner):
    """At the first step the gradient is that of mean(A log π − c (V − R)²), written out."""
    learner = make_learner(
        n_waves=2,
        n_epochs=1,
        n_minibatches=1,
        vf_coef=0.3,
        kl_old_coef=0.7,  # has no gradient where π_θ = π_old
        normalize_advantage=True,
        learning_rate=1.0,
        max_grad_norm=1e9,
        policy_options={"optimizer_class": torch.optim.SGD},
    )
    gradients: dict[str, torch.Tensor] = {}

    def expected(model: Any) -> None:
        (batch,) = model.rollout_buffer.get(None)
        advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
        values, log_probs, _ = model.policy.evaluate_actions(*row_a_token(batch.observations))
        gain = advantages * log_probs - 0.3 * (values.flatten() - batch.returns) ** 2
        model.policy.zero_grad()
        (-gain.mean()).backward()
        gradients.update({n: p.grad.clone() for n, p in model.policy.named_parameters()})

    start = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    learner.learn(1, callback=Watch(expected))
    steps = {n: start[n] - p.detach() for n, p in learner.policy.named_parameters()}
    assert_states_close(steps, gradients, atol=2e-5)


def test_target_kl_stops_an_update_early(make_learner):
    learner = make_learner(n_waves=2, n_epochs=20, n_minibatches=1, target_kl=1e-3)
    learner.learn(1)
    assert 0 < learner.logger.name_to_value["train/n_updates"] < 20


def test_flagship_refuses_a_discount_and_other_autoreset_modes(make_vector_env):
    with pytest.raises(InputError, match="gamma"):
        build(PPO, make_vector_env(2), **PLAIN, device="cpu", gamma=0.99)
    with pytest.raises(InputError, match="SameStep"):
        build(PPO, make_vector_env(2, autoreset_mode="NextStep"), **PLAIN, device="cpu")


@pytest.mark.parametrize("algorithm", [PPO, StockPPO])
def test_a_wrong_starting_model_is_refused(make_vector_env, save_lm, algorithm):
    wider = save_lm("llama", vocab_size=V + 8)
    build(algorithm, make_vector_env(2), device="cpu", policy_options={"model": wider})
    env = make_vector_env(2)
    env.single_action_space.n = np.int64(V + 1)
    with pytest.raises(ValueError, match="usable tokens"):
        build(algorithm, env, device="cpu")


# Saving, and what must not change


@pytest.mark.parametrize("algorithm", [PPO, StockPPO])
def test_loaded_is_saved(make_learner, make_vector_env, tmp_path, algorithm):
    options = {} if algorithm is PPO else stock_options(algorithm, BUDGET)
    if algorithm is StockPPO:
        options["rollout_buffer_class"] = SequenceRolloutBuffer
    learner = make_learner(algorithm, **options)
    if algorithm is PPO:
        texts = Sequences(torch.tensor([[3, 4, 5]]), torch.tensor([1]), torch.tensor([2]))
        learner.ptx = PretrainingMix(texts, 0.5)
    learner.learn(1)
    learner.save(tmp_path / "learner")
    env = make_vector_env(N)
    loaded = algorithm.load(tmp_path / "learner", env=TokenSB3VecEnv(env), device="cpu")
    assert digest(loaded.policy) == digest(learner.policy)
    sequences = some_sequences(learner.policy)
    observations, actions = row_a_token(sequences)
    for form in (sequences, observations):
        for ours, theirs in zip(
            learner.policy.evaluate_actions(form, actions),
            loaded.policy.evaluate_actions(form, actions),
            strict=True,
        ):
            assert torch.equal(ours, theirs) if ours is not None else theirs is None
    predictions = [
        each.predict(observations.numpy(), deterministic=True)[0] for each in (learner, loaded)
    ]
    np.testing.assert_array_equal(*predictions)
    env.bind_actor(loaded.policy)
    loaded.learn(1)
    assert digest(loaded.policy) != digest(learner.policy), "it goes on learning"
    if algorithm is PPO:
        assert loaded.logger.name_to_value["train/ptx_loss"] > 0, "from its texts, too"


def test_a_saved_policy_loads_by_itself(make_learner, tmp_path):
    learner = make_learner()
    learner.learn(1)
    learner.policy.save(tmp_path / "policy.zip")
    loaded = CausalLMPolicy.load(tmp_path / "policy.zip", device="cpu")
    assert digest(loaded) == digest(learner.policy)
    assert loaded.core.temperature == learner.policy.core.temperature == 0.8
    learner.policy.lm.save_pretrained(tmp_path / "lm")
    learner.policy.core.tokenizer.save_pretrained(tmp_path / "lm")
    lm = CausalLM.load(str(tmp_path / "lm"), temperature=0.8)
    sequences = some_sequences(learner.policy)
    torch.testing.assert_close(lm.log_probs(sequences), learner.policy.score(sequences)[1])


@torch.no_grad()
def test_a_copied_policy_is_a_policy_of_its_own(make_policy):
    policy = make_policy()
    policy.set_training_mode(False)
    observations, actions = row_a_token(some_sequences(policy))
    policy(observations)
    other = copy.deepcopy(policy)
    before = policy.get_distribution(observations).log_prob(actions)
    for parameter in other.lm.parameters():
        parameter.mul_(1.1)
    torch.testing.assert_close(policy.get_distribution(observations).log_prob(actions), before)
    after = other.get_distribution(observations).log_prob(actions)
    assert (after - before).abs().max() > 1e-2
    expected = log_probs_alone(other.core, observations[0], actions[:1])
    assert float(after[0]) == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize("algorithm", [PPO, StockPPO, A2C])
def test_training_leaves_the_shared_reference_alone(
    make_learner, save_lm, save_reward_model, prompt_file, algorithm
):
    from rlhf_gym.tasks.text import text_vector_env

    words = {
        "reference": save_lm("llama", seed=11),
        "reward_model": save_reward_model(),
        "prompts": prompt_file,
        "max_prompt_tokens": MAX_PROMPT,
        "max_new_tokens": BUDGET,
        "split": "all",
        "device": "cpu",
    }
    env, other = (text_vector_env(num_envs=N, **words) for _ in range(2))
    reference, reward = env.objective.reference.model, env.objective.reward
    assert other.objective.reference.model is reference, "one frozen copy in the process"
    assert other.objective.reward is reward
    before = digest(reference), digest(reward)
    options = {} if algorithm is PPO else stock_options(algorithm, BUDGET)
    learner = make_learner(algorithm, env, **options)
    policy = digest(learner.policy.lm)
    assert policy == digest(reference)
    learner.learn(2 * BUDGET * N)
    assert (digest(reference), digest(reward)) == before
    assert digest(learner.policy.lm) != policy


def test_emulated_bfloat16_is_said_where_it_is_used(make_learner, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    make_learner(policy_options={"precision": "fp32"})
    warn_if_emulated(torch.device("cuda"), "bf16")
    assert "emulated" not in caplog.text
    make_learner(policy_options={"precision": "bf16"})
    assert caplog.text.count("emulated") == 1


def test_sampling_and_scoring_take_float64(make_learner):
    learner = make_learner(policy_options={"critic": None})
    policy = learner.policy.double()
    prompts = torch.tensor([[3, 4, 5], [6, 7, PAD]])
    found = policy.sample_with_log_probs(prompts, 6)
    sequences = continuations(prompts, found.responses)
    values, log_probs = policy.score(sequences)
    taken = found.responses != PAD
    torch.testing.assert_close(found.log_probs[taken], log_probs, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.values[taken], values, atol=1e-6, rtol=0)
    torch.testing.assert_close(policy.values(sequences), values, atol=1e-6, rtol=0)
