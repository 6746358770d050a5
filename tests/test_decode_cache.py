"""What is cached never shows: any history of rows gives the full forward's answers."""

import logging
import math

import numpy as np
import pytest
import torch
from conftest import (
    BOS,
    BUDGET,
    ENDS,
    EOS,
    OWN_CACHE,
    SERVED,
    UNSERVED,
    V,
    count_forwards,
    hidden_alone,
    log_probs_alone,
    make_config,
    make_tokenizer,
)
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_gym.lm.architecture import (
    full_attention_width,
    has_dynamic_rope,
    has_full_attention,
    shortest_window,
)
from rlhf_gym.lm.causal_lm import CausalLM, continuation_log_probs
from rlhf_gym.lm.decoding import active_rows as decoding_rows
from rlhf_gym.lm.decoding import kv_slots as slots
from rlhf_gym.lm.decoding import sampling
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden
from rlhf_gym.lm.decoding.method import decoding_method, supports_slots
from rlhf_gym.lm.decoding.own_cache import OwnCacheDecoder
from rlhf_gym.lm.decoding.sampling import draw, sample_responses, sample_with_log_probs
from rlhf_gym.tokens import PAD, Sequences, continuations, pad_rows, row_lengths, unflatten

WIDTH = 16


def rows_of(*lengths: int, seed: int = 0) -> torch.Tensor:
    """Random rows of these lengths, right-padded to WIDTH."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(pad_rows([rng.integers(0, V, n).tolist() for n in lengths], WIDTH))


def grow(tokens: torch.Tensor, *rows: int) -> torch.Tensor:
    """A copy with one more token in these rows (in every row if none is named)."""
    out = tokens.clone()
    for i in rows or range(len(out)):
        n = int(row_lengths(out[i]))
        out[i, n] = (7 * n + 3 * i) % V
    return out


def assert_full_forward(cache: DecodeCache, tokens: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The cache's answer is that of each row alone, unpadded, by transformers itself."""
    got = cache.last_hidden(tokens)
    expected = torch.stack([hidden_alone(cache.lm, row.tolist()) for row in tokens])
    torch.testing.assert_close(got, expected, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*SERVED, *OWN_CACHE])
def test_any_history_gives_the_full_forward(save_lm, family, attention):
    if attention == "sdpa" and family in ("gpt_neo", "bloom", "mamba", "mamba2"):
        pytest.skip("transformers has no such attention for this family")
    cache = DecodeCache(CausalLM.load(save_lm(family), attn_implementation=attention))
    tokens = rows_of(3, 1, 7, 5)
    assert_full_forward(cache, tokens)
    tokens = grow(tokens)
    assert_full_forward(cache, tokens)
    tokens = grow(tokens, 0, 2)  # rows 1 and 3 do not move
    tokens[3] = rows_of(4, seed=1)[0]  # midway another row takes the place
    assert_full_forward(cache, tokens)
    assert_full_forward(cache, tokens)  # nothing changed at all
    tokens = grow(grow(tokens, 1), 1, 2)  # row 1 by two tokens at once
    tokens[0, 2:] = PAD  # row 0 is cut back
    assert_full_forward(cache, tokens)
    tokens = grow(tokens)
    assert_full_forward(cache, tokens)
    tokens[2, 4] = (tokens[2, 4] + 1) % V  # an edit in the middle, no growth
    assert_full_forward(cache, tokens)
    tokens = grow(tokens[[3, 1]])  # fewer rows, in another order
    assert_full_forward(cache, tokens)
    tokens = torch.cat([grow(tokens), rows_of(9, 2, WIDTH, seed=2)])  # more rows, one full
    assert_full_forward(cache, tokens)
    assert_full_forward(cache, grow(tokens, 0, 1, 2, 3))


def test_a_random_history_gives_the_full_forward(load_lm):
    cache = DecodeCache(load_lm("llama"))
    rng = np.random.default_rng(0)
    tokens = rows_of(3, 6, 1, 8, 2)
    for turn in range(25):
        tokens = tokens.clone()
        for i in range(len(tokens)):
            what = rng.integers(4)
            if what == 0 or int(row_lengths(tokens[i])) == WIDTH:
                tokens[i] = rows_of(int(rng.integers(1, WIDTH)), seed=100 * turn + i)[0]
            elif what < 3:
                tokens = grow(tokens, i)
        assert_full_forward(cache, tokens)


