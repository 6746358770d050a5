"""Decoding and updates with fixed shapes, as CUDA graphs replay them, give the same numbers.

On a CPU the same code runs without a graph; with a GPU the graphs themselves are tested.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import BOS, ENDS, SERVED, V

from agents.sb3 import PPO, build, update_graphs
from agents.sb3 import policy as policy_module
from agents.sb3.update_graphs import UpdateGraphs, size_for
from rlhf_gym import decode, graphs, sampling, slots
from rlhf_gym.decode import DecodeCache, last_hidden, supports_slots, takes_graphs
from rlhf_gym.graphs import LowCopy, columns_for, rows_for
from rlhf_gym.lm import CausalLM, continuation_log_probs
from rlhf_gym.sampling import Sampled, sample_with_log_probs
from rlhf_gym.tokens import PAD, Sequences, pad_rows, row_lengths

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BUDGET = 12


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    """Each device, with fixed shapes on all."""
    for module in (decode, sampling):
        monkeypatch.setattr(module, "takes_graphs", lambda lm: supports_slots(lm))
    monkeypatch.setattr(graphs, "FEWEST_ROWS", 2)
    monkeypatch.setattr(graphs, "FEWEST_COLUMNS", 4)
    monkeypatch.setattr(sampling, "look_every", lambda device: 2)
    return str(request.param)


@pytest.fixture
def load(load_lm: Callable[..., CausalLM], device: str) -> Callable[..., CausalLM]:
    def on_device(family: str, precision: str = "fp32", **options: float) -> CausalLM:
        lm = load_lm(family, **options)
        model = copy.deepcopy(lm.model).to(device)
        return replace(lm, model=model, precision=precision)

    return on_device


def prompts_of(n: int, device: str) -> torch.Tensor:
    rng = np.random.default_rng(1)
    rows = [[BOS, *rng.integers(4, V, rng.integers(1, 6)).tolist()] for _ in range(n)]
    return torch.from_numpy(pad_rows(rows)).to(device)


def sampled(lm: CausalLM, prompts: torch.Tensor, **options: bool) -> Sampled:
    torch.manual_seed(0)
    return sample_with_log_probs(lm, prompts, BUDGET, **options)


def test_few_sizes_hold_every_count():
    assert {rows_for(n, 100) for n in range(1, 101)} == {100, 50, 25, 13}
    assert all(rows_for(n, 100) >= n for n in range(1, 101))
    assert rows_for(1, 3) == 3
    assert [columns_for(n, 600) for n in (1, 128, 129, 300, 600)] == [128, 128, 256, 512, 600]
    assert columns_for(5, 64) == 64


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("family", SERVED)
def test_responses_say_what_a_pass_over_whole_sequences_says(load, device, family, deterministic):
    lm = load(family, temperature=0.8)
    prompts = prompts_of(24, device)
    found = sampled(lm, prompts, deterministic=deterministic)
    lengths = row_lengths(found.responses)
    assert len(set(lengths.tolist())) > 3, "rows end at different times"
    for row, n in zip(found.responses.tolist(), lengths.tolist(), strict=True):
        assert row[n:] == [PAD] * (BUDGET - n)
        assert not set(row[: n - 1]) & set(ENDS)
        assert n == BUDGET or row[n - 1] in ENDS
    expected = continuation_log_probs(lm, prompts, found.responses)
    torch.testing.assert_close(found.log_probs, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SERVED)
def test_the_likeliest_tokens_are_those_of_free_shapes(load, device, family, monkeypatch):
    lm = load(family)
    prompts = prompts_of(24, device)[[0, 1, 2, 3, 0, 0, *range(4, 24)]]
    fixed = sampled(lm, prompts, deterministic=True)
    again = sampled(lm, prompts, deterministic=True)  # in the same slots
    for module in (decode, sampling):
        monkeypatch.setattr(module, "takes_graphs", lambda lm: False)
    free = sampled(lm, prompts, deterministic=True)
    for found in (fixed, again):
        assert torch.equal(found.responses, free.responses)
        torch.testing.assert_close(found.log_probs, free.log_probs, atol=2e-5, rtol=1e-5)


def test_what_learns_between_two_samplings_is_seen(load, device):
    for precision in ("fp32", "bf16"):
        lm = load("llama", precision)
        prompts = prompts_of(8, device)
        before = sampled(lm, prompts, deterministic=True, stop_at_eos=False)
        kept = slots._idle[lm.model][0]
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        after = sampled(lm, prompts, deterministic=True, stop_at_eos=False)
        assert slots._idle[lm.model][0] is kept, "the same graphs"
        assert (after.log_probs - before.log_probs).abs().max() > 0.01
        plain = replace(lm, precision="fp32")
        expected = continuation_log_probs(plain, prompts, after.responses)
        tolerance = 2e-5 if precision == "fp32" else 0.1
        torch.testing.assert_close(after.log_probs, expected, atol=tolerance, rtol=1e-5)


def test_weights_that_move_elsewhere_are_captured_anew(load, device):
    lm = load("llama")
    prompts = prompts_of(8, device)
    sampled(lm, prompts)
    kept = slots._idle[lm.model][0]
    for parameter in lm.model.parameters():
        parameter.data = parameter.data + 0.05
    found = sampled(lm, prompts, deterministic=True)
    assert slots._idle[lm.model][0] is not kept
    expected = continuation_log_probs(lm, prompts, found.responses)
    torch.testing.assert_close(found.log_probs, expected, atol=2e-5, rtol=1e-5)


def test_no_more_slots_are_kept_than_a_training_needs(load, device):
    lm = load("llama")
    for n in (4, 5, 6, 5):
        sampled(lm, prompts_of(n, device))
    assert [kept.rows for kept in slots._idle[lm.model]] == [5, 6]


def test_a_model_that_is_gone_leaves_nothing(load, device):
    lm = load("llama")
    sampled(lm, prompts_of(4, device))
    before = len(slots._idle)
    del lm
    assert len(slots._idle) == before - 1


@pytest.mark.parametrize("family", SERVED)
def test_the_cache_gives_the_full_forward(load, device, family):
    lm = load(family)
    cache = DecodeCache(lm)
    rng = np.random.default_rng(0)
    tokens = prompts_of(6, device)
    tokens = torch.nn.functional.pad(tokens, (0, 10), value=PAD)
    for turn in range(8):
        expected = last_hidden(lm, tokens)
        torch.testing.assert_close(cache.last_hidden(tokens), expected, atol=5e-5, rtol=1e-4)
        tokens = tokens.clone()
        for row in rng.permutation(6)[:4].tolist():
            n = int(row_lengths(tokens[row]))
            tokens[row, n] = int(rng.integers(4, V))
        if turn == 4:  # an update
            with torch.no_grad():
                next(lm.model.parameters()).mul_(1.1)


@pytest.mark.parametrize("family", SERVED)
def test_bfloat16_copies_give_autocasts_numbers(load, device, family):
    lm = load(family, "bf16")
    low = LowCopy(lm.model)
    ids = prompts_of(4, device).clamp(min=0)
    with torch.no_grad():
        next(lm.model.parameters()).mul_(1.1)
        low.refresh()
        expected = lm.hidden_states(ids)
        found = replace(lm, model=low.model).hidden_states(ids)
        plain = replace(lm, precision="fp32").hidden_states(ids)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert all(not p.requires_grad for p in low._to)


# Updates


@pytest.fixture
def updates(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches padded to fixed sizes on all devices."""
    if device == "cpu":
        monkeypatch.setattr(UpdateGraphs, "_hidden", UpdateGraphs.whole)


