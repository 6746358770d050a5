"""Decoding and updates with fixed shapes, as CUDA graphs replay them, give the same numbers.

On a CPU the same code runs without a graph; with a GPU the graphs themselves are tested.
"""

import copy
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import BOS, ENDS, PLAIN, SERVED, V, make_config, make_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from agents.sb3 import PPO, build
from agents.sb3.policy import update_graphs
from agents.sb3.policy.update_graphs import UpdateGraphs, size_for
from agents.trajectory_balance import TrajectoryBalance
from rlhf_gym.lm import attention
from rlhf_gym.lm.causal_lm import CausalLM, continuation_log_probs
from rlhf_gym.lm.decoding import (
    active_rows as decoding_rows,
)
from rlhf_gym.lm.decoding import (
    cuda_graphs as graphs,
)
from rlhf_gym.lm.decoding import (
    decode_cache as decode,
)
from rlhf_gym.lm.decoding import (
    kv_slots as slots,
)
from rlhf_gym.lm.decoding import (
    sampling,
)
from rlhf_gym.lm.decoding.cuda_graphs import Bfloat16Copy, columns_for, rows_for
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden
from rlhf_gym.lm.decoding.method import supports_slots, takes_graphs
from rlhf_gym.lm.decoding.sampling import Sampled, sample_with_log_probs
from rlhf_gym.lm.lora import add_adapters
from rlhf_gym.tokens import PAD, Sequences, continuations, pad_rows, row_lengths

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BUDGET = 12


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    """Each device, with fixed shapes on all."""
    for module in (decode, decoding_rows):
        monkeypatch.setattr(module, "takes_graphs", supports_slots)
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_are_those_of_each_tokens_own_state(load, device, family):
    lm = load(family)
    prompts = prompts_of(24, device)
    torch.manual_seed(0)
    head = torch.nn.Linear(lm.model.config.hidden_size, 1).to(device)
    found = sample_with_log_probs(lm, prompts, BUDGET, value_head=head)
    sequences = continuations(prompts, found.responses)
    with torch.no_grad():
        expected = head(lm.states(sequences)).squeeze(-1)
    there = found.responses != PAD
    torch.testing.assert_close(found.values[there], expected, atol=5e-5, rtol=1e-5)
    assert not found.values[~there].any()


@pytest.mark.parametrize("family", SERVED)
def test_the_likeliest_tokens_are_those_of_free_shapes(load, device, family, monkeypatch):
    lm = load(family)
    prompts = prompts_of(24, device)[[0, 1, 2, 3, 0, 0, *range(4, 24)]]
    fixed = sampled(lm, prompts, deterministic=True)
    again = sampled(lm, prompts, deterministic=True)  # in the same slots
    for module in (decode, decoding_rows):
        monkeypatch.setattr(module, "takes_graphs", lambda lm, width: False)
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
    assert [kept.place.rows for kept in slots._idle[lm.model]] == [5, 6]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_gone_leaves_nothing(load, device, precision):
    """At once: what waits for Python's collector is memory that a GPU does not have."""
    lm = load("llama", precision)
    weights = [weakref.ref(p) for p in lm.model.parameters()]
    gc.collect()
    gc.disable()
    try:
        sampled(lm, prompts_of(4, device))
        sampled(lm, prompts_of(5, device))
        cache = DecodeCache(lm)
        cache.last_hidden(prompts_of(4, device))
        kept = [weakref.ref(one) for one in slots._idle[lm.model]]
        assert len(kept) == 1, "the cache has the others"
        slots._idle.pop(lm.model)
        if device == "cpu":  # what stands in for a graph there holds its work
            gc.collect()
        assert not [one for one in kept if one() is not None], "slots"
        del lm, cache
    finally:
        gc.enable()
    gc.collect()  # a model of transformers holds itself
    assert not [one for one in weights if one() is not None]