def test_long_prefills_in_passes_change_nothing(load_lm, monkeypatch):
    monkeypatch.setattr(slots, "tokens_per_pass", lambda device: 2 * WIDTH)
    cache = DecodeCache(load_lm("llama"))
    tokens = rows_of(3, 6, 1, 8, 2)
    assert_full_forward(cache, tokens)
    assert_full_forward(cache, grow(tokens))


def test_answers_are_fresh_copies(load_lm):
    cache = DecodeCache(load_lm("llama"))
    tokens = rows_of(3, 5)
    first = cache.last_hidden(tokens)
    kept = first.clone()
    first.zero_()
    torch.testing.assert_close(cache.last_hidden(tokens), kept)
    tokens[0, 1] = (tokens[0, 1] + 1) % V  # the caller's own tensor, changed in place
    assert_full_forward(cache, tokens)


def test_cost_is_one_step_for_grown_rows_and_one_prefill_for_new_ones(load_lm):
    lm = load_lm("llama")
    cache = DecodeCache(lm)
    tokens = rows_of(3, 1, 7, 5)
    with count_forwards(lm) as shapes:
        cache.last_hidden(tokens)
        assert shapes == [(4, 7)], "four new rows: one prefill"
        shapes.clear()
        tokens = grow(tokens)
        cache.last_hidden(tokens)
        assert shapes == [(4, 1)], "grown rows: one token each"
        shapes.clear()
        cache.last_hidden(tokens)
        assert shapes == [], "unchanged rows: nothing"
        tokens = grow(tokens, 0, 1, 3)
        tokens[2] = rows_of(6, seed=1)[0]
        cache.last_hidden(tokens)
        assert shapes == [(1, 6), (4, 1)], "one new row, three grown"


def sgd_step(lm: CausalLM) -> None:
    tokens = rows_of(6, 6, seed=9)[:, :6]
    lm.model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(lm.model.parameters(), lr=0.1).step()


def adam_step(lm: CausalLM, **options: bool) -> None:
    tokens = rows_of(6, 6, seed=9)[:, :6]
    lm.model(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(lm.model.parameters(), lr=0.01, **options).step()


def load_others(lm: CausalLM) -> None:
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in lm.model.state_dict().items()}
    lm.model.load_state_dict(state)


def one_weight_in_place(lm: CausalLM) -> None:
    with torch.no_grad():
        next(iter(lm.model.parameters()))[:, 0].add_(1.0)


@pytest.mark.parametrize(
    "update",
    [
        sgd_step,
        adam_step,
        lambda lm: adam_step(lm, fused=True),
        lambda lm: adam_step(lm, foreach=True),
        load_others,
        one_weight_in_place,
        lambda lm: torch.nn.utils.vector_to_parameters(
            1.1 * torch.nn.utils.parameters_to_vector(lm.model.parameters()), lm.model.parameters()
        ),
    ],
    ids=["sgd", "adam", "fused", "foreach", "load_state_dict", "in place", "vector"],
)
def test_an_update_never_leaves_it_stale(load_lm, update):
    lm = load_lm("llama")
    cache = DecodeCache(lm)
    tokens = rows_of(3, 1, 7, 5)
    before = cache.last_hidden(tokens)
    torch.manual_seed(0)
    update(lm)
    assert (cache.last_hidden(tokens) - before).abs().max() > 1e-3, "the same rows"
    assert_full_forward(cache, grow(tokens))


def test_in_training_mode_it_is_neither_read_nor_written(load_lm):
    lm = load_lm("llama")
    cache = DecodeCache(lm)
    tokens = rows_of(3, 1, 7, 5)
    cache.last_hidden(tokens)
    lm.model.train()
    with count_forwards(lm) as shapes:
        assert_full_forward(cache, tokens)
        assert_full_forward(cache, grow(tokens))
        assert [width for rows, width in shapes if rows == 4] == [7, 8], "whole rows, not a step"
    lm.model.eval()
    with count_forwards(lm) as shapes:
        cache.last_hidden(tokens)
        assert shapes == [], "what was written before training mode is still there"
        cache.last_hidden(grow(tokens))
        assert shapes == [(4, 1)], "what training mode computed was not written"