def sequences_of(*lengths: int, device: str, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    starts = rng.integers(1, 5, len(lengths))
    rows = [rng.integers(4, V, s + n).tolist() for s, n in zip(starts, lengths, strict=True)]
    parts = torch.from_numpy(pad_rows(rows)), torch.from_numpy(starts), torch.tensor(lengths)
    return Sequences(*parts).to(device)


def gradients(
    lm: CausalLM, sequences: Sequences, states: Callable[[Sequences], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of a sum of log-probs and squared states."""
    lm.model.zero_grad()
    hidden = states(sequences)
    log_probs = lm.log_probs_of(hidden, sequences.chosen())
    (log_probs.sum() + hidden.square().mean()).backward()
    return {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    lm: CausalLM, graphs_of: UpdateGraphs, sequences: Sequences, tolerance: float
) -> None:
    found = gradients(lm, sequences, graphs_of.states)
    expected = gradients(lm, sequences, lm.states)
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance * scale, rtol=tolerance, msg=name
        )


def test_sizes_waste_at_most_half():
    sizes = [size_for(n) for n in range(1, 200)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(n <= size <= 1.5 * n for n, size in enumerate(sizes, 1))


@pytest.mark.parametrize("family", SERVED)
def test_padding_to_a_size_changes_no_gradient(load, device, updates, family):
    lm = load(family)
    update = UpdateGraphs(lm)
    for lengths in ((3, 7, 1, 5, 2), (8,), (3, 3, 9, 1, 2, 2)):
        assert_same_gradients(lm, update, sequences_of(*lengths, device=device), 2e-5)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_same_gradients(lm, update, sequences_of(3, 7, 1, 5, 2, device=device, seed=1), 2e-5)


def test_no_row_is_padded_beyond_the_models_context(load, device, updates):
    lm = load("gpt2")
    most = lm.model.config.n_positions
    sequences = sequences_of(most - 5, 3, device=device)
    assert UpdateGraphs(lm)._size(sequences.tokens)[1] <= most
    assert_same_gradients(lm, UpdateGraphs(lm), sequences, 2e-5)


def test_what_takes_long_is_computed_without(load, device, monkeypatch):
    lm = load("llama")
    monkeypatch.setattr(update_graphs, "OPERATIONS", 1.0)
    monkeypatch.setattr(UpdateGraphs, "_hidden", None)  # never called
    assert_same_gradients(lm, UpdateGraphs(lm), sequences_of(3, 7, device=device), 1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("critic", ["shared", "reference"])
def test_a_training_learns_the_same_with_and_without(
    device, updates, monkeypatch, precision, critic
):
    weights = []
    for fixed in (True, False):
        monkeypatch.setattr(policy_module, "takes_graphs", lambda lm, fixed=fixed: fixed)
        env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=32, device=device).unwrapped
        # Adam would make steps of full size of what is rounding alone.
        options = {"precision": precision, "optimizer_class": torch.optim.SGD}
        if critic == "reference":
            options["critic"] = env.objective.reference.model.name_or_path
        learner = build(PPO, env, learning_rate=0.1, policy_options=options, device=device, seed=0)
        parameters = learner.policy.parameters
        before = torch.nn.utils.parameters_to_vector(parameters()).detach().clone()
        learner.learn(3 * 32 * env.max_new_tokens)
        assert bool(learner.policy._update_graphs) == fixed
        weights.append(torch.nn.utils.parameters_to_vector(parameters()).detach())
    apart = (weights[0] - weights[1]).norm() / (weights[0] - before).norm()
    assert apart < (0.01 if precision == "fp32" else 0.3)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
class TestOnGPU:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("family", SERVED)
    def test_every_served_family_is_captured(self, load_lm, family, precision, caplog):
        lm = load_lm(family)
        lm = replace(lm, model=copy.deepcopy(lm.model).to("cuda"), precision=precision)
        with caplog.at_level(logging.WARNING):
            assert takes_graphs(lm)
            found = sampled(lm, prompts_of(24, "cuda"))
            assert slots._idle[lm.model][0].graphs._captured, "replayed"
            whole = replace(lm, precision="fp32")
            expected = continuation_log_probs(whole, prompts_of(24, "cuda"), found.responses)
            error = (found.log_probs - expected).abs()
            assert error.max() < (5e-5 if precision == "fp32" else 0.5)
            assert error.mean() < (1e-5 if precision == "fp32" else 0.05)
            update = UpdateGraphs(lm)
            for seed in range(2):  # captured, replayed
                sequences = sequences_of(3, 7, 1, 5, 2, device="cuda", seed=seed)
                tolerance = 2e-5 if precision == "fp32" else 0.1
                assert_same_gradients(lm, update, sequences, tolerance)
            assert update._pairs, "replayed"
        assert not [r for r in caplog.records if "captured" in r.message]

    @pytest.mark.parametrize("wait", ["a number is read", "the device is waited for"])
    def test_one_that_cannot_be_captured_falls_back_with_one_line(self, load_lm, caplog, wait):
        lm = load_lm("llama")
        model = copy.deepcopy(lm.model).to("cuda")
        layer, forward = model.model.layers[0], model.model.layers[0].forward

        def looks(hidden, *args, **options):
            if wait == "a number is read":
                float(hidden.sum())
            else:
                torch.cuda.synchronize()
            return forward(hidden, *args, **options)

        layer.forward = looks
        lm = replace(lm, model=model)
        with caplog.at_level(logging.WARNING):
            assert supports_slots(lm)
            assert not takes_graphs(lm)
            found = sampled(lm, prompts_of(8, "cuda"))
        assert len([r for r in caplog.records if "CUDA graph" in r.message]) == 1
        expected = continuation_log_probs(lm, prompts_of(8, "cuda"), found.responses)
        torch.testing.assert_close(found.log_probs, expected, atol=5e-5, rtol=1e-4)
        update = UpdateGraphs(lm)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert_same_gradients(lm, update, sequences_of(3, 7, device="cuda"), 1e-5)
        assert len([r for r in caplog.records if "an update of" in r.message]) == 1

    def test_two_forward_passes_before_a_backward_pass_are_refused(self, load_lm):
        lm = load_lm("llama")
        update = UpdateGraphs(replace(lm, model=copy.deepcopy(lm.model).to("cuda")))
        one = update.states(sequences_of(3, 7, device="cuda"))
        update.states(sequences_of(2, 7, device="cuda"))
        with pytest.raises(RuntimeError, match="before the first one's backward pass"):
            one.sum().backward()
