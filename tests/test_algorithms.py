"""Each algorithm is what its paper says, on one environment and one policy, and learns."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import BUDGET, assert_same_gradients, count_forwards, play_rollout
from stable_baselines3.common.utils import set_random_seed

from agents import dpo, nlpo, online_dpo, sb3_dqn, trajectory_balance
from agents.runs.algorithm import load_algorithm
from agents.sb3 import PPO, build
from agents.sb3.groups import GroupLearner, Groups
from agents.sb3.stock.q_network import CausalLMDQNPolicy
from agents.sb3.vec_env import policy_kwargs
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm import batching
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.sampling import Sampled, sample_responses
from rlhf_gym.lm.masks import NEVER
from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.tokens import row_sums

N = 8


def groups(seed: int = 0, g: int = 5, k: int = 4) -> Groups:
    """Random responses; log-probs have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(g, k, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths = torch.randint(1, 9, (g, k), generator=generator)
    return Groups(draw().requires_grad_(), draw(), draw(), draw(), lengths)


# Learning


def optimality(env: TokenVectorEnv, policy: CausalLM) -> tuple[float, Enumeration]:
    task = Enumeration(
        env.objective,
        env.prompts.ids,
        max_new_tokens=env.max_new_tokens,
        stop_at_eos=env.stop_at_eos,
    )
    found = task.value(task.log_probs(policy)).objective.mean()
    before = task.value(task.reference).objective.mean()
    return float((found - before) / (task.best_value.mean() - before)), task


LEARNS = {
    # Optimality that it must reach, far below what it does; tokens; options.
    "ppo": (0.6, 16_000, {"learning_rate": 1e-3}),
    "ppo_single_file": (0.6, 16_000, {"learning_rate": 1e-3}),
    "reinforce": (0.6, 16_000, {"learning_rate": 1e-3}),
    "reinforce_pp": (0.6, 16_000, {"learning_rate": 1e-3}),
    "rloo": (0.6, 16_000, {"learning_rate": 1e-3}),
    "grpo": (0.5, 16_000, {"learning_rate": 1e-3}),
    "expert_iteration": (0.5, 16_000, {"learning_rate": 1e-3}),
    "online_dpo": (0.6, 16_000, {"learning_rate": 1e-3}),
    "dpo": (0.5, 16_000, {"learning_rate": 1e-3}),
    "trajectory_balance": (0.6, 16_000, {"learning_rate": 1e-3}),
    "nlpo": (0.5, 16_000, {"learning_rate": 1e-3}),
    "sb3_ppo": (0.4, 16_000, {"learning_rate": 1e-3, "n_steps": 8}),
    "sb3_a2c": (0.2, 16_000, {"learning_rate": 2e-3, "n_steps": 2}),
    "sb3_trpo": (0.15, 4_000, {"n_steps": 4}),
    "sb3_maskable_ppo": (0.4, 16_000, {"learning_rate": 1e-3, "n_steps": 8}),
}


@pytest.mark.parametrize("name", LEARNS)
def test_it_learns_the_enumerable_task(name, tmp_path):
    least, tokens, options = LEARNS[name]
    set_random_seed(0)
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=256, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    env.reset(seed=0)
    module = load_algorithm(name)
    learner = module.make(module.Config(**options), env)
    learner.learn(tokens)
    learner.save(tmp_path / "policy")
    policy = CausalLM.load(str(tmp_path / "policy")).following(env.objective.reference)
    assert optimality(env, policy)[0] > least


@pytest.mark.parametrize("name", ["sb3_dqn", "sb3_qrdqn"])
def test_a_deterministic_agent_learns_toward_the_best_deterministic_policy(name, tmp_path):
    set_random_seed(0)
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=64, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    env.reset(seed=0)
    module = load_algorithm(name)
    options = {"learning_starts": 1000, "target_update_interval": 1000}
    learner = module.make(module.Config(learning_rate=1e-3, **options), env)
    reference = env.objective.reference
    start, task = optimality(env, learner.policy.greedy().following(reference))
    learner.learn(20_000)
    learner.save(tmp_path / "policy")
    policy = CausalLM.load(str(tmp_path / "policy")).following(reference)
    reached, _ = optimality(env, policy)
    before, best = task.value(task.reference).objective.mean(), task.best_value.mean()
    most = float((task.best_deterministic.objective.mean() - before) / (best - before))
    assert start < reached <= most + 1e-3
    assert reached - start > 0.2 * (most - start)


OTHERS = ("ppo_seed", "ppo_ziegler2019", "ppo_nplus2024", "ppo_rl4lms", "sb3_dqn", "sb3_qrdqn")
LIBRARIES = {"tianshou_ppo": "tianshou", "rllib_ppo": "ray"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*LEARNS, *OTHERS, *LIBRARIES])
def test_it_runs_on_the_reviews(name, tmp_path):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    set_random_seed(0)
    env = gymnasium.make_vec("rlhf_gym/Reviews-v0", num_envs=32, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    env.reset(seed=0)
    module = load_algorithm(name)
    # Longer than any of them waits for before it learns.
    rows = {"n_steps": 4} if "n_steps" in module.Config.__dataclass_fields__ else {}
    waits = {"learning_starts": 500} if "dqn" in name else {}
    learner = module.make(module.Config(**rows, **waits), env)
    learner.learn(4000)
    learner.save(tmp_path / "policy")
    policy = CausalLM.load(str(tmp_path / "policy"))
    before = env.objective.reference.model.state_dict()
    after = policy.model.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in after.values())


