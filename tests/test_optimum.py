"""J* − J(π) = β KL(π ‖ π*), and the estimate of J* from samples finds the enumerated one."""

import itertools

import numpy as np
import pytest
import torch
from conftest import BOS, ENDS, V

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.evaluation.policies import evaluate, summarise
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.objective import Objective
from rlhf_gym.objective.optimum import best_of_n, best_value, optimality
from rlhf_gym.tokens import Sequences, pad_rows, row_sums

BETA = 0.4


def enumerate_responses(budget: int = 2) -> list[list[int]]:
    whole = [[a] for a in range(V) if a in ENDS]
    live = [[a] for a in range(V) if a not in ENDS]
    for _ in range(budget - 1):
        grown = [[*row, a] for row, a in itertools.product(live, range(V))]
        whole += [row for row in grown if row[-1] in ENDS]
        live = [row for row in grown if row[-1] not in ENDS]
    return whole + live


def log_probs(lm: CausalLM, prompt: list[int], responses: list[list[int]]) -> np.ndarray:
    tokens = torch.from_numpy(pad_rows([[*prompt, *row] for row in responses]))
    lengths = torch.tensor([len(row) for row in responses])
    sequences = Sequences(tokens, torch.full_like(lengths, len(prompt)), lengths)
    return row_sums(lm.log_probs(sequences), lengths).numpy()


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(ord(c) % 5 for c in text if c != " ") / 4 - 1 for text in responses]


@pytest.fixture(scope="module")
def world(load_lm):
    """Everything about one prompt, enumerated."""
    reference, policy = load_lm("llama"), load_lm("llama", seed=3)
    responses = enumerate_responses()
    prompt = [BOS, 5]
    p_ref, p = (np.exp(log_probs(lm, prompt, responses)) for lm in (reference, policy))
    scores = np.array(reward([""] * len(responses), reference.texts(responses)))
    return reference, policy, p_ref, p, scores


def test_the_gap_to_the_optimum_is_a_divergence(world):
    _, _, p_ref, p, scores = world
    assert p_ref.sum() == pytest.approx(1.0, abs=1e-4)
    assert p.sum() == pytest.approx(1.0, abs=1e-4)
    log_z = np.log((p_ref * np.exp(scores / BETA)).sum())
    best = p_ref * np.exp(scores / BETA) / np.exp(log_z)
    value = (p * scores).sum() - BETA * (p * np.log(p / p_ref)).sum()
    gap = BETA * (p * np.log(p / best)).sum()
    assert BETA * log_z - value == pytest.approx(gap, abs=1e-4)
    assert gap > 0.01


def test_sampled_optimum_finds_the_enumerated_one(world):
    _, _, p_ref, p, scores = world
    rng = np.random.default_rng(0)
    exact = BETA * np.log((p_ref * np.exp(scores / BETA)).sum() / p_ref.sum())
    n, repetitions = 400, 300
    from_ref = rng.choice(len(scores), (repetitions, n), p=p_ref / p_ref.sum())
    from_policy = rng.choice(len(scores), (repetitions, n), p=p / p.sum())
    log_ratio = np.log(p / p_ref)
    alone = best_value(scores[from_ref], BETA)
    both = np.concatenate([from_ref, from_policy], 1)
    mixed = best_value(scores[both], BETA, log_ratio[both], policy_share=0.5)
    for best in (alone, mixed):
        error = best.value.std() / np.sqrt(repetitions)
        assert abs(best.value.mean() - exact) < 4 * error + 1e-3
        assert (best.ess <= both.shape[1] + 1e-9).all()
        assert (best.kl >= 0).all()


def test_evaluation_agrees_with_enumeration(world):
    reference, policy, p_ref, p, scores = world
    objective = Objective(reference, reward, kl_coef=BETA)
    prompts = PromptDataset(((BOS, 5),) * 2, 2)
    listed, after, before = evaluate(
        policy, objective, prompts, max_new_tokens=2, n_policy=3000, n_reference=3000, n_prompts=2
    )
    figures = summarise(after, before, BETA)
    kl = (p * np.log(p / p_ref)).sum()
    assert figures["kl"]["value"] == pytest.approx(kl, abs=0.06)
    assert figures["score_after"]["value"] == pytest.approx((p * scores).sum(), abs=0.06)
    exact = BETA * np.log((p_ref * np.exp(scores / BETA)).sum())
    assert figures["objective_optimum"]["value"] == pytest.approx(exact, abs=0.06)
    assert listed["objective_optimum"]["value"] == pytest.approx(exact, abs=1e-4)
    assert listed["kl"]["value"] == pytest.approx(kl, abs=1e-4)
    assert listed["optimality"]["value"] == pytest.approx(figures["optimality"]["value"], abs=0.1)


def test_the_reference_has_optimality_zero_and_no_divergence(world):
    reference, *_ = world
    objective = Objective(reference, reward, kl_coef=BETA)
    prompts = PromptDataset(((BOS, 5), (BOS, 6), (BOS, 7)), 2)
    _, drawn, before = evaluate(
        reference, objective, prompts, max_new_tokens=2, n_policy=200, n_reference=200
    )
    figures = summarise(drawn, before, BETA)
    assert figures["kl"]["value"] == 0.0
    assert figures["optimality"]["low"] < 0.1
    assert figures["optimality"]["high"] > -0.1
    assert (drawn.lengths <= 2).all()


def test_best_of_n_takes_the_maximum_and_pays_the_bound():
    scores = np.array([[0.0, 1.0, 2.0, 3.0, 9.0]])
    assert best_of_n(scores, 2, 0.0)[0] == pytest.approx((1.0 + 3.0) / 2)
    expected = 3.0 - 0.5 * (np.log(4) - 0.75)
    assert best_of_n(scores, 4, 0.5)[0] == pytest.approx(expected)


def test_optimality_is_zero_one_and_negative_where_it_should():
    reference, best = np.zeros(40), np.linspace(1, 2, 40)
    assert optimality(reference, reference, best)["value"] == 0.0
    assert optimality(best, reference, best)["value"] == 1.0
    assert optimality(-best, reference, best)["high"] < 0


def test_an_ess_too_small_is_not_reported(world):
    reference, policy, *_ = world
    objective = Objective(reference, reward, kl_coef=1e-3)
    prompts = PromptDataset(((BOS, 5), (BOS, 6)), 2)
    figures, _, _ = evaluate(
        policy, objective, prompts, max_new_tokens=6, n_policy=8, n_reference=8
    )
    assert figures["optimality"] is None
    assert figures["objective_optimum"] is None
    assert figures["optimum"]["ess"]["value"] < 20
    # An ESS of 20 is required; `needed` samples reach it if the ESS grows in proportion to them.
    needed = figures["optimum"]["samples_needed"]
    assert needed > 16
    assert needed == pytest.approx(16 * 20 / figures["optimum"]["ess"]["value"], abs=1)
