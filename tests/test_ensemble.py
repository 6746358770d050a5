"""Several reward models or heads as one reward, other tokenizers, classifiers with more labels."""

import json

import numpy as np
import pytest
import torch
from conftest import BUDGET, ENDS, EOS, MAX_PROMPT, draw_responses
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.preferences.collect import collect_comparisons
from rlhf_gym.rewards.ensemble import RewardEnsemble, pool
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tasks.text import text_vector_env
from rlhf_gym.tokens import PAD, pad_rows
from rlhf_gym.training.reward_training import RewardTraining, train_reward_model

ROWS = torch.from_numpy(pad_rows([[2, 5, 6, EOS], [2, 7, 8, 9, 10, EOS], [2, 11], [2, 12, EOS]]))


def two_heads(save_lm, seed: int = 0) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel.from_backbone(save_lm(), heads=2)


def test_pooling_is_the_published_one():
    scores = torch.tensor([[1.0, 3.0], [-2.0, 0.0]])
    assert pool(scores, "mean").tolist() == [2.0, -1.0]
    assert pool(scores, "min").tolist() == [1.0, -2.0]
    assert pool(scores, "uncertainty", 0.5).tolist() == [1.5, -1.5]  # variance 1


def test_heads_are_saved_loaded_and_normalised_one_by_one(save_lm, tmp_path):
    model = two_heads(save_lm)
    logits = model(ROWS).detach()
    assert logits.shape == (4, 2)
    assert float((logits[:, 0] - logits[:, 1]).abs().max()) > 1e-2
    model.normalise(ROWS)
    scores = model.member_scores(ROWS)
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ROWS).detach(), logits, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.load(str(tmp_path))
    assert loaded.heads == 2
    torch.testing.assert_close(loaded.member_scores(ROWS), scores, atol=1e-5, rtol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = plain(input_ids=ROWS[:1, :4]).logits[0]
    expected = logits + torch.tensor(plain.config.reward_bias)
    torch.testing.assert_close(expected, scores[0], atol=1e-5, rtol=1e-5)


def test_heads_learn_together_and_stay_different(save_lm, tmp_path):
    from test_reward_training import make_comparisons

    model, comparisons = two_heads(save_lm), make_comparisons(64)
    options = RewardTraining(epochs=6.0, batch_size=8, learning_rate=3e-3)
    train_reward_model(model, comparisons, options, checkpoint_dir=tmp_path)
    rows = torch.from_numpy(pad_rows([row for c in comparisons for row in c.rows]))
    logits = model(rows).detach()
    sizes = [len(c.candidates) for c in comparisons]
    for head in logits.unbind(1):
        hits = [
            int(part.argmax()) == c.comparison.best
            for part, c in zip(head.split(sizes), comparisons, strict=True)
        ]
        assert np.mean(hits) > 0.7
    assert float((logits[:, 0] - logits[:, 1]).abs().mean()) > 1e-2


def make(save_lm, prompt_file, reward_model, **keywords):
    return text_vector_env(
        num_envs=3,
        reference=save_lm(),
        reward_model=reward_model,
        prompts=prompt_file,
        max_prompt_tokens=MAX_PROMPT,
        max_new_tokens=BUDGET,
        split="all",
        **keywords,
    )


@pytest.mark.parametrize("pooling", ["mean", "min", "uncertainty"])
def test_an_environment_pays_the_pooled_score_and_tells_the_disagreement(
    save_lm, save_reward_model, prompt_file, pooling
):
    paths = [save_reward_model(seed=7), save_reward_model(seed=8)]
    env = make(save_lm, prompt_file, paths, pooling=pooling, uncertainty_weight=0.3)
    observations, _ = env.reset(seed=0)
    actions = draw_responses(3)
    _, infos, _ = env.play(actions)
    # Whichever EOS ended a response, the reward models read their own.
    rows = [
        [*o[o != PAD].tolist(), *(EOS if t in ENDS else t for t in a[a != PAD].tolist())]
        for o, a in zip(observations, actions, strict=True)
    ]
    tokens = torch.from_numpy(pad_rows(rows))
    scores = torch.stack([RewardModel.load(path).scores(tokens) for path in paths], 1)
    expected = pool(scores, pooling, 0.3)
    np.testing.assert_allclose(infos["score"], expected, atol=1e-5)
    np.testing.assert_allclose(infos["score_std"], scores.std(1, correction=0), atol=1e-5)
    assert infos["score_std"].min() > 1e-3
    _, first = env.reset()
    assert "score_std" in first, "every info has the same keys"
    assert not first["_score_std"].any()


def test_one_model_with_heads_is_an_ensemble(save_lm, prompt_file, tmp_path):
    two_heads(save_lm).save_pretrained(tmp_path)
    env = make(save_lm, prompt_file, str(tmp_path), pooling="min")
    env.reset(seed=0)
    _, infos, _ = env.play(draw_responses(3))
    assert env.objective.members == 2
    reward = env.objective.reward
    assert isinstance(reward, RewardEnsemble)
    assert reward.pooling == "min"
    assert infos["score_std"].min() > 0


def test_members_must_share_a_tokenizer(save_reward_model, save_lm, tmp_path):
    one, other = RewardModel.load(save_reward_model()), RewardModel.load(save_reward_model())
    other.tokenizer.add_tokens(["extra"])
    with pytest.raises(InputError, match="must share a tokenizer"):
        RewardEnsemble([one, other])
    other = RewardModel.load(save_reward_model())
    other.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="differ in their chat template"):
        RewardEnsemble([one, other])
    with pytest.raises(InputError, match="pooling must be one of"):
        RewardEnsemble([one], "median")


