"""Listwise reward model: the seed's gradient, Bradley–Terry at K = 2, saved = loaded = plain."""

import numpy as np
import pytest
import torch
from conftest import EOS, PAD_ID, draw_responses
from transformers import AutoModelForSequenceClassification

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.likelihood import choice_log_probs, listwise_loss
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD, pad_rows

SIZES = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9])
CHOSEN = torch.tensor([1, 0, 3, 2, 5, 6, 0, 8])


def random_logits(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(int(SIZES.sum()), dtype=torch.float64, generator=generator)


def test_gradient_is_the_closed_form_for_mixed_k():
    features = torch.randn(int(SIZES.sum()), 5, dtype=torch.float64)
    weights = torch.randn(5, dtype=torch.float64, requires_grad=True)
    listwise_loss(features @ weights, SIZES, CHOSEN).mean().backward()
    expected = torch.zeros(5, dtype=torch.float64)
    first = 0
    for k, chosen in zip(SIZES.tolist(), CHOSEN.tolist(), strict=True):
        rows = features[first : first + k]
        p = torch.softmax(rows @ weights.detach(), 0)
        expected -= rows[chosen] - (p[:, None] * rows).sum(0)
        first += k
    torch.testing.assert_close(weights.grad, expected / len(SIZES), atol=1e-12, rtol=1e-10)


def test_two_candidates_are_bradley_terry():
    logits = torch.tensor([0.3, -1.2, 2.0, 5.0], dtype=torch.float64)
    losses = listwise_loss(logits, torch.tensor([2, 2]), torch.tensor([0, 1]))
    expected = -torch.nn.functional.logsigmoid(torch.tensor([1.5, 3.0], dtype=torch.float64))
    torch.testing.assert_close(losses, expected)


def test_probabilities_sum_to_one_and_ignore_shifts_order_and_neighbours():
    logits = random_logits()
    log_p = choice_log_probs(logits, SIZES)
    shifts = torch.repeat_interleave(1e3 * torch.randn(len(SIZES), dtype=torch.float64), SIZES)
    torch.testing.assert_close(choice_log_probs(logits + shifts, SIZES), log_p)
    first = 0
    for k in SIZES.tolist():
        part = log_p[first : first + k]
        assert float(part.exp().sum()) == pytest.approx(1.0)
        order = torch.randperm(k)
        alone = choice_log_probs(logits[first : first + k][order], torch.tensor([k]))
        torch.testing.assert_close(alone, part[order])
        first += k


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_saved_is_loaded_is_plain_transformers(save_lm, tmp_path, family):
    torch.manual_seed(0)
    model = RewardModel.from_backbone(save_lm(family))
    rows = [[2, 5, 6, 7, EOS], [2, 9, 10], [2, 11, 12, 13]]
    tokens = torch.from_numpy(pad_rows(rows))
    logits = model.logits(tokens)
    model.normalise(tokens)
    scores = model.scores(tokens)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.load(str(tmp_path))
    torch.testing.assert_close(loaded.scores(tokens), scores, atol=1e-5, rtol=1e-5)
    # The likelihood's logit survives the gain.
    torch.testing.assert_close(loaded.logits(tokens), logits, atol=1e-5, rtol=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for row, score in zip(rows, scores.tolist(), strict=True):
        with torch.no_grad():
            logit = float(plain(input_ids=torch.tensor([row])).logits[0, 0])
        assert logit + plain.config.reward_bias == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_score_does_not_depend_on_neighbours_or_padding(save_reward_model, pad_is_eos):
    model = RewardModel.load(save_reward_model(pad_is_eos=pad_is_eos))
    rows = [[2, 5, EOS], [2, 5, 6, 7, 8, 9, 10, EOS], [2, 5, PAD_ID]]
    together = model.scores(torch.from_numpy(pad_rows(rows, 12)))
    alone = torch.cat([model.scores(torch.tensor([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    # The EOS itself is read, even where it is the pad id too.
    without = model.scores(torch.tensor([rows[0][:-1]]))
    assert abs(float(without) - float(alone[0])) > 1e-3


def test_fresh_head_has_the_stated_spread(save_lm):
    torch.manual_seed(0)
    heads = [RewardModel.from_backbone(save_lm()).model.score.weight for _ in range(20)]
    assert float(torch.cat(heads).detach().std()) == pytest.approx(1 / np.sqrt(33), rel=0.1)


def test_a_language_model_is_refused_as_reward_model(save_lm):
    with pytest.raises(InputError, match="without a reward head"):
        RewardModel.load(save_lm())


def test_constant_logits_cannot_be_normalised(save_reward_model):
    model = RewardModel.load(save_reward_model())
    with pytest.raises(InputError, match="same logit"):
        model.normalise(torch.tensor([[2, 5, 6]] * 3))


def test_a_classifier_with_another_shape_is_called_whole(tmp_path, save_lm):
    from transformers import BertConfig, BertForSequenceClassification

    from rlhf_gym.lm.loading import load_tokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    load_tokenizer(save_lm()).save_pretrained(tmp_path)
    model = RewardModel.load(str(tmp_path))
    rows = [row[row != PAD].tolist() for row in draw_responses(3)]
    together = model.scores(torch.from_numpy(pad_rows(rows)))
    alone = torch.cat([model.scores(torch.tensor([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