def test_free_slots_leave_nothing(load_lm, monkeypatch):
    made = []
    init = slots._Slots.__init__

    def seen(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(slots._Slots, "__init__", seen)
    gc.disable()
    try:
        sampled(load_lm("llama"), prompts_of(4, "cpu"))
        assert made
        assert not [one for one in made if one() is not None]
    finally:
        gc.enable()


def test_what_the_last_sampling_left_is_not_seen(load, device):
    lm = load("gpt2")
    prompts = prompts_of(8, device)
    first = sampled(lm, prompts, deterministic=True)
    for layer in slots._idle[lm.model][0].layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    again = sampled(lm, prompts, deterministic=True)
    torch.testing.assert_close(again.log_probs, first.log_probs, atol=0, rtol=0)


def test_inference_mode_leaves_no_traces(load, device):
    lm = load("llama", "bf16")
    prompts = prompts_of(8, device)
    with torch.inference_mode():
        inside = sampled(lm, prompts, deterministic=True)
    outside = sampled(lm, prompts, deterministic=True)
    assert torch.equal(inside.responses, outside.responses)
    with torch.inference_mode():
        assert torch.equal(sampled(lm, prompts, deterministic=True).responses, inside.responses)


def test_copies_of_weights_are_made_once_a_model(load, device):
    lm = load("llama", "bf16")
    for n in (4, 6):
        sampled(lm, prompts_of(n, device))
    one, other = slots._idle[lm.model]
    assert one.low is other.low is not None


def test_a_cache_can_be_copied(load, device):
    lm = load("llama")
    cache = DecodeCache(lm)
    tokens = torch.nn.functional.pad(prompts_of(4, device), (0, 4), value=PAD)
    cache.last_hidden(tokens)
    grown = tokens.clone()
    every = torch.arange(4, device=device)
    grown[every, row_lengths(tokens)] = 7
    expected = cache.last_hidden(grown)
    torch.testing.assert_close(copy.deepcopy(cache).last_hidden(grown), expected)


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
    low = Bfloat16Copy(lm.model)
    ids = prompts_of(4, device).clamp(min=0)
    with torch.no_grad():
        next(lm.model.parameters()).mul_(1.1)
        low.refresh()
        expected = lm.hidden_states(ids)
        found = replace(lm, model=low.model).hidden_states(ids)
        plain = replace(lm, precision="fp32").hidden_states(ids)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert all(not p.requires_grad for p in low.copies)


# Updates


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
def test_padding_to_a_size_changes_no_gradient(load, device, family):
    lm = load(family)
    update = UpdateGraphs(lm)
    for lengths in ((3, 7, 1, 5, 2), (8,), (3, 3, 9, 1, 2, 2)):
        assert_same_gradients(lm, update, sequences_of(*lengths, device=device), 2e-5)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_same_gradients(lm, update, sequences_of(3, 7, 1, 5, 2, device=device, seed=1), 2e-5)


def test_no_row_is_padded_beyond_the_models_context(device):
    torch.manual_seed(0)
    config = make_config("gpt2", n_positions=50)
    model = AutoModelForCausalLM.from_config(config).eval().to(device)
    lm = CausalLM.wrap(model, make_tokenizer())
    sequences = sequences_of(45, 3, device=device)
    assert size_for(sequences.tokens.shape[1]) > 50
    assert_same_gradients(lm, UpdateGraphs(lm), sequences, 2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_changes_about_the_weights_is_seen(load, device, precision):
    lm = load("llama", precision)
    update = UpdateGraphs(lm)
    sequences = sequences_of(3, 7, 1, device=device)
    tolerance = 2e-5 if precision == "fp32" else 0.1
    weights = list(lm.model.model.layers[0].parameters())

    def same() -> None:
        assert_same_gradients(lm, update, sequences, tolerance)

    same()
    for weight in weights:
        weight.requires_grad_(False)
    same()
    for weight in weights:
        weight.data = weight.data + 0.05  # elsewhere, though it does not learn
    same()
    for weight in weights:
        weight.requires_grad_(True)
    same()
    layer = lm.model.model.layers[1].mlp
    layer.up_proj.weight = torch.nn.Parameter(layer.up_proj.weight.detach() * 1.5)
    same()


def test_adapters_learn_the_same(load, device):
    pytest.importorskip("peft")
    lm = load("llama")
    lm.model.requires_grad_(False)
    add_adapters(lm.model, 2)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    update = UpdateGraphs(lm)
    for seed in range(2):
        assert_same_gradients(lm, update, sequences_of(3, 7, 1, device=device, seed=seed), 2e-5)
    assert update._pairs


def test_gradients_add_up(load, device):
    lm = load("llama")
    update, parts = UpdateGraphs(lm), [sequences_of(3, 7, device=device, seed=i) for i in range(3)]
    found = []
    for states in (update.states, lm.states):
        lm.model.zero_grad()
        for part in parts:
            lm.log_probs_of(states(part), part.chosen()).sum().backward()
        found.append([p.grad.clone() for p in lm.model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_a_loss_of_the_past_does_not_disturb_a_capture(load, device, caplog):
    lm = load("llama")
    loss = lm.states(sequences_of(2, 4, device=device)).sum()  # holds the parameters' graph
    loss.backward()
    with caplog.at_level(logging.WARNING):
        update = UpdateGraphs(lm)
        assert_same_gradients(lm, update, sequences_of(3, 7, device=device), 2e-5)
    assert update._pairs
    assert not caplog.records
    assert loss.grad_fn is not None


def test_two_forward_passes_before_a_backward_pass_are_refused(load, device):
    update = UpdateGraphs(load("llama"))
    one = update.states(sequences_of(3, 7, device=device))
    update.states(sequences_of(2, 7, 9, device=device))  # of another size
    with pytest.raises(RuntimeError, match="another forward pass has overwritten"):
        one.sum().backward()
    one = update.states(sequences_of(3, 7, device=device))
    one.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="another forward pass has overwritten"):
        one.sum().backward()


def test_what_cannot_be_captured_is_computed_without(load, device, monkeypatch, caplog):
    lm = load("llama")
    monkeypatch.setattr(UpdateGraphs, "whole", lambda self, ids: torch.zeros(3, 4)[5])
    update = UpdateGraphs(lm)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same_gradients(lm, update, sequences_of(3, 7, device=device), 1e-5)
    assert len([r for r in caplog.records if "an update of" in r.message]) == 1


def test_what_gives_other_numbers_is_computed_without(load, device, monkeypatch, caplog):
    lm = load("llama")
    whole = UpdateGraphs.whole
    monkeypatch.setattr(UpdateGraphs, "whole", lambda self, ids: 1.1 * whole(self, ids))
    with caplog.at_level(logging.WARNING):
        assert_same_gradients(lm, UpdateGraphs(lm), sequences_of(3, 7, device=device), 1e-5)
    assert "computes something else" in caplog.text


def test_a_policy_with_checkpointing_or_groups_learns_as_before(device, monkeypatch):
    for name, options in (("ppo", {"gradient_checkpointing": True}), ("groups", {})):
        weights = []
        for fixed in (True, False):
            monkeypatch.setattr(update_graphs, "takes_graphs", lambda lm, width, fixed=fixed: fixed)
            rows = {"rows_per_prompt": 4} if name == "groups" else {}
            env = gymnasium.make_vec(
                "rlhf_gym/Exact-v0", num_envs=32, device=device, **rows
            ).unwrapped
            learner = build(
                PPO if name == "ppo" else TrajectoryBalance,
                env,
                learning_rate=0.1,
                policy_options={"optimizer_class": torch.optim.SGD, **options},
                device=device,
                seed=0,
            )
            learner.learn(2 * 32 * env.max_new_tokens)
            assert bool(learner.policy._learning_states.graphs) == (fixed and name == "groups")
            weights.append(torch.nn.utils.parameters_to_vector(learner.policy.parameters()))
        torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)


def test_what_takes_long_is_computed_without(load, device, monkeypatch):
    lm = load("llama")
    monkeypatch.setattr(update_graphs, "OPERATIONS", 1.0)
    monkeypatch.setattr(UpdateGraphs, "_hidden", None)  # never called
    assert_same_gradients(lm, UpdateGraphs(lm), sequences_of(3, 7, device=device), 1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("critic", ["shared", "reference"])
def test_a_training_learns_the_same_with_and_without(device, monkeypatch, precision, critic):
    weights = []
    for fixed in (True, False):
        monkeypatch.setattr(update_graphs, "takes_graphs", lambda lm, width, fixed=fixed: fixed)
        env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=32, device=device).unwrapped
        # Adam would make steps of full size of what is rounding alone.
        options = {"precision": precision, "optimizer_class": torch.optim.SGD}
        if critic == "reference":
            options["critic"] = env.objective.reference.model.name_or_path
        learner = build(
            PPO, env, **PLAIN, learning_rate=0.1, policy_options=options, device=device, seed=0
        )
        parameters = learner.policy.parameters
        before = torch.nn.utils.parameters_to_vector(parameters()).detach().clone()
        learner.learn(3 * 32 * env.max_new_tokens)
        assert bool(learner.policy._learning_states.graphs) == fixed
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
            assert takes_graphs(lm, 64)
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

    @pytest.mark.parametrize("left_out", [True, False])
    def test_no_attention_plans_for_a_shape(self, left_out, monkeypatch):
        if not left_out:  # else this test could not fail
            monkeypatch.setattr(attention, "without_cudnn", nullcontext)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            make_config("gpt2", hidden_size=128, num_attention_heads=2)
        )
        lm = CausalLM.wrap(model.eval().to("cuda"), make_tokenizer())
        lm = replace(lm, precision="bf16")
        # As PyTorch orders them by itself on the kinds of GPU that it prefers cuDNN's on.
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with sdpa_kernel(order, set_priority=True), profile as seen:
            sampled(lm, prompts_of(8, "cuda"))
            lm.states(sequences_of(3, 7, device="cuda")).sum().backward()
        names = {event.key for event in seen.key_averages()}
        assert any("scaled_dot_product" in name for name in names)
        assert any("cudnn_attention" in name for name in names) != left_out

    def test_tokens_are_drawn_from_their_probabilities(self):
        probabilities = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.7], device="cuda")
        logits = probabilities.log().expand(100_000, 5)
        torch.manual_seed(0)
        shares = torch.bincount(sampling.draw(logits), minlength=5).cpu() / 100_000
        torch.testing.assert_close(shares, probabilities.cpu(), atol=0.006, rtol=0)
        assert shares[[0, 3]].tolist() == [0, 0]

    def test_one_that_cannot_be_captured_falls_back_with_one_line(self, load_lm, caplog):
        lm = load_lm("llama")
        model = copy.deepcopy(lm.model).to("cuda")
        layer, forward = model.model.layers[0], model.model.layers[0].forward

        def looks(hidden, *args, **options):
            float(hidden.detach().sum())
            return forward(hidden, *args, **options)

        layer.forward = looks
        lm = replace(lm, model=model)
        with caplog.at_level(logging.WARNING):
            assert supports_slots(lm, 64)
            assert not takes_graphs(lm, 64)
            found = sampled(lm, prompts_of(8, "cuda"))
        assert len([r for r in caplog.records if "CUDA graph" in r.message]) == 1
        expected = continuation_log_probs(lm, prompts_of(8, "cuda"), found.responses)
        torch.testing.assert_close(found.log_probs, expected, atol=5e-5, rtol=1e-4)
        update = UpdateGraphs(lm)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert_same_gradients(lm, update, sequences_of(3, 7, device="cuda"), 1e-5)
        assert len([r for r in caplog.records if "an update of" in r.message]) == 1

    def test_after_a_capture_that_broke_off_nothing_is_replayed(self):
        """In a process of its own, whose graphs are lost."""
        code = """
import torch
from rlhf_gym.lm.decoding import cuda_graphs
device = torch.device("cuda")
x = torch.ones(4, device=device)
steps = cuda_graphs.StepGraphs(4, device)
ids = torch.zeros(4, dtype=torch.int64, device=device)
def step(tokens, positions, visible):
    return x[positions] + 1
assert steps.run(step, ids, ids, 1).tolist() == [2.0] * 4
def waits():
    torch.cuda.synchronize()
    return [x * 2]
try:
    cuda_graphs.captured(waits, device, cuda_graphs.new_pool(device))
except RuntimeError:
    pass
else:
    raise AssertionError("captured all the same")
assert cuda_graphs.broken()
assert torch.rand(3, device=device).shape == (3,)
assert steps.run(step, ids, ids, 1).tolist() == [2.0] * 4
assert torch.cuda.current_stream() == torch.cuda.default_stream()
"""
        subprocess.run([sys.executable, "-c", code], check=True)