# Losses of whole responses


def test_the_dpo_loss_is_the_papers():
    some, beta = groups(k=2), 0.3
    margin = beta * (
        (some.log_probs[:, 0] - some.ref_log_probs[:, 0])
        - (some.log_probs[:, 1] - some.ref_log_probs[:, 1])
    )
    first_wins = some.scores[:, 0] > some.scores[:, 1]
    expected = -torch.where(first_wins, margin, -margin).sigmoid().log().mean()
    torch.testing.assert_close(online_dpo.dpo_loss(some, beta, "hard"), expected)
    p = (some.scores[:, 0] - some.scores[:, 1]).sigmoid()
    soft = -(p * margin.sigmoid().log() + (1 - p) * (-margin).sigmoid().log()).mean()
    torch.testing.assert_close(online_dpo.dpo_loss(some, beta, "soft"), soft)
    tied = some._replace(scores=torch.zeros_like(some.scores))
    assert online_dpo.dpo_loss(tied, beta, "hard") == 0


def at_the_optimum(beta: float) -> Groups:
    """Log-probs of π* ∝ π_ref · exp(R/β), for some log Z of each prompt."""
    some = groups()
    log_z = torch.linspace(-1, 1, len(some.scores), dtype=torch.float64)[:, None]
    best = some.ref_log_probs + some.scores / beta - log_z
    return some._replace(log_probs=best.requires_grad_())


@pytest.mark.parametrize("name", ["trajectory_balance", "online_dpo"])
def test_the_known_optimum_is_where_the_loss_is_flat(make_vector_env, name):
    env = make_vector_env(N)
    learner = load_algorithm(name).make(load_algorithm(name).Config(samples_per_prompt=4), env)
    best, other = at_the_optimum(env.objective.kl_coef), groups()
    for some, flat in ((best, True), (other, False)):
        learner.algorithm.loss(some).backward()
        assert (some.log_probs.grad.abs().max() < 1e-12) == flat
    if name == "trajectory_balance":
        assert learner.algorithm.loss(best) < 1e-24


def test_trajectory_balances_gradient_is_the_objectives_own(make_vector_env):
    """On the policy's own responses it is that of REINFORCE with the others as baseline."""
    env, some = make_vector_env(N), groups()
    beta, k = env.objective.kl_coef, some.scores.shape[1]
    learner = trajectory_balance.make(trajectory_balance.Config(samples_per_prompt=4), env)
    learner.algorithm.loss(some).backward()
    returns = (some.scores - beta * (some.log_probs - some.ref_log_probs)).detach()
    advantages = (returns - returns.mean(1, keepdim=True)) / (k - 1)
    torch.testing.assert_close(some.log_probs.grad, -advantages / len(returns))


