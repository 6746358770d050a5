"""Policy and reference are masked alike: in sampling, in log-probs, step by step and at once."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import BOS, BUDGET, ENDS, EOS, PAD_ID, PLAIN, ModelActor, V, draw_responses
from stable_baselines3 import A2C
from stable_baselines3 import PPO as StockPPO
from transformers import AutoModelForCausalLM, GenerationConfig

from agents.doctor import Subject, examine
from agents.sb3 import PPO, build
from agents.sb3.policy.causal_lm_policy import Evaluation
from agents.sb3.rollout.buffer import SequenceSamples
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import kl_to
from rlhf_gym.lm.decoding.decode_cache import last_hidden
from rlhf_gym.lm.decoding.sampling import draw, sample_responses
from rlhf_gym.lm.masks import NEVER, Mask, make_mask
from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.tokens import PAD, append, continuations

UNK = 0
SPECIAL = {UNK, PAD_ID, BOS}

RULES = {
    "decodable": {"decodable_only": True},
    "fixed length": {"min_new_tokens": BUDGET},
    "minimum": {"min_new_tokens": 3},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "all": {"decodable_only": True, "min_new_tokens": 2, "top_k": 6, "top_p": 0.9},
}
BY_STATE = [name for name in RULES if name not in ("decodable", "fixed length")]

each_rule = pytest.mark.parametrize("rule", RULES)


def allowed_alone(objective, rule: dict, row: np.ndarray, taken: int) -> set[int]:
    """What a rule allows in one state, written down once more from one full forward."""
    reference = objective.reference
    ids = torch.from_numpy(row[row != PAD])[None]
    with torch.no_grad():
        logits = reference.model(input_ids=ids).logits[0, -1, :V] / reference.temperature
    allowed = set(range(V))
    if rule.get("decodable_only"):
        allowed -= SPECIAL
    if taken < rule.get("min_new_tokens", 0):
        allowed -= set(ENDS)
    best = sorted(allowed, key=lambda i: -float(logits[i]))[: rule.get("top_k", V)]
    p = torch.softmax(logits[best], -1)
    before = p.cumsum(0) - p
    return {i for i, b in zip(best, before.tolist(), strict=True) if b < rule.get("top_p", 2.0)}


def responses_of(lm, env, seed: int = 0) -> np.ndarray:
    observations, _ = env.reset(seed=seed)
    torch.manual_seed(seed)
    prompts = torch.from_numpy(observations[:, : env.prompts.max_tokens])
    return sample_responses(lm, prompts, env.max_new_tokens).numpy()


@each_rule
def test_action_masks_are_what_the_rule_says(make_vector_env, rule):
    env = make_vector_env(8, mask=RULES[rule], autoreset_mode="Disabled")
    observations, _ = env.reset(seed=1)
    single = env.single_action_space
    single.seed(0)
    checked = 0
    for taken in range(BUDGET):
        masks = env.action_masks()
        for row, mask in zip(observations, masks, strict=True):
            expected = allowed_alone(env.objective, RULES[rule], row, taken)
            assert set(np.flatnonzero(mask)) == expected
            checked += len(expected) < V
        actions = np.array([single.sample(mask=mask.astype(np.int8)) for mask in masks])
        observations, _, ended, _, _ = env.step(actions)
        if ended.any():
            break
    assert checked


@each_rule
def test_what_is_drawn_is_allowed_and_scored_so(make_vector_env, load_lm, rule):
    env = make_vector_env(64, mask=RULES[rule])
    policy = load_lm("llama", seed=3).following(env.objective.reference)
    for lm in (env.objective.reference, policy):
        actions = responses_of(lm, env)
        prompts = env._tokens.copy()
        sequences = continuations(torch.from_numpy(prompts), torch.from_numpy(actions))
        log_probs = lm.log_probs(sequences)
        at = 0
        for prompt, response in zip(prompts, actions, strict=True):
            row = prompt[None]
            for taken, token in enumerate(response[response != PAD].tolist()):
                allowed = sorted(allowed_alone(env.objective, RULES[rule], row[0], taken))
                assert token in allowed
                with torch.no_grad():
                    logits = lm.model(input_ids=torch.from_numpy(row[row != PAD])[None]).logits
                within = torch.log_softmax(logits[0, -1, allowed] / lm.temperature, -1)
                assert float(log_probs[at]) == pytest.approx(
                    float(within[allowed.index(token)]), abs=2e-5
                )
                row, at = append(row, np.array([token])), at + 1


@each_rule
@pytest.mark.parametrize("bound", [True, False])
def test_play_is_step(make_vector_env, load_lm, rule, bound):
    env = make_vector_env(16, mask=RULES[rule], autoreset_mode="Disabled")
    reference = env.objective.reference
    policy = load_lm("llama", seed=3).following(reference)
    actions = responses_of(policy, env)
    sequences = continuations(torch.from_numpy(env._tokens), torch.from_numpy(actions))
    flat = policy.log_probs(sequences)
    env = make_vector_env(16, objective=env.objective, autoreset_mode="NextStep")
    mask = actions != PAD
    grid = np.zeros(actions.shape, dtype=np.float32)
    grid[mask] = flat.numpy()

    class Told:
        def log_prob(self, observations, now):
            return grid[:, t]

    told = Told()
    env.bind_actor(told if bound else None)
    stepped = np.zeros(actions.shape)
    # A row that has ended resets: it waits one step and then continues, and nothing checks it.
    env.reset(seed=0)
    for t in range(actions.shape[1]):
        allowed = env.action_masks().argmax(1)
        rewards = env.step(np.where(mask[:, t], actions[:, t], allowed))[1]
        stepped[:, t] = np.where(mask[:, t], rewards, 0)
    env.bind_actor(None)
    env.reset(seed=0)
    played, infos, _ = env.play(actions, grid if bound else None)
    np.testing.assert_allclose(stepped, played, atol=1e-5)
    total = infos["score"] - env.objective.kl_coef * (
        infos["kl"].sum(1) if bound else -infos["ref_log_prob"].sum(1)
    )
    np.testing.assert_allclose(played.sum(1), total, atol=1e-4)
    if bound:
        with torch.no_grad():
            at_policy, at_reference = policy.states(sequences), reference.states(sequences)
            limits = reference.limits(sequences)
            exact = kl_to(at_policy, policy, at_reference, reference, limits)
        assert torch.isfinite(exact).all()
        assert float(exact.sum()) > 0.1


@each_rule
def test_the_masked_optimum_is_exact(make_objective, load_lm, rule):
    horizon = 2
    options = dict(RULES[rule])
    if "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"] - 1, horizon)
    objective = make_objective(mask={**options, "max_new_tokens": horizon})
    task = Enumeration(objective, [(4, 5), (6, 7, 8)], max_new_tokens=horizon)
    np.testing.assert_allclose(task.best_value, task.best_value_by_sum, atol=1e-9)
    assert np.exp(task.flat(task.reference)).sum(1) == pytest.approx(1.0)
    assert task.optimality(task.value(task.optimum).objective) == pytest.approx(1.0, abs=1e-9)
    other = task.log_probs(load_lm("llama", seed=3))
    value = task.value(other)
    assert np.isfinite(value.kl).all()
    assert (value.objective < task.best_value).all()
    # What may not be chosen has no mass under the optimum either.
    barred = task.flat(task.reference) < NEVER / 2
    assert barred.any()
    assert not np.exp(task.flat(task.optimum))[barred].any()
    assert not np.exp(task.flat(other))[barred].any()


def test_a_barred_action_is_refused_and_nothing_is_lost(make_vector_env):
    env = make_vector_env(2, mask={"min_new_tokens": 2})
    before, _ = env.reset(seed=0)
    with pytest.raises(InputError, match=r"row 1 chose token 3 \('</s>'\).*action_masks"):
        env.step(np.array([5, EOS]))
    after, *_ = env.step(np.array([5, 6]))
    np.testing.assert_array_equal(after, append(before, np.array([5, 6])))
    env.reset(seed=0)
    whole = np.array([[5, 6, EOS], [5, EOS, PAD]])
    with pytest.raises(InputError, match="row 1 chose token 3"):
        env.play(whole, np.zeros(whole.shape))
    rewards, _, _ = env.play(np.array([[5, 6, EOS], [5, 7, EOS]]), np.zeros((2, 3)))
    assert np.isfinite(rewards).all()


@each_rule
def test_the_flagship_learns_behind_a_mask(make_vector_env, rule):
    env = make_vector_env(8, mask=RULES[rule])
    env.objective.reference.model.requires_grad_(False)
    learner = build(PPO, env, **PLAIN, seed=0, device="cpu", n_epochs=2, n_minibatches=2)
    assert not examine(Subject(env, learner.policy))
    kept = []
    learner.learn(1, callback=lambda found, _: kept.append(found["wave"]) or True)
    assert np.abs(kept[0]["kl_sum"]).max() < 1e-4
    for _ in range(2):
        logged = dict(learner.logger.name_to_value)
        assert logged["train/ratio_first_max_error"] < 1e-5
        assert np.isfinite(logged["train/policy_loss"])
        assert logged["train/gradient_norm"] > 0
        learner.learn(2 * learner.num_timesteps, reset_num_timesteps=False)


@pytest.mark.parametrize("algorithm", [StockPPO, A2C])
@pytest.mark.parametrize("rule", ["decodable", "fixed length", "top_k", "top_p"])
def test_stock_algorithms_follow_a_mask(make_vector_env, algorithm, rule):
    env = make_vector_env(4, mask=RULES[rule])
    options = {"batch_size": 20} if algorithm is StockPPO else {}
    learner = build(algorithm, env, seed=0, device="cpu", n_steps=BUDGET, **options)
    learner.learn(8 * BUDGET)  # the environment refuses what is not allowed
    assert env.episodes >= 4


def test_stock_algorithms_are_told_what_they_cannot_know(make_vector_env):
    env = make_vector_env(4, mask={"min_new_tokens": 2})
    learner = build(A2C, env, seed=0, device="cpu", n_steps=BUDGET)
    with pytest.raises(InputError, match="where a prompt ends"):
        learner.learn(4 * BUDGET)


def test_exact_kl_in_the_loss_is_masked_too(make_vector_env):
    env = make_vector_env(8, mask=RULES["all"])
    learner = build(PPO, env, **PLAIN, seed=0, device="cpu", kl_loss="exact", n_minibatches=2)
    reference, policy = env.objective.reference, learner.policy
    with torch.no_grad():
        for p in policy.lm.parameters():
            p.mul_(1.1)
    actions = torch.from_numpy(responses_of(policy.core, env))
    sequences = continuations(torch.from_numpy(env._tokens), actions)
    with torch.no_grad():
        hidden, limits = policy.core.states(sequences), policy.core.limits(sequences)
        flat = policy.core.log_probs_of(hidden, sequences.chosen(), limits)
        zeros = torch.zeros_like(flat)
        batch = SequenceSamples(sequences, sequences.chosen(), *[zeros] * 5)
        now = Evaluation(hidden, limits, flat, None, None)
        found = learner._loss().kl_to_reference(batch, now)
        logits = [lm.logits(lm.states(sequences), limits) for lm in (policy.core, reference)]
    expected = []
    for ours, theirs in zip(*logits, strict=True):
        within = ours > NEVER / 2
        assert 0 < int(within.sum()) <= 6
        p, q = (torch.log_softmax(x[within], -1) for x in (ours, theirs))
        expected.append(float((p.exp() * (p - q)).sum()))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert max(expected) > 1e-3
    learner.learn(100)
    assert dict(learner.logger.name_to_value)["train/gradient_norm"] > 0


def test_doctor_finds_a_policy_without_the_mask(make_vector_env):
    env = make_vector_env(8, mask=RULES["top_k"])
    env.objective.reference.model.requires_grad_(False)
    learner = build(PPO, env, **PLAIN, seed=0, device="cpu")
    learner.policy.core = replace(learner.policy.core, mask=Mask())
    (problem,) = examine(Subject(env, learner.policy))
    assert problem.check == "mask"
    assert "follow" in problem.fix


def test_sb3_finds_the_masks(make_vector_env):
    env = make_vector_env(4, mask=RULES["minimum"])
    learner = build(A2C, env, device="cpu")
    learner.env.reset()
    masks = np.stack(learner.env.env_method("action_masks"))  # as sb3-contrib asks for them
    assert masks.shape == (4, V)
    assert not masks[:, list(ENDS)].any()


def test_a_nucleus_of_a_large_vocabulary_is_that_of_the_sorted_whole():
    torch.manual_seed(0)
    # Peaked, middling, and flat: the last needs nearly every token.
    logits = torch.randn(3, 5000) * torch.tensor([[6.0], [2.0], [0.01]])
    only = Mask(top_p=0.9).limits(torch.zeros(3, dtype=torch.int64), logits.clone()).only
    for row, found in zip(logits, only, strict=True):
        p, ids = torch.softmax(row.double(), -1).sort(descending=True)
        size = int((p.cumsum(0) - p < 0.9).sum())
        assert abs(int((found != PAD).sum()) - size) <= 1  # float32's noise at the edge
        assert set(ids[: size - 1].tolist()) <= set(found.tolist())


def test_limits_are_asked_for_where_they_are_needed(load_lm, make_objective):
    reference = make_objective(mask=RULES["top_k"]).reference
    with pytest.raises(InputError, match="limits"):
        reference.logits(torch.zeros(2, 32))


def test_a_masked_policy_is_loaded_as_it_was_saved(make_vector_env, tmp_path):
    for rule in ("decodable", "top_k"):
        env = make_vector_env(4, mask=RULES[rule])
        learner = build(PPO, env, **PLAIN, seed=0, device="cpu")
        learner.save(tmp_path / "model")
        again = PPO.load(tmp_path / "model", env=learner.env, device="cpu")
        assert again.policy.core.mask == env.objective.reference.mask
        prompts = torch.from_numpy(env.reset(seed=0)[0][:, : env.prompts.max_tokens])
        if rule == "top_k":  # without an environment nobody knows the reference
            alone = PPO.load(tmp_path / "model", device="cpu")
            with pytest.raises(InputError, match=r"policy\.follow"):
                alone.policy.sample(prompts, BUDGET)
            alone.policy.follow(env.objective.reference)
            alone.policy.sample(prompts, BUDGET)
        torch.manual_seed(0)
        sequences = continuations(prompts, again.policy.sample(prompts, BUDGET))
        before, after = (x.policy.score(sequences)[1] for x in (learner, again))
        torch.testing.assert_close(before, after)


def test_a_mask_made_from_another_bans_its_own_tokens():
    first = Mask(never=(1,))
    first.ban(torch.zeros(1, 4))
    second = replace(first, never=(2,))
    assert second.ban(torch.zeros(1, 4)).tolist() == [[0, 0, NEVER, 0]]


def test_a_mask_is_not_left_behind_in_a_policy_folder(make_vector_env, load_lm, tmp_path):
    masked = make_vector_env(2, mask=RULES["all"]).objective.reference
    masked.save_pretrained(tmp_path / "masked")
    free = type(masked).load(str(tmp_path / "masked"))
    free.save_pretrained(tmp_path / "free")
    config = GenerationConfig.from_pretrained(tmp_path / "free")
    assert not config.suppress_tokens
    assert not config.min_new_tokens


def test_masks_are_of_states(make_vector_env):
    env = make_vector_env(2, mask=RULES["top_k"])
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.action_masks()


def test_lists_stay_short(load_lm):
    lm = load_lm("llama")
    mask = make_mask(lm.tokenizer, V, lm.eos_ids, max_new_tokens=BUDGET, top_k=4)
    prompts = torch.tensor([[4, 5]] * 8)
    sequences = continuations(prompts, torch.from_numpy(draw_responses(8)))
    limits = replace(lm, mask=mask).limits(sequences)
    assert limits.only.shape[1] <= 5  # and never as wide as the vocabulary
    assert limits.no_eos is None


def test_a_token_at_the_edge_counts_as_within():
    mask = Mask(top_k=2)
    logits = torch.tensor([[3.0, 2.0, 2.0 - 1e-6, 0.0]])
    taken = torch.tensor([0])
    assert mask.limits(taken, logits.clone()).only.tolist() == [[0, 1]]
    near = mask.limits(taken, logits.clone(), torch.tensor([2]))
    assert sorted(near.only[0].tolist()) == [0, 1, 2]
    assert mask.limits(taken, logits.clone(), torch.tensor([1])).only.tolist() == [[0, 1]]
    assert mask.limits(taken, logits.clone(), torch.tensor([3])).only.tolist() == [[0, 1]]
    both = Mask(top_k=2, top_p=0.99)
    logits = torch.tensor([[3.0, 2.0, 2.0 - 1e-6, 0.0]])
    assert sorted(both.limits(taken, logits.clone(), torch.tensor([2])).only[0].tolist())[-1] == 2
    tied = torch.log(torch.tensor([[0.35, 0.35 - 1e-7, 0.3]]))
    spared = Mask(top_p=0.3).limits(taken, tied.clone(), torch.tensor([1]))
    assert spared.only.tolist() == [[0, 1]]
    nucleus = Mask(top_p=0.6)
    logits = torch.log(torch.tensor([[0.6 + 1e-6, 0.3, 0.1]]))
    assert nucleus.limits(taken, logits.clone()).only.tolist() == [[0]]
    near = nucleus.limits(taken, logits.clone(), torch.tensor([1]))
    assert near.only.tolist() == [[0, 1]]
    assert nucleus.limits(taken, logits.clone(), torch.tensor([2])).only.tolist() == [[0]]


def test_a_banned_last_token_is_never_drawn(monkeypatch):
    logits = torch.zeros(50_000, 5)
    logits[:, 3:] = NEVER
    torch.manual_seed(0)
    assert draw(logits).max() == 2
    # Rounding may carry the drawn point to the very end.
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))
    assert draw(logits[:4]).tolist() == [2] * 4


def test_generate_is_told(make_vector_env, tmp_path):
    env = make_vector_env(2, mask={"decodable_only": True, "min_new_tokens": 2})
    env.objective.reference.save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.suppress_tokens == sorted(SPECIAL)
    assert config.min_new_tokens == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.manual_seed(0)
    out = model.generate(torch.tensor([[BOS, 5]] * 256), max_new_tokens=BUDGET)[:, 2:]
    assert not torch.isin(out[:, :2], torch.tensor(ENDS)).any()
    before_end = torch.isin(out, torch.tensor(ENDS)).cumsum(1) == 0
    assert not torch.isin(out[before_end], torch.tensor(sorted(SPECIAL))).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": BUDGET + 1}, "min_new_tokens"),
        ({"min_new_tokens": 2, "stop_at_eos": False}, "stop_at_eos|no effect"),
    ],
)
def test_bad_rules_are_refused(load_lm, options, said):
    lm = load_lm("llama")
    with pytest.raises(InputError, match=said):
        make_mask(lm.tokenizer, V, lm.eos_ids, **{"max_new_tokens": BUDGET, **options})


def test_text_env_takes_the_keywords(save_lm, prompt_file):
    env = gymnasium.make_vec(
        "rlhf_gym/Text-v0",
        num_envs=4,
        reference=save_lm("llama"),
        reward_model="conftest:text_reward",
        prompts=prompt_file,
        split="all",
        max_prompt_tokens=8,
        max_new_tokens=4,
        device="cpu",
        decodable_only=True,
        min_new_tokens=2,
        top_k=5,
    ).unwrapped
    env.reset(seed=0)
    masks = env.action_masks()
    assert (masks.sum(1) == 5).all()
    assert not masks[:, [*SPECIAL, *ENDS]].any()


def test_an_actor_of_ones_own_follows(make_vector_env, load_lm):
    env = make_vector_env(4, mask=RULES["decodable"])
    actor = ModelActor(load_lm("llama", seed=3).following(env.objective.reference))
    env.bind_actor(actor)
    observations, _ = env.reset(seed=0)
    masks = env.action_masks()
    log_p = np.array([actor.log_prob(observations, np.full(4, a)) for a in range(V)]).T
    np.testing.assert_allclose(np.where(masks, np.exp(log_p), 0).sum(1), 1.0, atol=1e-5)
    with torch.no_grad():
        hidden = last_hidden(actor.lm, torch.from_numpy(observations))
    assert (actor.lm.logits(hidden).detach().numpy()[~masks] == NEVER).all()