def save_sentiment(folder, *, words: list[str]) -> str:
    """A BERT classifier with three labels and a tokenizer of its own."""
    torch.manual_seed(3)
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        id2label={0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"},
        label2id={"NEGATIVE": 0, "NEUTRAL": 1, "POSITIVE": 2},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("probability", [False, True])
def test_a_label_of_a_classifier_with_another_tokenizer_scores_the_text(
    save_lm, prompt_file, tmp_path, probability
):
    path = save_sentiment(tmp_path, words=list("lkjihgfedcba"))
    env = make(save_lm, prompt_file, path, reward_label="POSITIVE", reward_probability=probability)
    env.reset(seed=0)
    _, infos, _ = env.play(draw_responses(3))
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = load_tokenizer(path)
    for prompt, response, score in zip(
        infos["prompt"], infos["response"], infos["score"], strict=True
    ):
        with torch.no_grad():
            logits = plain(**tokenizer(prompt + response, return_tensors="pt")).logits[0]
        expected = logits.softmax(-1)[2] if probability else logits[2]
        assert float(expected) == pytest.approx(float(score), abs=1e-5)
    assert len(set(infos["score"].tolist())) > 1


def test_a_label_must_be_named_and_exist(save_lm, prompt_file, tmp_path):
    path = save_sentiment(tmp_path, words=["a"])
    with pytest.raises(InputError, match="NEGATIVE, NEUTRAL, POSITIVE; none is named"):
        RewardModel.load(path)
    heads = two_heads(save_lm)
    heads.save_pretrained(tmp_path / "heads")
    with pytest.raises(InputError, match="ensemble of 2 heads"):
        RewardModel.load(str(tmp_path / "heads"), label=1)
    with pytest.raises(InputError, match="'GOOD' is none of them"):
        RewardModel.load(path, label="GOOD")
    model = RewardModel.load(path, label=2)
    with pytest.raises(InputError, match="keeps its own scale"):
        model.normalise(torch.tensor([[4, 5]]))


def test_labels_that_do_not_exclude_each_other_are_paid_by_their_own_sigmoid(tmp_path):
    path = save_sentiment(tmp_path, words=["a"])
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    row = torch.tensor([[2, 4, 4]])
    with torch.no_grad():
        expected = plain(input_ids=row).logits[0, 2].sigmoid()
    model = RewardModel.load(path, label="POSITIVE", probability=True)
    assert float(model.scores(row)) == pytest.approx(float(expected), abs=1e-6)


def test_a_reward_model_with_another_tokenizer_sees_text_encoded_anew(
    save_lm, save_reward_model, prompt_file, tmp_path
):
    """The same words under other ids: only re-encoding can score them."""
    model = RewardModel.load(save_reward_model())
    tokenizer = load_tokenizer(save_lm())
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    words = [w for w in vocabulary if len(w) == 1]
    swapped = dict(zip(words, [vocabulary[w] for w in reversed(words)], strict=True))
    data["model"]["vocab"] = {**vocabulary, **swapped}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    model.model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    env = make(save_lm, prompt_file, str(tmp_path))
    env.reset(seed=0)
    _, infos, _ = env.play(draw_responses(3))
    assert set(infos["finish_reason"]) == {"stop", "length"}
    for prompt, response, score, reason in zip(
        *(infos[name] for name in ("prompt", "response", "score", "finish_reason")), strict=True
    ):
        row = [
            *other(prompt)["input_ids"],
            *other(response, add_special_tokens=False)["input_ids"],
            *([other.eos_token_id] if reason == "stop" else []),
        ]
        assert float(model.scores(torch.tensor([row]))) == pytest.approx(float(score), abs=1e-5)


def test_a_reward_model_with_another_chat_template_reads_the_messages(
    save_lm, save_reward_model, tmp_path
):
    """Roles that are special tokens of the one tokenizer mean nothing to the other."""
    policy, reward = tmp_path / "policy", tmp_path / "reward"
    CausalLM.load(save_lm()).save_pretrained(policy)
    words = load_tokenizer(str(policy))
    words.chat_template = "<s>{% for m in messages %}<unk> {{ m['content'] }} {% endfor %}"
    words.save_pretrained(policy)
    model = RewardModel.load(save_reward_model())
    model.tokenizer.add_tokens(["extra"])  # so that it is another
    model.tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ 'b' if m['role'] == 'user' else 'c' }} {{ m['content'] }} "
        "{% endfor %}"
    )
    model.save_pretrained(reward)
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "d"}]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([{"prompt": chat}]))
    env = text_vector_env(
        num_envs=2,
        reference=str(policy),
        reward_model=str(reward),
        prompts=str(file),
        max_prompt_tokens=16,
        max_new_tokens=BUDGET,
        split="all",
    )

    def scores_as_read(messages) -> None:
        _, infos, _ = env.play(draw_responses(2))
        for response, score, reason in zip(
            infos["response"], infos["score"], infos["finish_reason"], strict=True
        ):
            row = model.encode(messages, response, finished=reason == "stop")
            said = model.tokenizer.decode(row)
            assert said.startswith(f"<s> b {messages[0]['content']} c"), said
            expected = float(model.scores(torch.tensor([row])))
            assert expected == pytest.approx(float(score), abs=1e-5)

    env.reset(seed=0)
    scores_as_read(chat)
    named = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    env.reset(options={"prompt": named})
    state = json.loads(json.dumps(env.get_state()))
    (key,) = [ids for ids, messages in env.prompts.chats.items() if messages == named]
    del env.prompts.chats[key]  # as in another process
    env.set_state(state)
    scores_as_read(named)
    (comparison, _) = collect_comparisons(
        env.objective.reference,
        env.prompts,
        lambda prompts, texts: [0.0] * len(texts),
        n=2,
        k=2,
        temperature=1.0,
        max_new_tokens=BUDGET,
        seed=0,
    )
    assert comparison.prompt in (chat, named)
