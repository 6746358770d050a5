"""The doctor finds faults of data and models that strangers bring, each planted here."""

from dataclasses import replace

import pytest
import torch
from test_doctor import healthy

from agents.doctor import Subject, examine_data
from agents.doctor.data_checks import GAP
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.rewards.reward_model import RewardModel


@pytest.fixture
def subject():
    """A healthy subject whose models and tokenizers may be changed: they are given back after."""
    env, policy = healthy()
    reference, reward = env.objective.reference, env.objective.reward
    assert isinstance(reward, RewardModel)
    tokenizers = [reference.tokenizer, reward.tokenizer]
    before = [(t.chat_template, t.eos_token, t.unk_token) for t in tokenizers]
    forms = reward.prompt_forms
    yield Subject(env, policy, rows=64)
    for tokenizer, kept in zip(tokenizers, before, strict=True):
        tokenizer.chat_template, tokenizer.eos_token, tokenizer.unk_token = kept
    reward.prompt_forms = forms
    reward.eval()


def problems(subject: Subject) -> dict[str, str]:
    return {problem.check: problem.what for problem in examine_data(subject)}


def test_a_healthy_subject_has_no_problem(subject):
    assert problems(subject) == {}


def test_weights(subject):
    reward = subject.objective.reward
    with torch.no_grad():
        kept = reward.head.weight[0, 0].clone()
        reward.head.weight[0, 0] = torch.nan
        try:
            assert "score.weight of the reward model" in problems(subject)["weights"]
        finally:
            reward.head.weight[0, 0] = kept
        weight = next(subject.policy.core.model.parameters())
        weight[0, 0] = torch.inf
    assert "of the policy has a NaN" in problems(subject)["weights"]
    weight.data[0, 0] = 0.0
    reward.train()
    assert "training mode" in problems(subject)["weights"]


def test_form(subject):
    reference, reward = subject.objective.reference, subject.objective.reward
    reference.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert "8 of 8 prompts are plain text" in problems(subject)["form"]
    reference.tokenizer.chat_template = None
    reward.prompt_forms = {"chats"}
    assert "learned from chats, but the prompts are texts" in problems(subject)["form"]
    reward.prompt_forms = {"chats", "texts"}
    assert problems(subject) == {}
    reference.tokenizer.unk_token = reference.tokenizer.convert_ids_to_tokens(5)
    unknown = 5
    half = tuple((*ids[:1], unknown) for ids in subject.env.prompts.ids)
    subject.env.prompts = replace(subject.env.prompts, ids=half)
    assert "does not know 56% of the prompts' tokens" in problems(subject)["form"]


def test_the_prompts_that_are_dropped(subject):
    subject.env.prompts = replace(subject.env.prompts, dropped=9)
    assert "9 of 17 prompts are dropped" in problems(subject)["prompts"]


def test_ends_of_tokenizer_and_template(subject):
    tokenizer = subject.objective.reference.tokenizer
    eos = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(6)
    assert "generation stops at" in problems(subject)["endings"]
    tokenizer.eos_token = eos
    word = tokenizer.convert_ids_to_tokens(5)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} " + word + " {% endfor %}"
    chat = [{"role": "user", "content": word}]
    subject.env.prompts = replace(
        subject.env.prompts, chats=dict.fromkeys(subject.env.prompts.ids, chat)
    )
    assert "a policy that ends its turn would go on" in problems(subject)["endings"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} " + eos + "{% endfor %}"
    assert "endings" not in problems(subject)


def test_a_model_that_cannot_end(subject, monkeypatch):
    plain = CausalLM._unmasked_logits

    def endless(self, hidden):
        logits = plain(self, hidden)
        logits[..., list(self.eos_ids)] -= 100
        return logits

    monkeypatch.setattr(CausalLM, "_unmasked_logits", endless)
    assert "would run into the budget" in problems(subject)["endings"]


@pytest.mark.parametrize("paid", [0.9 * GAP, 1.1 * GAP, -3.0])
def test_a_reward_model_that_pays_for_having_no_end(subject, monkeypatch, paid):
    reward = subject.objective.reward
    (end,) = reward.closing(chat=False)
    noise = torch.Generator().manual_seed(0)

    def scores(self, tokens):
        last = tokens.gather(1, (tokens >= 0).sum(1, keepdim=True) - 1)
        spread = torch.randn(len(tokens), 1, generator=noise.manual_seed(0))
        return spread / spread.std() + paid * (last != end)

    monkeypatch.setattr(RewardModel, "member_scores", scores)
    expected = {"endings"} if paid > GAP else set()
    assert problems(subject).keys() == expected