def test_a_beta_of_0_is_refused(make_vector_env):
    env = make_vector_env(N, kl_coef=0.0)
    for name in ("trajectory_balance", "online_dpo"):
        module = load_algorithm(name)
        learner = module.make(module.Config(samples_per_prompt=4), env)
        with pytest.raises(InputError, match="above 0"):
            learner.learn(10)
    with pytest.raises(InputError, match="above 0"):
        sb3_dqn.make(sb3_dqn.Config(), env)


def test_expert_iteration_imitates_the_best_alone(make_vector_env):
    module = load_algorithm("expert_iteration")
    env = make_vector_env(N)
    some = groups()
    for best_by in ("score", "return"):
        learner = module.make(module.Config(samples_per_prompt=4, best_by=best_by), env)
        worth = some.scores
        if best_by == "return":
            worth = worth - env.objective.kl_coef * (some.old_log_probs - some.ref_log_probs)
        some.log_probs.grad = None
        learner.algorithm.loss(some).backward()
        best = worth.argmax(1)
        rows = torch.arange(len(best))
        assert (some.log_probs.grad[rows, best] < 0).all()
        assert (some.log_probs.grad != 0).sum() == len(best)


class Odd(GroupLearner):
    """A loss that is not a sum over responses."""

    def loss(self, groups: Groups) -> torch.Tensor:
        gap = groups.log_probs - groups.ref_log_probs - groups.scores
        return (gap.mean(1) ** 3).mean() + gap.std(1).mean() * groups.lengths.double().mean()


def test_micro_batches_change_no_groups_gradient(make_vector_env):
    env = make_vector_env(N)
    env.group_rows(4)
    learner = build(Odd, env, seed=0, device="cpu", n_waves=2)
    play_rollout(learner)
    (minibatch,) = learner.rollout_buffer.get(None, 4)
    gradients = []
    for tokens in (10_000, 30, 1):
        learner.options = replace(learner.options, microbatch_tokens=tokens)
        statistics = learner._gradient(minibatch)
        gradients.append([p.grad.clone() for p in learner.policy.lm.parameters()])
        assert statistics["ratio_max_error"] < 1e-5
        assert statistics["kl_old"] == pytest.approx(0.0, abs=1e-6)
    for other in gradients[1:]:
        assert_same_gradients(other, gradients[0], 1e-4)
    assert any(g.abs().max() > 1e-3 for g in gradients[0])


def test_groups_of_uneven_length_that_fit_at_once_are_computed_once(make_vector_env, monkeypatch):
    env = make_vector_env(N)
    env.group_rows(4)
    learner = build(Odd, env, seed=0, device="cpu", n_waves=2)
    play_rollout(learner)
    (minibatch,) = learner.rollout_buffer.get(None, 4)
    learner._gradient(minibatch)
    together = [p.grad.clone() for p in learner.policy.lm.parameters()]
    monkeypatch.setattr(batching, "LAYER_COST", 0.0)
    monkeypatch.setattr(batching, "LEAST_COST", 0)
    parts = list(batching.passes(learner.policy.core.model, minibatch.observations, 10_000))
    with count_forwards(learner.policy.core) as shapes:
        learner._gradient(minibatch)
    assert len(shapes) == len(parts) > 2
    assert_same_gradients([p.grad for p in learner.policy.lm.parameters()], together, 1e-4)


def test_groups_hold_what_was_paid_and_stay_together(make_vector_env):
    env = make_vector_env(N)
    env.group_rows(4)
    learner = build(Odd, env, seed=0, device="cpu", n_waves=3, n_minibatches=3)
    infos = []
    play = env.play

    def watched(*arguments: Any) -> Any:
        out = play(*arguments)
        infos.append(out[1])
        return out

    env.play = watched
    play_rollout(learner)
    scores = sorted(round(float(s), 5) for info in infos for s in info["score"])
    sums = {k: sorted(float(x) for i in infos for x in i[k].sum(1)) for k in ("ref_log_prob",)}
    found, references, seen = [], [], 0
    for minibatch in learner.rollout_buffer.get(40, 4):
        sequences = minibatch.observations
        prompts = [
            tuple(row[:start].tolist())
            for row, start in zip(sequences.tokens, sequences.starts, strict=True)
        ]
        assert len(prompts) % 4 == 0
        assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, len(prompts), 4))
        leaf = row_sums(minibatch.old_log_prob, sequences.lengths)
        some = learner._groups(minibatch, leaf)
        found += some.scores.flatten().tolist()
        references += some.ref_log_probs.flatten().tolist()
        torch.testing.assert_close(some.log_probs, some.old_log_probs)
        seen += 1
    assert seen > 1
    np.testing.assert_allclose(sorted(found), scores, atol=1e-4)
    np.testing.assert_allclose(sorted(references), sums["ref_log_prob"], atol=1e-4)


