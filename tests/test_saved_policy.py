"""A saved policy is the one that acted: `generate` draws from the environment's distribution."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, BUDGET, V
from transformers import AutoModelForCausalLM, GenerationConfig

from agents import ppo, ppo_single_file, sb3_a2c, sb3_dqn
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.masks import make_mask
from rlhf_gym.tasks.text import text_env, text_vector_env
from rlhf_gym.tokens import Sequences
from rlhf_gym.training.sft import save

WIDE = V + 10
"""Rows of the embedding: ten more than the tokenizer has tokens."""

OWN_RULES: dict[str, Any] = {
    "do_sample": True,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.4,
    "temperature": 3.0,
    "repetition_penalty": 1.9,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[8]],
    "forced_eos_token_id": 3,
    "min_new_tokens": 4,
    "max_length": 7,
}
"""What a stranger's generation_config.json may hold; no training uses any of it."""


def wide_lm(load_lm: Any, **mask: Any) -> CausalLM:
    lm = load_lm("llama", vocab_size=WIDE, temperature=0.7)
    rule = make_mask(lm.tokenizer, lm.vocab_size, lm.eos_ids, max_new_tokens=BUDGET, **mask)
    for name, value in OWN_RULES.items():
        setattr(lm.model.generation_config, name, value)
    return replace(lm, mask=rule)


@torch.no_grad()
def check_generated(lm: CausalLM, folder: Path, stop_at_eos: bool = True) -> None:
    """Compare the distributions that `generate` of a saved folder draws from with a model's."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.tensor([[BOS, 4 + i] for i in range(24)])
    torch.manual_seed(0)
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=BUDGET,
        output_scores=True,
        return_dict_in_generate=True,
    )
    replies = out.sequences[:, 2:]
    assert int(replies.max()) < lm.vocab_size
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for t, scores in enumerate(out.scores):
        if stop_at_eos and t:
            ended |= torch.isin(replies[:, t - 1], torch.tensor(lm.eos_ids))
        state = Sequences(
            out.sequences[:, : t + 3], torch.full((24,), t + 2), torch.ones(24, dtype=torch.int64)
        )
        hidden = lm.states(state)
        taken = torch.full((24,), t)
        limits = (lm.guide or lm).next_limits(hidden, taken)
        expected = torch.softmax(lm.logits(hidden, limits), -1)
        found = torch.softmax(scores.float(), -1)
        assert (found[:, lm.vocab_size :] == 0).all()
        torch.testing.assert_close(
            found[~ended, : lm.vocab_size], expected[~ended], atol=1e-5, rtol=1e-4
        )
    assert len(out.scores) > 2
    assert torch.isin(replies, torch.tensor(lm.eos_ids)).any()


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"decodable_only": True, "min_new_tokens": 2},
        {"min_new_tokens": BUDGET - 1},
        {"top_k": 4},
        {"top_p": 0.6},
        {"top_k": 6, "top_p": 0.6, "min_new_tokens": 1},
    ],
)
def test_generate_draws_from_what_the_environment_allows(load_lm, tmp_path, mask):
    lm = wide_lm(load_lm, **mask)
    lm.save_pretrained(tmp_path)
    check_generated(lm, tmp_path)
    assert lm.model.generation_config.top_k == 2  # the model in memory is left as it was


def test_a_policy_whose_mask_follows_another_model_says_so(load_lm, tmp_path, caplog):
    policy = wide_lm(load_lm, top_k=4, min_new_tokens=2).trainable()
    with caplog.at_level(logging.WARNING):
        policy.save_pretrained(tmp_path)
    assert "top_k and top_p follow its reference" in caplog.text.replace("\n", " ")
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.top_k, config.top_p, config.min_new_tokens) == (0, 1.0, 2)


def test_generate_does_not_stop_where_the_environment_does_not(save_lm, prompt_file, tmp_path):
    options = {"prompts": prompt_file, "reward_model": "conftest:text_reward", "split": "all"}
    env = text_env(reference=save_lm(), max_prompt_tokens=8, stop_at_eos=False, **options)
    reference = env.objective.reference
    policy = reference.trainable()
    before = policy.model.config.eos_token_id
    policy.save_pretrained(tmp_path)
    check_generated(policy, tmp_path, stop_at_eos=False)
    assert policy.model.config.eos_token_id == before
    assert CausalLM.load(str(tmp_path)).eos_ids == reference.eos_ids


def test_a_fine_tuned_policy_has_no_rules_of_its_own(load_lm, tmp_path):
    lm = replace(wide_lm(load_lm), temperature=1.0)
    save(lm, tmp_path / "policy")
    check_generated(lm, tmp_path / "policy")


@pytest.mark.parametrize("algorithm", [ppo, sb3_a2c, ppo_single_file, sb3_dqn])
def test_every_agent_saves_the_policy_that_acts(load_lm, save_lm, prompt_file, tmp_path, algorithm):
    path = tmp_path / "reference"
    wide_lm(load_lm).save_pretrained(path)
    config = GenerationConfig(**OWN_RULES, eos_token_id=[3, 20, 21])
    config.save_pretrained(path)
    env = text_vector_env(
        reference=str(path),
        reward_model="conftest:text_reward",
        prompts=prompt_file,
        split="all",
        max_prompt_tokens=8,
        max_new_tokens=BUDGET,
        num_envs=4,
        temperature=0.8,
        stop_at_eos=False,
    )
    env.reset(seed=0)
    learner = algorithm.make(algorithm.Config(), env)
    learner.save(tmp_path / "policy")
    saved = GenerationConfig.from_pretrained(tmp_path / "policy")
    assert saved.suppress_tokens == list(range(V, WIDE))
    assert saved.eos_token_id is None
    acting = CausalLM.load(str(tmp_path / "policy")).following(env.objective.reference)
    assert acting.eos_ids == (3, 20, 21)
    check_generated(acting, tmp_path / "policy", stop_at_eos=False)