@pytest.mark.parametrize("family", UNSERVED)
def test_families_that_slots_cannot_serve_get_full_forwards(load_lm, caplog, family):
    lm = load_lm(family)
    with caplog.at_level(logging.WARNING, logger="rlhf_gym.lm.decoding.method"):
        cache = DecodeCache(lm)
        tokens = rows_of(9, 1, 7, 5)
        for _ in range(6):
            assert_full_forward(cache, tokens)
            tokens = grow(tokens)
    warnings = [r for r in caplog.records if r.name == "rlhf_gym.lm.decoding.method"]
    assert len(warnings) == 1, "one logged line"
    assert "full forwards" in warnings[0].message


def test_served_families_are_served(load_lm, caplog):
    for family in SERVED:
        assert supports_slots(load_lm(family), WIDTH), family
        DecodeCache(load_lm(family))
    for family in OWN_CACHE:
        assert decoding_method(load_lm(family), WIDTH) == "own cache", family
    assert not [r for r in caplog.records if r.name == "rlhf_gym.lm.decoding.method"]


@pytest.mark.parametrize("family", ["mistral", "gpt_neo", "gemma3_text"])
def test_a_window_that_no_row_outgrows_costs_nothing(load_lm, family):
    name = "window_size" if family == "gpt_neo" else "sliding_window"
    lm = load_lm(family, **{name: WIDTH})
    assert decoding_method(lm, WIDTH) == "slots"
    assert decoding_method(lm, WIDTH + 1) == "own cache"
    cache = DecodeCache(lm)
    tokens = rows_of(3, 1, WIDTH - 6, 5)
    for _ in range(7):
        assert_full_forward(cache, tokens)
        tokens = grow(tokens, 0, 1, *([2] if int(row_lengths(tokens[2])) < WIDTH else []), 3)


@pytest.mark.parametrize(
    ("family", "options", "window"),
    [
        ("llama", {}, None),
        ("qwen2", {"sliding_window": 4}, None),  # use_sliding_window is False
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, 4),
        ("gemma3_text", {"sliding_window": 12}, 12),  # its sliding_window_pattern is 6
        ("gpt_neo", {"window_size": 7}, 7),
        ("llama", {"layer_types": ["chunked_attention", "full_attention"]}, 0),
        ("llama", {"attention_chunk_size": 9}, 9),
    ],
)
def test_windows_are_read_from_the_config(family, options, window):
    model = AutoModelForCausalLM.from_config(make_config(family, **options))
    assert shortest_window(model) == window
    widest = math.inf if window is None else window
    assert full_attention_width(model) == widest


def test_layers_that_are_no_attention_have_no_full_attention():
    model = AutoModelForCausalLM.from_config(make_config("qwen3_next"))
    assert full_attention_width(model) == 0


@pytest.mark.parametrize("family", OWN_CACHE)
def test_own_cache_advances_all_rows_by_one_step(load_lm, family):
    lm = load_lm(family)
    cache = DecodeCache(lm)
    tokens = rows_of(3, 1, 7, 5)
    assert decoding_method(lm, WIDTH) == "own cache"
    with count_forwards(lm) as shapes:
        cache.last_hidden(tokens)
        assert shapes == [(4, 7)], "one prefill"
        shapes.clear()
        tokens = grow(tokens)
        cache.last_hidden(tokens)
        assert shapes == [(4, 1)], "every row grew: one step"
        shapes.clear()
        cache.last_hidden(tokens)
        assert shapes == [], "unchanged rows: nothing"
        cache.last_hidden(grow(tokens, 0, 1, 3))
        assert shapes == [(4, 8)], "one did not grow: all are prefilled"