@pytest.mark.parametrize("name", ["online_dpo", "trajectory_balance", "expert_iteration", "dpo"])
def test_groups_are_asked_for(make_vector_env, name):
    module = load_algorithm(name)
    learner = module.make(module.Config(samples_per_prompt=None), make_vector_env(N))
    with pytest.raises(InputError, match="samples_per_prompt"):
        learner.learn(10)
    with pytest.raises(InputError, match="must divide"):
        module.make(module.Config(samples_per_prompt=3), make_vector_env(N))


# Presets of the flagship


@pytest.fixture
def judged(make_vector_env) -> Callable[..., PPO]:
    """The flagship by an algorithm's options, one rollout played and not learned from."""

    def make(name: str, **options: Any) -> PPO:
        module = load_algorithm(name)
        env = make_vector_env(N)
        env.reset(seed=0)
        learner = module.make(module.Config(**options), env).algorithm
        play_rollout(learner)
        return learner

    return make


def test_reinforce_plus_plus_whitens_the_rewards_to_come(judged):
    learner = judged("reinforce_pp", n_waves=2)
    buffer = learner.rollout_buffer
    taken = buffer.actions >= 0
    by_wave = buffer.rewards.reshape(2, BUDGET, N)
    to_come = np.flip(np.flip(by_wave, 1).cumsum(1), 1).reshape(taken.shape)[taken]
    expected = (to_come - to_come.mean()) / to_come.std()
    np.testing.assert_allclose(buffer.advantages[taken], expected, atol=1e-4)
    assert learner._loss().vf_coef == 0, "nobody asks a critic"


def test_grpo_is_a_mean_over_responses_of_means_over_their_tokens(judged):
    learner = judged("grpo", samples_per_prompt=4, n_waves=1, kl_loss=None)
    (minibatch,) = learner.rollout_buffer.get(None)
    learner.policy.set_training_mode(True)
    learner._gradient(minibatch)
    ours = [p.grad.clone() for p in learner.policy.lm.parameters()]
    core, sequences = learner.policy.core, minibatch.observations
    learner.policy.optimizer.zero_grad()
    log_probs = core.log_probs_of(core.states(sequences), sequences.chosen())
    # At ratio 1 the surrogate's gradient is A ∇ log π.
    surrogate = (log_probs - log_probs.detach()).exp() * minibatch.advantages
    means = row_sums(surrogate, sequences.lengths) / sequences.lengths
    (-means.mean()).backward()
    for a, p in zip(ours, learner.policy.lm.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)
    # And one advantage per response: its score minus the group's mean, divided by their deviation.
    scores = learner.rollout_buffer.rewards.sum(0).reshape(-1, 4)
    centred = scores - scores.mean(1, keepdims=True)
    expected = centred / (scores.std(1, ddof=1, keepdims=True) + 1e-4)
    first = learner.rollout_buffer.advantages[0].reshape(-1, 4)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)
    plain = judged("grpo", samples_per_prompt=4, n_waves=1, kl_loss=None, scale_by_std=False)
    np.testing.assert_allclose(
        plain.rollout_buffer.advantages[0].reshape(-1, 4), centred, rtol=1e-4, atol=1e-5
    )


def test_the_penalty_in_the_loss_takes_the_rollouts_reference(judged):
    learner = judged("grpo", samples_per_prompt=4, n_waves=1)
    (minibatch,) = learner.rollout_buffer.get(None)
    reference = learner.env.token_env.objective.reference
    expected = reference.log_probs(minibatch.observations)
    torch.testing.assert_close(minibatch.ref_log_prob, expected, atol=1e-5, rtol=1e-5)


# NLPO


