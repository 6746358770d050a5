"""Families of models as a user brings them: each trains, is saved, and says the same afterwards.

Tiny, with random weights, and made in memory; two layers, of both kinds where a family has two.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    BOS,
    BUDGET,
    ENDS,
    EOS,
    PLAIN,
    V,
    make_config,
    make_tokenizer,
    prompt_dataset,
    text_reward,
)
from test_reward_training import make_comparisons
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.sb3 import PPO, build
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM, continuation_log_probs
from rlhf_gym.lm.decoding.method import decoding_method
from rlhf_gym.lm.decoding.sampling import sample_with_log_probs
from rlhf_gym.lm.masks import make_mask
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD, pad_rows
from rlhf_gym.training.reward_training import RewardTraining, train_reward_model
from rlhf_gym.training.sft import response_nll, train_sft
from rlhf_gym.training.sft_data import SFTData, SFTExample

pytestmark = pytest.mark.slow

FAMILIES = {
    "qwen3": "slots",
    "qwen2": "slots",
    "llama": "slots",
    "gemma2": "own cache",
    "gemma3_text": "own cache",
    "mistral": "own cache",
    "mixtral": "slots",
    "gpt2": "slots",
    "gpt_neox": "slots",
    "phi": "slots",
    "phi3": "slots",
    "mamba": "own cache",
    "mamba2": "own cache",
    "qwen3_moe": "slots",
    "smollm3": "slots",
    "opt": "slots",
    "bloom": "own cache",
    "olmo2": "slots",
    "olmo3": "own cache",
    "qwen3_next": "own cache",
    "falcon": "own cache",
    "cohere": "slots",
    "granite": "slots",
}
"""Each family with the method that decodes rows longer than its window."""

GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}
OPTIONS = {
    "llama": {
        **GROUPED,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {**GROUPED, **EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    "phi3": GROUPED,
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "olmo2": GROUPED,
    "olmo3": {
        **GROUPED,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


NO_CLASSIFIER = ("granite", "cohere", "mamba", "mamba2")
"""Families of which transformers has no sequence classifier."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(family, tmp_path_factory) -> str:
    """A saved model whose weights are small, as those of its makers."""
    torch.manual_seed(0)
    options = {"initializer_range": 0.05, **OPTIONS.get(family, {})}
    model = AutoModelForCausalLM.from_config(make_config(family, **options))
    model.generation_config.eos_token_id = list(ENDS)
    folder = tmp_path_factory.mktemp(family)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(n: int = 12) -> torch.Tensor:
    rng = np.random.default_rng(1)
    rows = [[BOS, *rng.integers(4, V, rng.integers(1, 6)).tolist()] for _ in range(n)]
    return torch.from_numpy(pad_rows(rows))


def test_sampling_says_what_a_whole_pass_says(family, path):
    lm = CausalLM.load(path, temperature=0.8)
    assert decoding_method(lm, 40) == FAMILIES[family]
    sampled = sample_with_log_probs(lm, prompts(), 20)
    expected = continuation_log_probs(lm, prompts(), sampled.responses)
    torch.testing.assert_close(sampled.log_probs, expected, atol=1e-5, rtol=1e-5)


def test_supervised_fine_tuning(path, tmp_path):
    lm = CausalLM.load(path)
    before = parameters_to_vector(lm.model.parameters()).detach().clone()
    rng = np.random.default_rng(2)
    rows = [rng.integers(4, 20, (2, 6)).tolist() for _ in range(8)]
    examples = [SFTExample((BOS, *prompt), (*response, EOS)) for prompt, response in rows]
    data = SFTData(examples[:6], examples[6:], 16, EOS, 0, 0)
    # The first update of the two warms up: its learning rate is 0.
    figures = train_sft(lm, data, tmp_path, epochs=2, learning_rate=1e-3, progress=False)
    assert math.isfinite(figures["held_out_loss_after"]["value"])
    changed = parameters_to_vector(lm.model.parameters()) != before
    assert changed.any()
    after = CausalLM.load(str(tmp_path / "policy"))
    assert response_nll(after, examples) == pytest.approx(response_nll(lm, examples), abs=1e-5)


def test_a_reward_model_on_this_backbone(family, path, tmp_path):
    if family in NO_CLASSIFIER:
        with pytest.raises(InputError, match="no sequence classifier"):
            RewardModel.from_backbone(path)
        return
    torch.manual_seed(0)
    model = RewardModel.from_backbone(path)
    comparisons = make_comparisons(8)
    options = RewardTraining(batch_size=4, epochs=1)
    train_reward_model(model, comparisons, options, checkpoint_dir=tmp_path, progress=False)
    rows = torch.from_numpy(pad_rows([[*c.prompt, *c.candidates[0]] for c in comparisons]))
    scores = model.scores(rows)
    alone = torch.cat([model.scores(row[row != PAD][None]) for row in rows])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = RewardModel.load(str(tmp_path / "saved"))
    torch.testing.assert_close(again.scores(rows), scores, atol=1e-6, rtol=1e-6)


def test_two_updates_of_the_flagship_and_what_is_saved(path, tmp_path):
    reference = CausalLM.load(path, temperature=0.8)
    reference.model.requires_grad_(False)
    rule = {"max_new_tokens": BUDGET}
    mask = make_mask(reference.tokenizer, reference.vocab_size, reference.eos_ids, **rule)
    objective = Objective(replace(reference, mask=mask), text_reward, kl_coef=0.1)
    env = TokenVectorEnv(objective, prompt_dataset(reference), num_envs=8, max_new_tokens=BUDGET)
    learner = build(PPO, env, **PLAIN, device="cpu", seed=0, n_minibatches=2, learning_rate=1e-3)
    before = parameters_to_vector(learner.policy.lm.parameters()).detach().clone()
    learner.learn(2 * env.num_envs * BUDGET)
    after = parameters_to_vector(learner.policy.lm.parameters())
    assert torch.isfinite(after).all()
    changed = after != before
    assert changed.any()
    policy = learner.policy.core
    policy.save_pretrained(tmp_path)

    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(["a b c"], return_tensors="pt").input_ids
    torch.manual_seed(0)
    text = model.generate(ids, max_new_tokens=12, attention_mask=torch.ones_like(ids))
    response = text[0, ids.shape[1] :]
    assert 1 <= len(response) <= 12
    with torch.no_grad():
        logits = model(text).logits[0, ids.shape[1] - 1 : -1, :V] / 0.8
    expected = torch.log_softmax(logits, -1)[range(len(response)), response]
    found = continuation_log_probs(policy, ids, response[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