@pytest.mark.parametrize("family", OWN_CACHE)
def test_with_an_own_cache_sampling_takes_one_step_per_token(load_lm, family):
    lm = load_lm(family)
    some = prompts_of(lm, 6)
    prompts = some[[0, 0, 1, 2, 0, 1, 3, 4, 5, 5]]
    assert decoding_method(lm, prompts.shape[1] + 12) == "own cache"
    with count_forwards(lm) as shapes:
        sampled = sample_with_log_probs(lm, prompts, 12, stop_at_eos=False)
    assert shapes == [(6, prompts.shape[1]), *[(10, 1)] * 11]
    expected = continuation_log_probs(lm, prompts, sampled.responses)
    torch.testing.assert_close(sampled.log_probs, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_that_gives_other_numbers_is_not_used(load_lm, monkeypatch, caplog):
    lm = load_lm("bloom")
    whole = OwnCacheDecoder._forward

    def slightly_off(self, ids, positions):
        return whole(self, ids, positions) * (1.0 if ids.shape[1] > 1 else 1.0001)

    monkeypatch.setattr(OwnCacheDecoder, "_forward", slightly_off)
    with caplog.at_level(logging.WARNING, logger="rlhf_gym.lm.decoding.method"):
        assert decoding_method(lm, WIDTH) == "full forwards"
    assert "BloomForCausalLM" in caplog.text


@pytest.mark.parametrize("size", [2, 4])
def test_a_tiny_vocabulary_is_served(size):
    """The enumerable task has a handful of tokens; nothing about them needs full forwards."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1")
    options = {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(make_config("llama", **options)).eval()
    lm = CausalLM.wrap(model, tokenizer)
    assert supports_slots(lm, WIDTH)
    cache, tokens = DecodeCache(lm), rows_of(3, 1, 7, 5) % size
    tokens[rows_of(3, 1, 7, 5) == PAD] = PAD
    assert_full_forward(cache, tokens)
    tokens[0, 3] = tokens[2, 7] = 1
    assert_full_forward(cache, tokens)


# Whole responses

# The likeliest tokens of Gemma 3's random weights repeat, and its rows end together.
ENDING = [family for family in OWN_CACHE if family != "gemma3_text"]


def prompts_of(lm: CausalLM, n: int) -> torch.Tensor:
    rng = np.random.default_rng(1)
    rows = [[BOS, *rng.integers(4, V, rng.integers(1, 6)).tolist()] for _ in range(n)]
    return torch.from_numpy(pad_rows(rows))


@torch.no_grad()
def greedy_loop(lm: CausalLM, prompt: list[int], budget: int, stop_at_eos: bool) -> list[int]:
    """The likeliest tokens one after another, by full forwards of one unpadded row."""
    row = list(prompt)
    while len(row) < len(prompt) + budget:
        row.append(int(lm.model(torch.tensor([row])).logits[0, -1, : lm.vocab_size].argmax()))
        if stop_at_eos and row[-1] in lm.eos_ids:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize("stop_at_eos", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", *ENDING])
def test_dropping_finished_rows_changes_no_response(load_lm, monkeypatch, family, stop_at_eos):
    lm = load_lm(family)
    prompts = prompts_of(lm, 24)
    expected = pad_rows(
        [greedy_loop(lm, [i for i in p if i != PAD], 12, stop_at_eos) for p in prompts.tolist()], 12
    )
    for share in (0.0, 0.2, 2.0):  # as soon as a row is done, by default, never
        monkeypatch.setattr(decoding_rows, "DROP_SHARE", share)
        got = sample_responses(lm, prompts, 12, stop_at_eos=stop_at_eos, deterministic=True)
        assert got.tolist() == expected.tolist(), f"DROP_SHARE {share}"
    ends = row_lengths(got)
    if stop_at_eos:
        assert len(set(ends.tolist())) > 3, "the test needs rows that end at different times"
    else:
        assert (ends == 12).all()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("family", [*SERVED, *ENDING])
def test_what_sampling_says_of_its_tokens_is_a_pass_over_whole_sequences(
    load_lm, family, deterministic
):
    lm = load_lm(family, temperature=0.8)
    prompts = prompts_of(lm, 24)
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1)
    torch.manual_seed(0)
    sampled = sample_with_log_probs(lm, prompts, 12, deterministic=deterministic, value_head=head)
    assert len(set(row_lengths(sampled.responses).tolist())) > 3, "rows end at different times"
    expected = continuation_log_probs(lm, prompts, sampled.responses)
    assert (expected < 0).any()
    torch.testing.assert_close(sampled.log_probs, expected, atol=1e-5, rtol=1e-5)
    sequences = continuations(prompts, sampled.responses)
    values = unflatten(head(lm.states(sequences)).flatten(), sequences.lengths, 12)
    torch.testing.assert_close(sampled.values, values, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    alone = sample_responses(lm, prompts, 12, deterministic=deterministic)
    assert torch.equal(alone, sampled.responses)


def test_finished_rows_cost_no_compute(load_lm, monkeypatch):
    monkeypatch.setattr(decoding_rows, "DROP_SHARE", 0.0)
    lm = load_lm("llama")
    prompts = prompts_of(lm, 24)
    assert supports_slots(lm, WIDTH)  # probed once a model
    with count_forwards(lm) as shapes:
        responses = sample_responses(lm, prompts, 12, deterministic=True)
    alive = [int((row_lengths(responses) > t).sum()) for t in range(1, 12)]
    assert shapes[0] == (len(prompts.unique(dim=0)), prompts.shape[1])
    assert shapes[1:] == [(n, 1) for n in alive if n]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_prompt_is_prefilled_once(load_lm, family):
    lm = load_lm(family)
    some = prompts_of(lm, 6)
    prompts = some[[0, 0, 1, 2, 0, 1, 3, 4, 5, 5]]
    rows = [[i for i in p if i != PAD] for p in prompts.tolist()]
    alone = pad_rows([greedy_loop(lm, row, 12, True) for row in rows], 12)
    assert supports_slots(lm, WIDTH)
    with count_forwards(lm) as shapes:
        sampled = sample_with_log_probs(lm, prompts, 12, deterministic=True)
    assert shapes[0] == (6, prompts.shape[1])
    assert sampled.responses.tolist() == alone.tolist()
    expected = continuation_log_probs(lm, prompts, sampled.responses)
    torch.testing.assert_close(sampled.log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sampled_responses_are_whole(load_lm, family):
    lm = load_lm(family, temperature=1.3)
    prompts = prompts_of(lm, 200)
    generator = torch.Generator().manual_seed(0)
    responses = sample_responses(lm, prompts, BUDGET, generator=generator)
    assert responses.shape == (200, BUDGET)
    lengths = row_lengths(responses)
    assert set(lengths.tolist()) == set(range(1, BUDGET + 1))
    for row, n in zip(responses.tolist(), lengths.tolist(), strict=True):
        assert row[n:] == [PAD] * (BUDGET - n)
        assert all(0 <= token < V for token in row[:n])
        assert not set(row[: n - 1]) & set(ENDS), "a response went on after its EOS"
        assert n == BUDGET or row[n - 1] in ENDS
    log_probs = lm.log_probs(continuations(prompts, responses))
    assert torch.isfinite(log_probs).all()
    alone = [log_probs_alone(lm, p, r) for p, r in zip(prompts[:9], responses[:9], strict=True)]
    torch.testing.assert_close(
        log_probs[: int(lengths[:9].sum())], torch.cat(alone), atol=2e-5, rtol=1e-5
    )
    again = sample_responses(lm, prompts, BUDGET, generator=generator.manual_seed(0))
    assert torch.equal(again, responses), "the generator is the only source of chance"


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square is within five standard deviations of its mean; rare cells together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    chi2 = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 5, f"chi² {chi2:.0f}, {freedom} degrees"


@pytest.mark.parametrize("way", ["_inverse_cdf", "_exponential_race"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_from_the_tempered_softmax(load_lm, monkeypatch, temperature, way):
    monkeypatch.setattr(sampling, "_drawn", getattr(sampling, way))  # a CPU's, a GPU's
    lm = load_lm("llama", temperature=temperature)
    n = 20_000
    prompts = torch.tensor([[BOS, 9, 12]]).repeat(n, 1)
    generator = torch.Generator().manual_seed(0)
    responses = sample_responses(lm, prompts, 2, stop_at_eos=False, generator=generator)
    with torch.no_grad():
        logits = lm.model(torch.tensor([[BOS, 9, 12]])).logits[0, -1]
    first = torch.bincount(responses[:, 0], minlength=V).double()
    assert_drawn_from(first, torch.softmax(logits.double() / temperature, -1))
    favourite = int(first.argmax())
    with torch.no_grad():
        logits = lm.model(torch.tensor([[BOS, 9, 12, favourite]])).logits[0, -1]
    then = torch.bincount(responses[responses[:, 0] == favourite, 1], minlength=V).double()
    assert_drawn_from(then, torch.softmax(logits.double() / temperature, -1))


@pytest.mark.parametrize("way", ["_inverse_cdf", "_exponential_race"])
def test_draw_never_takes_what_has_no_probability(monkeypatch, way):
    monkeypatch.setattr(sampling, "_drawn", getattr(sampling, way))  # a CPU's, a GPU's
    logits = torch.full((20_000, 6), -torch.inf)
    logits[:, [1, 4]] = torch.tensor([0.0, 1.0])
    counts = torch.bincount(draw(logits, torch.Generator().manual_seed(0)), minlength=6).double()
    assert counts[[0, 2, 3, 5]].tolist() == [0, 0, 0, 0]
    assert_drawn_from(counts, torch.softmax(logits[0].double(), -1))


def test_in_training_mode_sampling_is_the_same(load_lm):
    lm = load_lm("llama")
    prompts = prompts_of(lm, 8)
    acting = sample_responses(lm, prompts, BUDGET, deterministic=True)
    lm.model.train()
    assert torch.equal(sample_responses(lm, prompts, BUDGET, deterministic=True), acting)


def test_padded_head_ids_are_never_drawn():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", vocab_size=V + 10))
    lm = CausalLM.wrap(model.eval(), make_tokenizer(), temperature=4.0)
    responses = sample_responses(lm, prompts_of(lm, 300), BUDGET, stop_at_eos=False)
    assert int(responses.max()) < V
    assert lm.eos_ids == (EOS,)


def test_last_hidden_of_rows_alone(load_lm):
    lm = load_lm("gpt_neox")
    tokens = rows_of(3, WIDTH, 1)
    with torch.no_grad():
        got = last_hidden(lm, tokens)
    expected = torch.stack([hidden_alone(lm, row.tolist()) for row in tokens])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*SERVED, *OWN_CACHE, *UNSERVED])
def test_states_of_one_response_are_computed_in_one_row(load_lm, family):
    lm = load_lm(family)
    rows = [[2, 5], [2, 5, 6], [2, 5, 6, 7, 8], [2, 9], [2, 5, 6], [2, 9, 4], [2, 5, 7]]
    tokens = torch.from_numpy(pad_rows(rows))
    with count_forwards(lm) as shapes:
        found = last_hidden(lm, tokens)
    assert shapes == [(3, 5)]
    for row, hidden in zip(rows, found, strict=True):
        torch.testing.assert_close(hidden, hidden_alone(lm, row), atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    embedding = lm.model.get_input_embeddings().weight.requires_grad_(True)
    (ours,) = torch.autograd.grad((last_hidden(lm, tokens) * weights).sum(), embedding)
    alone = torch.stack([lm.states(as_one(row))[0] for row in rows])
    (theirs,) = torch.autograd.grad((alone * weights).sum(), embedding)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def as_one(row: list[int]) -> Sequences:
    """A row whose last hidden state is asked for."""
    return Sequences(torch.tensor([[*row, PAD]]), torch.tensor([len(row)]), torch.tensor([1]))


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_rotary_embeddings_that_turn_with_length_are_left_to_full_forwards(kind):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 100.0}
    model = AutoModelForCausalLM.from_config(make_config("llama", rope_parameters=rope))
    assert has_dynamic_rope(model) == (kind == "dynamic")
    assert has_full_attention(model, WIDTH) == (kind == "default")