def test_nlpos_mask_is_a_lagged_policys_and_really_moves(make_vector_env):
    env = make_vector_env(N)
    env.reset(seed=0)
    config = nlpo.Config(top_p=0.6, mask_every=2, critic_warmup=0, learning_rate=5e-2)
    learner = nlpo.make(config, env)
    policy, allowed, outside = learner.policy, [], []
    train = learner.algorithm.train

    def watched() -> None:
        guide = policy.core.guide
        assert guide is not None
        for batch in learner.algorithm.rollout_buffer.get(None):
            with torch.no_grad():
                limits = policy.core.limits(batch.observations)
                log_p = policy.core.logits(policy.core.states(batch.observations), limits)
            inside = log_p.gather(1, batch.actions.long()[:, None])[:, 0] > NEVER / 2
            outside.append(int((~inside).sum()))
            banned = (log_p < NEVER / 2).float().mean()
            assert 0.1 < banned < 1
            allowed.append([p.clone() for p in guide.model.parameters()])
        train()

    learner.algorithm.train = watched
    learner.learn(5 * 2 * N * BUDGET)
    assert not any(outside)
    same = [
        all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        for x, y in itertools.pairwise(allowed)
    ]
    assert same[:4] == [True, False, True, False]
    assert policy.core.mask == env.objective.reference.mask, "the mask was the training's alone"


def test_nlpo_and_a_mask_of_the_reference_do_not_go_together(make_vector_env):
    env = make_vector_env(N, mask={"top_k": 3})
    with pytest.raises(InputError, match="leave one of the two out"):
        nlpo.make(nlpo.Config(), env).learn(10)


# Offline DPO


def test_offline_dpo_reads_comparisons(make_vector_env, tmp_path):
    env = make_vector_env(N, max_new_tokens=6)
    file = tmp_path / "choices.jsonl"
    rows = [
        {"prompt": "a b", "candidates": ["c d", "e"], "best": 0},
        {"prompt": "b", "candidates": ["a", "b c", "d"], "ranking": [[2], [0, 1]]},
        {"prompt": "c", "candidates": ["a " * 50, "b"], "best": 1},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = dpo.load_pairs(str(file), env)
    assert len(pairs) == 3, "one of the first row, two of the second, none that fits of the third"
    learner = dpo.make(dpo.Config(data=str(file), learning_rate=1e-2, n_minibatches=1), env)
    core = learner.policy.core

    def margin() -> float:
        total = 0.0
        for pair in pairs:
            sums = []
            for response in (pair.winner, pair.loser):
                row = torch.tensor([[*pair.prompt, *response]])
                with torch.no_grad():
                    log_p = core.model(row).logits[0, :, : core.vocab_size] / core.temperature
                taken = torch.log_softmax(log_p, -1)[len(pair.prompt) - 1 : -1]
                sums.append(float(taken.gather(1, torch.tensor(response)[:, None]).sum()))
            total += sums[0] - sums[1]
        return total

    before = margin()
    learner.learn(600)
    assert margin() > before + 1


def test_offline_dpo_says_what_does_not_fit(make_vector_env, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "a", "candidates": ["b " * 90, "c"], "best": 0}) + "\n")
    with pytest.raises(InputError, match=r"none of the 1 pairs .*max_new_tokens"):
        dpo.make(dpo.Config(data=str(file)), make_vector_env(N))
    with pytest.raises(InputError, match="num_envs must be even"):
        dpo.make(dpo.Config(data=str(file)), make_vector_env(3))


def test_offline_dpo_samples_from_the_reference(make_vector_env, tmp_path):
    env = make_vector_env(N)
    env.reset(seed=0)
    learner = dpo.make(dpo.Config(samples_per_prompt=2, learning_rate=0.1, n_waves=1), env)
    reference, asked = env.objective.reference, []
    sample = learner.algorithm._sample

    def watched(prompts: torch.Tensor, env: TokenVectorEnv) -> Sampled:
        torch.manual_seed(len(asked))
        sampled = sample(prompts, env)
        responses = sampled.responses
        torch.manual_seed(len(asked))
        options = {"stop_at_eos": env.stop_at_eos}
        expected = sample_responses(reference, prompts, env.max_new_tokens, **options)
        torch.manual_seed(len(asked))
        by_policy = learner.policy.sample(prompts, env.max_new_tokens, **options)
        asked.append((torch.equal(responses, expected), torch.equal(responses, by_policy)))
        return sampled

    learner.algorithm._sample = watched
    with TrainingRun(tmp_path, 3 * N * BUDGET, "test") as run:
        learner.learn(3 * N * BUDGET, run)
    assert len(asked) > 2
    assert all(same for same, _ in asked)
    assert not asked[-1][1], "by then the policy is another"
    names = set().union(*run._rows)
    assert "data/score" in names
    assert not any(name.startswith("rollout/score") for name in names)


