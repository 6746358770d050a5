"""One definition of a log-probability: tempered, over the tokens that have a name, row by row."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BOS,
    BUDGET,
    ENDS,
    EOS,
    PROMPTS,
    SERVED,
    V,
    draw_responses,
    log_probs_alone,
    make_config,
    make_tokenizer,
)
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_gym.errors import InputError
from rlhf_gym.lm import batching
from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.causal_lm import CausalLM, continuation_log_probs, kl_to, shared_causal_lm
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.tokens import PAD, continuations, pad_rows


def some_rows(lm: CausalLM, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = pad_rows([lm.tokenizer(text)["input_ids"] for text in PROMPTS[:n]])
    return torch.from_numpy(prompts), torch.from_numpy(draw_responses(n, 8))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4}),
        ("llama", {"attention_dropout": 0.4}),
        ("gpt_neox", {"attention_dropout": 0.4, "hidden_dropout": 0.4}),
        ("opt", {"dropout": 0.4, "attention_dropout": 0.4}),
        ("opt", {"layerdrop": 0.4}),
    ],
)
def test_dropout_is_off_even_in_training_mode(load_lm, family, options):
    lm = load_lm(family, **options)
    assert not lm.model.training
    for name in options:
        assert getattr(lm.model.config, name) == 0, name
    assert all(m.p == 0 for m in lm.model.modules() if isinstance(m, nn.Dropout))
    sequences = continuations(*some_rows(lm))
    acting = lm.log_probs(sequences)
    lm.model.train()
    torch.manual_seed(0)
    for _ in range(3):
        torch.testing.assert_close(lm.log_probs(sequences), acting)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast"])
def test_gpt2s_activation_is_one_operation_and_the_same(save_lm, activation):
    path = save_lm("gpt2", activation_function=activation)
    lm, plain = CausalLM.load(path), AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.arange(40).reshape(4, 10) % V
    inputs = torch.randn(1000, dtype=torch.float64) * 3
    ours = [m.mlp.act for m in lm.model.transformer.h]
    theirs = [m.mlp.act for m in plain.transformer.h]
    for act, written_out in zip(ours, theirs, strict=True):
        assert isinstance(act, nn.GELU)
        assert not isinstance(written_out, nn.GELU)
        torch.testing.assert_close(act(inputs), written_out(inputs), atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(lm.model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    assert lm.model.config.activation_function == activation, "what is saved is the same model"


def test_logits_wider_than_the_tokenizer_are_cut_to_v(load_lm):
    lm = load_lm("llama", vocab_size=V + 10)
    assert lm.vocab_size == V
    prompts, responses = some_rows(lm)
    sequences = continuations(prompts, responses)
    with torch.no_grad():
        logits = lm.logits(lm.states(sequences))
    assert logits.shape == (len(sequences.chosen()), V)
    assert logits.dtype == torch.float32
    alone = [log_probs_alone(lm, p, r) for p, r in zip(prompts, responses, strict=True)]
    torch.testing.assert_close(lm.log_probs(sequences), torch.cat(alone), atol=2e-5, rtol=1e-5)
    everything = continuations(torch.tensor([[BOS, 5]]).repeat(V, 1), torch.arange(V)[:, None])
    assert float(lm.log_probs(everything).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_tokenizer_wider_than_the_logits_is_refused(save_lm):
    path = save_lm("llama", vocab_size=V - 2, eos=(EOS,))
    with pytest.raises(InputError, match=rf"ids up to {V - 1}.*{V - 2} logits"):
        CausalLM.load(path)


def test_eos_ids_come_from_the_generation_config_first(load_lm):
    lm = load_lm("llama", eos=(9, EOS, 7), eos_token_id=11)
    assert lm.eos_ids == (EOS, 7, 9)
    lm.model.generation_config.eos_token_id = 8
    assert CausalLM.wrap(lm.model, lm.tokenizer).eos_ids == (8,)
    lm.model.generation_config.eos_token_id = None
    assert CausalLM.wrap(lm.model, lm.tokenizer).eos_ids == (11,)
    lm.model.config.eos_token_id = None
    assert CausalLM.wrap(lm.model, lm.tokenizer).eos_ids == (EOS,)
    lm.tokenizer.eos_token = None
    with pytest.raises(InputError, match="eos_token_id"):
        CausalLM.wrap(lm.model, lm.tokenizer)


@pytest.mark.parametrize("family", SERVED)
def test_a_row_does_not_depend_on_neighbours_or_padding(load_lm, family):
    lm = load_lm(family, temperature=0.7)
    prompts, responses = some_rows(lm)
    together = continuation_log_probs(lm, prompts, responses)
    assert (together[responses == PAD] == 0).all()
    wide = nn.functional.pad(prompts, (0, 9), value=PAD)
    padded = continuation_log_probs(lm, wide, responses)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = log_probs_alone(lm, prompt, response)
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(padded[i, : len(alone)], alone, atol=2e-5, rtol=1e-5)
    other = torch.tensor([4, 0, 2, 3, 1])
    torch.testing.assert_close(
        continuation_log_probs(lm, prompts[other], responses[other]),
        together[other],
        atol=2e-5,
        rtol=1e-5,
    )


def test_pad_that_is_eos_is_a_token_like_any_other(load_lm):
    lm = load_lm("llama", pad_is_eos=True)
    assert lm.tokenizer.pad_token_id == EOS
    assert EOS in lm.eos_ids
    prompts, _ = some_rows(lm)
    responses = torch.from_numpy(pad_rows([[5, 6, EOS]] * 5, BUDGET))
    got = continuation_log_probs(lm, prompts, responses)
    for i, prompt in enumerate(prompts):
        alone = log_probs_alone(lm, prompt, [5, 6, EOS])
        torch.testing.assert_close(got[i, :3], alone, atol=2e-5, rtol=1e-5)


def test_the_temperature_divides_the_logits(load_lm):
    cold, warm = load_lm("llama"), load_lm("llama", temperature=2.5)
    sequences = continuations(*some_rows(cold))
    with torch.no_grad():
        hidden = cold.states(sequences)
        torch.testing.assert_close(warm.logits(hidden), cold.logits(hidden) / 2.5)
        tempered = torch.log_softmax(cold.logits(hidden) / 2.5, -1)
    expected = tempered.gather(-1, sequences.chosen()[:, None])[:, 0]
    torch.testing.assert_close(warm.log_probs(sequences), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(load_lm, temperature):
    with pytest.raises(InputError, match="temperature"):
        load_lm("llama", temperature=temperature)


def test_passes_of_any_size_change_nothing(load_lm, monkeypatch):
    lm = load_lm("gpt2")
    sequences = continuations(*some_rows(lm))
    whole = lm.log_probs(sequences)
    assert [len(part.tokens) for part, _ in passes(lm.model, sequences, 1)] == [1] * 5
    monkeypatch.setattr(batching, "MAX_LOGITS", 3 * V)
    torch.testing.assert_close(lm.log_probs(sequences), whole, atol=1e-6, rtol=1e-6)
    with_gradient = lm.log_probs_of(lm.states(sequences), sequences.chosen())
    torch.testing.assert_close(with_gradient.detach(), whole, atol=1e-6, rtol=1e-6)
    assert with_gradient.requires_grad


def test_exact_kl_is_the_mean_of_k1(load_lm):
    p, q = load_lm("llama"), load_lm("llama", seed=3)
    state = torch.tensor([[BOS, 5, 6, PAD, PAD]]).repeat(V, 1)
    sequences = continuations(state, torch.arange(V)[:, None])
    log_p, log_q = p.log_probs(sequences), q.log_probs(sequences)
    expected = float((log_p.exp() * (log_p - log_q)).sum())
    with torch.no_grad():
        one = sequences.rows(slice(0, 1))
        got = kl_to(p.states(one), p, q.states(one), q)
        assert kl_to(p.states(one), p, p.states(one), p).tolist() == [0.0]
    assert expected > 0.1
    assert float(got) == pytest.approx(expected, abs=1e-5)


def test_shared_copies_are_one_and_frozen(save_lm):
    path = save_lm("llama")
    one = shared_causal_lm(path, None, 1.0, "cpu")
    two = shared_causal_lm(path, None, 0.5, "cpu")
    assert one.model is two.model
    assert (one.temperature, two.temperature) == (1.0, 0.5)
    assert not any(p.requires_grad for p in one.model.parameters())
    assert not one.model.training
    own = CausalLM.load(path)
    assert own.model is not one.model
    assert all(p.requires_grad for p in own.model.parameters())


def test_a_shared_copy_follows_the_files(save_lm, tmp_path):
    lm = CausalLM.load(save_lm("llama"))
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    before = shared_causal_lm(str(tmp_path), None, 1.0, "cpu")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.add_(1.0)
    lm.model.save_pretrained(tmp_path)
    after = shared_causal_lm(str(tmp_path), None, 1.0, "cpu")
    difference = (
        after.model.get_input_embeddings().weight - before.model.get_input_embeddings().weight
    )
    torch.testing.assert_close(difference, torch.ones_like(difference))


def test_missing_models_are_named(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere"):
        CausalLM.load(missing)
    with pytest.raises(InputError, match="nowhere"):
        load_tokenizer(missing)


def test_a_folder_without_weights_is_named(save_lm, tmp_path):
    config = json.loads((Path(save_lm("llama")) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=str(tmp_path)):
        CausalLM.load(str(tmp_path))


def test_a_head_that_is_not_the_last_word_is_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama")).eval()
    whole = model.forward

    def shifted(*arguments, **options):
        out = whole(*arguments, **options)
        out.logits = out.logits + 0.01 * out.logits**2
        return out

    model.forward = shifted
    with pytest.raises(InputError, match="after its head"):
        CausalLM.wrap(model, make_tokenizer())


RULES = [
    ("cohere", {"logit_scale": 0.1}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("gemma3_text", {"final_logit_softcapping": 2.0}),
    ("granite", {"logits_scaling": 4.0}),
    ("granitemoe", {"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ("falcon_h1", {"lm_head_multiplier": 0.3}),
]


@pytest.mark.parametrize(("family", "options"), RULES)
def test_logits_that_a_family_scales_or_caps(save_lm, tmp_path, family, options):
    lm = CausalLM.load(save_lm(family, **options), temperature=0.7)
    prompts, responses = some_rows(lm)
    sequences = continuations(prompts, responses)
    expected = [log_probs_alone(lm, p, r) for p, r in zip(prompts, responses, strict=True)]
    found = lm.log_probs(sequences)
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
    lm.save_pretrained(tmp_path)
    again = CausalLM.load(str(tmp_path), temperature=0.7)
    torch.testing.assert_close(again.log_probs(sequences), found)


def test_a_model_that_hides_its_states_is_refused():
    """Llama 4 names no trunk apart from its head."""
    options = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(make_config("llama4_text", **options)).eval()
    with pytest.raises(InputError, match="hidden states"):
        CausalLM.wrap(model, make_tokenizer())


def test_texts_leave_special_tokens_out(load_lm):
    lm = load_lm("llama")
    assert lm.texts([[BOS, 4, 5, EOS], [6]]) == ["a b", "c"]
    assert set(ENDS) == set(lm.eos_ids)
    assert np.array_equal(lm.tokenizer("a b")["input_ids"], [BOS, 4, 5])


@pytest.mark.parametrize("clean_up", [False, True])
def test_texts_are_the_tokenizers_own(load_lm, clean_up):
    lm = load_lm("llama")
    lm.tokenizer.clean_up_tokenization_spaces = clean_up
    rows = [[BOS, 4, 5, EOS], [9], [], [6, 1, 7]]
    assert lm.texts(rows) == lm.tokenizer.batch_decode(rows, skip_special_tokens=True)


def test_what_is_saved_has_no_sampling_rules_of_the_models_own(load_lm, tmp_path):
    lm = load_lm("llama")
    lm.model.generation_config.repetition_penalty = 1.3
    lm.model.generation_config.no_repeat_ngram_size = 2
    lm.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert "no_repeat_ngram_size" not in saved
    assert saved.get("repetition_penalty", 1.0) == 1.0
    assert lm.model.generation_config.repetition_penalty == 1.3
    assert CausalLM.load(str(tmp_path)).eos_ids == lm.eos_ids


def test_a_classifier_is_no_language_model(save_reward_model):
    with pytest.raises(InputError, match=r"lacks weights .* lm_head"):
        CausalLM.load(save_reward_model())
