"""Attention on a CPU: the ways round scaled_dot_product_attention, and where they are not taken."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import SERVED
from torch import nn
from torch.nn import functional as F
from transformers import FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_gym.lm import attention
from rlhf_gym.lm.architecture import recompute_activations
from rlhf_gym.lm.attention import float32_attention, for_bfloat16, step_attention, without_cudnn
from rlhf_gym.lm.decoding import kv_slots as slots
from rlhf_gym.lm.decoding.method import supports_slots
from rlhf_gym.lm.decoding.sampling import sample_with_log_probs

PROMPTS = torch.tensor([[2, 5, 6], [2, 9, 11], [2, 7, 4]])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", SERVED)
def test_a_decoding_step_attends_by_matrix_products(load_lm, monkeypatch, family, precision):
    """On a CPU, where scaled_dot_product_attention is slow for one query."""
    lm = replace(load_lm(family), precision=precision)
    assert supports_slots(lm, 64)
    short, left = [], []
    product = torch.baddbmm

    def counted(*arguments, **options):
        short.append(1)
        return product(*arguments, **options)

    def watched(module, query, *rest, **options):
        if query.shape[2] == 1:
            left.append(query.shape)
        return sdpa_attention_forward(module, query, *rest, **options)

    monkeypatch.setattr(torch, "baddbmm", counted)
    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", watched)
    fast = sample_with_log_probs(lm, PROMPTS, 12, deterministic=True)
    layers = lm.model.config.num_hidden_layers
    assert len(short) == layers * 11 and not left, "every step took the short way"
    monkeypatch.setattr(slots, "for_a_step", lambda _: nullcontext())
    slow = sample_with_log_probs(lm, PROMPTS, 12, deterministic=True)
    assert len(short) == layers * 11
    # In bfloat16 rounding may turn a choice between two tokens that are as likely.
    same = (fast.responses == slow.responses).cumprod(1).bool()
    assert same.all() or (precision == "bf16" and same[:, 0].all())
    tolerance = 1e-5 if precision == "fp32" else 5e-2
    torch.testing.assert_close(
        fast.log_probs[same], slow.log_probs[same], atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("odd", ["softcap", "dropout", "queries", "mask", "gradient"])
def test_what_is_not_plain_attention_is_left_to_sdpa(monkeypatch, odd):
    asked = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **o: asked.append(o))
    query = torch.zeros(2, 4, 2 if odd == "queries" else 1, 8)
    keys = torch.zeros(2, 2, 5, 8)
    mask = torch.zeros(2, 4 if odd == "mask" else 1, 1, 5)  # a mask for each head, as ALiBi's
    options = {"softcap": 3.0} if odd == "softcap" else {"softcap": None}
    dropout = 0.1 if odd == "dropout" else 0.0
    with torch.set_grad_enabled(odd == "gradient"):
        step_attention(nn.Identity(), query, keys, keys, mask, dropout, **options)
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "shared"])
def test_a_step_gives_the_numbers_of_sdpa(kind):
    torch.manual_seed(0)
    query, (keys, values) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 2, 5, 8)
    seen = torch.tensor([[True] * 5, [False, False, True, True, False]])[:, None, None]
    masks = {
        "none": None,
        "boolean": seen,
        "additive": attention.additive_mask(~seen, torch.float32),
        "shared": seen[1:],
    }
    layer = nn.Identity()
    layer.num_key_value_groups, layer.is_causal = 2, True
    for scaling in (None, 0.7):
        arguments = (layer, query, keys, values, masks[kind], 0.0, scaling)
        with torch.no_grad():
            found = step_attention(*arguments, sliding_window=4)[0]
            expected = sdpa_attention_forward(*arguments)[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", SERVED)
def test_in_bfloat16_sequences_attend_in_float32(load_lm, monkeypatch, family):
    """Even within autocast, forward and backward: its gradient in bfloat16 is slow on a CPU."""
    lm = replace(load_lm(family).trainable(), precision="bf16")
    plain = replace(lm, precision="fp32").hidden_states(PROMPTS, use_cache=False).detach()
    met, product = [], F.scaled_dot_product_attention

    def watched(query, *rest, **options):
        met.append(query.dtype)
        return product(query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    hidden = lm.hidden_states(PROMPTS, use_cache=False)
    assert met == [torch.float32] * lm.model.config.num_hidden_layers
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    hidden.square().sum().backward()
    learnt = [p for n, p in lm.model.named_parameters() if "attn" in n or "attention" in n]
    assert learnt and all(p.grad is not None and p.grad.abs().max() > 0 for p in learnt)
    assert 0 < float((hidden.detach() - plain).abs().max() / plain.abs().max()) < 3e-2


def test_what_is_computed_again_in_the_backward_pass_attends_as_it_did(load_lm, monkeypatch):
    """Gradient checkpointing recomputes outside the forward pass: both attend by "sdpa"."""
    lm = replace(load_lm("gpt2").trainable(), precision="bf16")
    lm.model.train()
    recompute_activations(lm.model, True)
    monkeypatch.setattr(attention, "float32_attention", None)  # called by nobody
    lm.hidden_states(PROMPTS, use_cache=False).square().sum().backward()
    assert lm.model.transformer.h[0].attn.c_attn.weight.grad.abs().max() > 0


def test_attention_in_float32_is_sdpa_but_for_the_result():
    """The result, and the gradient, are rounded once and at the end."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5).masked_fill_(torch.rand(2, 1, 5, 5) < 0.3, -1e4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        seen, weights = float32_attention(nn.Identity(), query, key, value, mask)
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    expected, _ = sdpa_attention_forward(nn.Identity(), *wide, mask.float())
    assert weights is None and seen.dtype == torch.bfloat16
    assert torch.equal(seen, expected.bfloat16())
    seen.float().sum().backward()
    expected.sum().backward()
    for half, full in zip((query, key, value), wide, strict=True):
        assert torch.equal(half.grad, full.grad.bfloat16())


@torch.no_grad()
def test_in_bfloat16_padding_is_not_seen(load_lm):
    """A mask of two dimensions is one for "sdpa" whichever function attends."""
    lm = replace(load_lm("llama"), precision="bf16")
    alone = lm.hidden_states(PROMPTS[:1], use_cache=False)
    padded = torch.tensor([[2, 5, 6, 0]])
    right = lm.hidden_states(padded, use_cache=False, attention_mask=torch.tensor([[1, 1, 1, 0]]))
    torch.testing.assert_close(right[:, :3], alone, atol=1e-2, rtol=1e-2)
    left = lm.hidden_states(
        padded.roll(1),
        use_cache=False,
        attention_mask=torch.tensor([[0, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 1, 2]]),
    )
    torch.testing.assert_close(left[:, 1:], alone, atol=1e-2, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("alibi", [True, False])
def test_a_model_that_looks_at_the_name_of_its_attention_attends_as_before(alibi):
    """Falcon masks otherwise where the name is not "sdpa"."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FalconConfig(vocab_size=32, alibi=alibi, **options)
    model = FalconForCausalLM(config).eval()
    ids, later = torch.tensor([[2, 5, 6, 9]]), torch.tensor([[2, 5, 6, 4]])
    plain = model(ids).logits
    with for_bfloat16(model):
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(later).logits[:, :3], plain[:, :3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_is_left_out_for_a_while_alone(before):
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(KeyError), without_cudnn():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(kept)