def test_offline_dpo_refuses_what_the_mask_bars(make_vector_env, tmp_path):
    file = tmp_path / "short.jsonl"
    file.write_text(json.dumps({"prompt": "a", "candidates": ["b", "c d"], "best": 0}) + "\n")
    env = make_vector_env(N, mask={"min_new_tokens": 3})
    with pytest.raises(InputError, match=r"2 tokens of the responses .* mask"):
        dpo.make(dpo.Config(data=str(file)), env)


# sb3-contrib


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_trpo_moves_every_weight(make_vector_env, family):
    module = load_algorithm("sb3_trpo")
    env = make_vector_env(N, family=family)
    env.reset(seed=0)
    learner = module.make(module.Config(n_steps=7, batch_size=28), env)
    before = {n: p.detach().clone() for n, p in learner.policy.named_parameters()}
    learner.learn(2 * 7 * N)  # the critic's rate is 0 in the last update
    after = dict(learner.policy.named_parameters())
    assert [n for n, p in after.items() if torch.equal(p, before[n])] == []


def test_trpo_takes_the_gradients_and_products_of_the_library(make_vector_env, monkeypatch):
    from sb3_contrib import TRPO as Stock

    from agents.sb3.stock.trpo import TRPO

    ours, steps = TRPO._compute_actor_grad, []

    def both(self, kl_div, policy_objective):
        found = ours(self, kl_div, policy_objective)
        expected = Stock._compute_actor_grad(self, kl_div, policy_objective)
        assert [id(p) for p in found[0]] == [id(p) for p in expected[0]]
        assert found[3] == expected[3]
        torch.testing.assert_close(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2])
        direction = torch.randn_like(found[1])
        a, b = (
            self.hessian_vector_product(actor, grad_kl, direction) - self.cg_damping * direction
            for actor, _, grad_kl, _ in (found, expected)
        )
        assert a.norm() > 1e-2
        assert (a - b).norm() < 1e-4 * a.norm()
        steps.append(found)
        return found

    monkeypatch.setattr(TRPO, "_compute_actor_grad", both)
    module = load_algorithm("sb3_trpo")
    env = make_vector_env(N)
    env.reset(seed=0)
    module.make(module.Config(n_steps=7, batch_size=28), env).learn(2 * 7 * N)
    assert len(steps) == 2


def test_maskable_ppo_serves_masks_that_differ_from_state_to_state(make_vector_env):
    module = load_algorithm("sb3_maskable_ppo")
    env = make_vector_env(N, mask={"min_new_tokens": 3})
    env.reset(seed=0)
    learner = module.make(module.Config(n_steps=7, batch_size=1000, n_epochs=1), env).algorithm
    learner.learn(7 * N)
    buffer = learner.rollout_buffer
    kept = [len(ids) for ids, _ in buffer._lists.values()]
    # Only where an EOS is barred, and then only the ids of the EOS.
    assert kept
    assert max(kept) == len(env.objective.reference.eos_ids)
    assert len(kept) < buffer.buffer_size * N
    (batch,) = buffer.get(None)
    learner.policy.set_training_mode(True)
    _, log_probs, _ = learner.policy.evaluate_actions(
        batch.observations, batch.actions, action_masks=batch.action_masks
    )
    assert len(log_probs) == len(batch.old_log_prob)
    assert (log_probs > NEVER / 2).all(), "what was chosen was allowed"


def test_maskable_ppo_keeps_nothing_of_a_mask_that_is_the_same_everywhere(make_vector_env):
    module = load_algorithm("sb3_maskable_ppo")
    env = make_vector_env(N, mask={"decodable_only": True})
    assert env.objective.reference.mask.never
    env.reset(seed=0)
    learner = module.make(module.Config(n_steps=7, batch_size=1000, n_epochs=1), env).algorithm
    learner.learn(7 * N)
    assert not learner.rollout_buffer._lists


