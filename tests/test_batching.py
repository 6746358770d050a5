"""Rows go through a model in the groups that cost least, and what comes out does not show it."""

import itertools

import numpy as np
import pytest
import torch
from conftest import V, draw_responses
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from rlhf_gym.lm import batching as module
from rlhf_gym.lm.batching import NEVER, by_length, pass_cost, passes
from rlhf_gym.tokens import continuations


def price(groups: list[list[int]], lengths: list[int], cost: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + cost for group in groups)


@pytest.mark.parametrize("cost", [0, 1, 3, 8, 40])
def test_no_cut_of_the_sorted_rows_is_cheaper(cost):
    rng = np.random.default_rng(cost)
    for _ in range(20):
        lengths = rng.integers(1, 12, 7).tolist()
        found = by_length(lengths, NEVER, cost)
        assert sorted(itertools.chain(*found)) == list(range(7))
        ascending = sorted(range(7), key=lengths.__getitem__)
        every = (
            [ascending[a:b] for a, b in itertools.pairwise((0, *cuts, 7))]
            for n in range(7)
            for cuts in itertools.combinations(range(1, 7), n)
        )
        assert price(found, lengths, cost) == min(price(g, lengths, cost) for g in every)


def test_a_group_never_holds_more_than_it_may():
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    for cost, most in itertools.product((0, 50, NEVER), (1, 29, 64, 500)):
        groups = by_length(lengths, most, cost)
        assert sorted(itertools.chain(*groups)) == list(range(200))
        for group in groups:
            assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= most


def test_rows_of_one_length_stay_together_and_no_rows_are_no_groups():
    assert by_length([5] * 9, NEVER, 0) == [list(range(9))]
    assert by_length([], NEVER, 3) == []
    assert by_length([2, 40, 3, 41], NEVER, NEVER) == [[0, 2, 1, 3]]
    assert by_length([2, 40, 3, 41], NEVER, 5) == [[0, 2], [1, 3]]


def test_a_pass_costs_fewer_tokens_the_larger_the_model():
    small, large = (
        pass_cost(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=d, n_layer=1, n_head=2)))
        for d in (32, 128)
    )
    assert small > 4 * large > 4 * module.LEAST_COST


def test_any_model_has_a_cost_and_a_gpu_never_cuts():
    state_space = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2))
    assert 0 < pass_cost(state_space) < NEVER
    huge = GPT2Config(vocab_size=50257, n_embd=2048, n_layer=2, n_head=16)
    with torch.device("meta"):
        elsewhere = GPT2LMHeadModel(huge)
    assert pass_cost(elsewhere) == NEVER
    assert by_length([3, 90, 5], NEVER, NEVER) == [[0, 2, 1]]


def test_uneven_rows_are_scored_as_in_one_pass(load_lm, monkeypatch):
    lm = load_lm("llama")
    rng = np.random.default_rng(0)
    prompts = torch.from_numpy(rng.integers(0, V, (40, 3)))
    sequences = continuations(prompts, torch.from_numpy(draw_responses(40, 12)))
    monkeypatch.setattr(module, "LAYER_COST", 0.0)
    monkeypatch.setattr(module, "LEAST_COST", 0)
    assert len(list(passes(lm.model, sequences))) == len(set(sequences.lengths.tolist())) > 3
    cut = lm.log_probs(sequences)
    monkeypatch.setattr(module, "LAYER_COST", float(1 << 60))
    assert len(list(passes(lm.model, sequences))) == 1
    torch.testing.assert_close(cut, lm.log_probs(sequences), atol=1e-5, rtol=1e-5)