def test_maskable_ppos_first_ratio_is_one(make_vector_env):
    module = load_algorithm("sb3_maskable_ppo")
    env = make_vector_env(N, mask={"top_k": 4})
    env.reset(seed=0)
    learner = module.make(module.Config(n_steps=7, batch_size=1000), env).algorithm
    _, callback = learner._setup_learn(7 * N)
    callback.on_training_start({}, {})
    learner.collect_rollouts(learner.env, callback, learner.rollout_buffer, 7)
    (batch,) = learner.rollout_buffer.get(None)
    learner.policy.set_training_mode(True)
    _, log_probs, _ = learner.policy.evaluate_actions(
        batch.observations, batch.actions, action_masks=batch.action_masks
    )
    torch.testing.assert_close(log_probs, batch.old_log_prob, atol=1e-5, rtol=1e-5)


def test_maskable_ppo_with_the_librarys_own_buffer_and_evaluation():
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.evaluation import evaluate_policy

    from agents.sb3.stock.maskable import MaskableCausalLMPolicy

    env = gymnasium.make("rlhf_gym/Exact-v0", top_k=2, device="cpu")
    policy = policy_kwargs(env.unwrapped)
    model = MaskablePPO(
        MaskableCausalLMPolicy, env, n_steps=8, batch_size=8, policy_kwargs=policy, device="cpu"
    )
    model.learn(8)
    observations, log_probs = [], []
    for batch in model.rollout_buffer.get(None):
        model.policy.set_training_mode(True)
        _, found, _ = model.policy.evaluate_actions(
            batch.observations, batch.actions, action_masks=batch.action_masks
        )
        log_probs, observations = found, batch.observations.long().numpy()
    assert (log_probs > NEVER / 2).all(), "what was chosen was allowed"
    for token in range(9):
        mask = np.arange(9) == token
        action, _ = model.predict(observations[0], action_masks=mask)
        assert action == token
        masks = np.tile(mask, (len(observations), 1))
        actions, _ = model.predict(observations, action_masks=masks)
        assert (actions == token).all()
        assert model.policy.get_distribution(torch.from_numpy(observations), masks).mode()[0] == (
            token
        )
    evaluate_policy(model, env, n_eval_episodes=4, warn=False)  # refuses tokens that are barred


# Value-based


def test_the_q_network_starts_as_the_greedy_reference(make_vector_env):
    env = make_vector_env(N)
    observations, _ = env.reset(seed=0)
    learner = sb3_dqn.make(sb3_dqn.Config(), env)
    assert not env.actor.log_prob(observations, np.zeros(N, int)).any(), "deterministic: log π = 0"
    tokens, _ = learner.algorithm.predict(observations, deterministic=True)
    core = env.objective.reference
    with torch.no_grad():
        for row, token in zip(observations, tokens, strict=True):
            logits = core.model(torch.from_numpy(row[row >= 0])[None]).logits[0, -1]
            assert int(logits[: core.vocab_size].argmax()) == token


@pytest.mark.parametrize("name", ["sb3_dqn", "sb3_qrdqn"])
def test_value_based_agents_and_their_networks_load_as_saved(name, make_vector_env, tmp_path):
    env = make_vector_env(N)
    observations, _ = env.reset(seed=0)
    make = load_algorithm(name)
    learner = make.make(make.Config(learning_starts=8, batch_size=8, learning_rate=1e-2), env)
    learner.learn(16)
    model, network = learner.algorithm, learner.policy
    seen = torch.from_numpy(observations)
    with torch.no_grad():
        values = network(seen)
    network.save(tmp_path / "network.pt")
    model.save(tmp_path / "model.zip")
    again = type(network).load(tmp_path / "network.pt")
    policy = type(model.policy)
    model.policy.save(tmp_path / "policy.pt")
    loaded = type(model).load(tmp_path / "model.zip", env=model.get_env())
    assert loaded.gamma == 1.0
    for other in (again, loaded.policy, policy.load(tmp_path / "policy.pt")):
        actions, _ = other.predict(observations, deterministic=True)
        np.testing.assert_array_equal(actions, network.predict(observations)[0])
    with torch.no_grad():
        torch.testing.assert_close(again(seen), values, atol=1e-6, rtol=0)
    before = [p.clone() for p in loaded.policy.parameters()]
    loaded.learn(16, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps + 16
    assert any((p != q).any() for p, q in zip(before, loaded.policy.parameters(), strict=True))


def test_a_q_network_refuses_observations_that_are_no_token_ids():
    from stable_baselines3 import DQN
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = DummyVecEnv([lambda: gymnasium.make("rlhf_gym/Exact-v0", device="cpu")])
    network = {k: v for k, v in policy_kwargs(env.envs[0].unwrapped).items() if k != "mask"}
    options = {"network": {**network, "scale": 0.4}}
    options = {"policy_kwargs": options, "buffer_size": 9, "learning_starts": 2, "device": "cpu"}
    model = DQN(CausalLMDQNPolicy, VecNormalize(env), **options)
    with pytest.raises(InputError, match=r"token ids .* but these are float32"):
        model.learn(8)
    DQN(CausalLMDQNPolicy, VecNormalize(env, norm_obs=False), **options).learn(8)


def test_the_replay_takes_one_copy_of_the_observations():
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=10, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    size = 5000
    buffer = sb3_dqn.make(sb3_dqn.Config(buffer_size=size), env).algorithm.replay_buffer
    width = env.single_observation_space.shape[0]
    arrays = [v for v in vars(buffer).values() if isinstance(v, np.ndarray)]
    copies = [a for a in arrays if a.ndim == 3 and a.shape[-1] == width]
    assert [a.size for a in copies] == [size * width]
    assert copies[0].dtype == np.int64


def test_value_based_agents_can_be_repeated():
    def rewards() -> float:
        set_random_seed(5)
        env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=16, device="cpu").unwrapped
        env.reset(seed=5)
        learner = sb3_dqn.make(sb3_dqn.Config(learning_starts=64), env)
        learner.learn(320)
        return float(learner.algorithm.replay_buffer.rewards[:20].sum())

    assert rewards() == rewards()


def test_a_mask_and_random_exploration_do_not_go_together(make_vector_env):
    with pytest.raises(InputError, match="explores with random tokens"):
        sb3_dqn.make(sb3_dqn.Config(), make_vector_env(N, mask={"top_k": 3}))


# What an algorithm may ask of its environment


def test_rows_are_grouped_from_the_next_reset_on(make_vector_env):
    env = make_vector_env(N)
    env.group_rows(4)
    for seed in (0, None):
        observations, _ = env.reset(seed=seed)
        for i in range(0, N, 4):
            assert all((observations[j] == observations[i]).all() for j in range(i, i + 4))
    with pytest.raises(InputError, match="must divide"):
        env.group_rows(3)


def test_options_are_those_of_the_class(make_vector_env):
    learner = trajectory_balance.make(
        trajectory_balance.Config(learning_rate=0.5, n_minibatches=3, adam_eps=1e-7),
        make_vector_env(N),
    )
    assert learner.algorithm.lr_schedule(1.0) == 0.5
    assert learner.algorithm.options.n_minibatches == 3
    assert learner.policy.optimizer.param_groups[0]["eps"] == 1e-7
    assert learner.policy.critic.shared


@pytest.mark.parametrize("name", ["clip_range", "gae_lambda", "vf_coef", "ent_coef", "baseline"])
def test_a_loss_of_whole_responses_takes_no_option_of_ppo(make_vector_env, name):
    with pytest.raises(InputError, match=f"Odd has no option '{name}'"):
        build(Odd, make_vector_env(N), **{name: 0.1})


def test_a_pair_on_which_policy_and_label_agree_has_no_gradient():
    """Equal scores, a margin of rounding: Adam would make a full step of its gradient."""
    log_probs = torch.tensor([[0.0, 1e-7], [0.0, 1.0]], requires_grad=True)
    zeros = torch.zeros(2, 2)
    loss = online_dpo.dpo_loss(Groups(log_probs, zeros, zeros, zeros, zeros), 0.1, "soft")
    loss.backward()
    assert log_probs.grad is not None
    assert not log_probs.grad[0].any()
    assert log_probs.grad[1].all()
    assert float(loss.detach()) == pytest.approx(0.69377, abs=1e-4)
