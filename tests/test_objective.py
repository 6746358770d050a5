"""The objective: what is paid sums to score − β Σ k, and each half of it stands by itself."""

import numpy as np
import pytest
import torch
from conftest import (
    BUDGET,
    ENDS,
    EOS,
    PROMPTS,
    draw_responses,
    log_probs_alone,
    text_reward,
)

from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.callables import load_callable
from rlhf_gym.rewards.responses import Responses, observation_sequences
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD, Sequences, continuations, join, pad_rows, row_sums

N = len(PROMPTS)


def prompts_of(lm: CausalLM) -> torch.Tensor:
    return torch.from_numpy(pad_rows([lm.tokenizer(text)["input_ids"] for text in PROMPTS]))


def sequences_of(objective: Objective, responses: np.ndarray | None = None) -> Sequences:
    if responses is None:
        responses = draw_responses(N, BUDGET)
    return continuations(prompts_of(objective.reference), torch.from_numpy(responses))


def test_rewards_sum_to_score_minus_beta_kl(make_objective, load_lm):
    objective = make_objective(kl_coef=0.3)
    actor = load_lm("llama", seed=3, temperature=0.8)
    sequences = sequences_of(objective)
    assert len(set(sequences.lengths.tolist())) > 1
    settled = objective.settle(sequences, actor.log_probs(sequences))

    prompts, responses = prompts_of(objective.reference), draw_responses(N, BUDGET)
    alone = objective.reference.texts([[i for i in row if i != PAD] for row in responses])
    # Words of this tokenizer are parted by spaces, the first from the prompt's last too.
    scores = text_reward(PROMPTS, [f" {text}" if text else "" for text in alone])
    flat = settled.rewards.split(sequences.lengths.tolist())
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        log_p = log_probs_alone(actor, prompt, response)
        k = log_p - log_probs_alone(objective.reference, prompt, response)
        assert k.abs().max() > 0.1, "actor and reference must differ"
        expected = -0.3 * k
        expected[-1] += scores[i]
        torch.testing.assert_close(flat[i], expected, atol=1e-5, rtol=1e-5)
        assert float(flat[i].sum()) == pytest.approx(scores[i] - 0.3 * float(k.sum()), abs=1e-5)
    assert settled.kl is not None
    torch.testing.assert_close(
        row_sums(settled.rewards, sequences.lengths),
        objective.value(settled.scores, settled.kl, sequences.lengths),
        atol=1e-6,
        rtol=1e-6,
    )


def test_bound_is_unbound_and_the_agents_half(make_objective, load_lm):
    objective = make_objective(kl_coef=0.3)
    sequences = sequences_of(objective)
    log_p = load_lm("llama", seed=3, temperature=0.8).log_probs(sequences)
    bound, unbound = objective.settle(sequences, log_p), objective.settle(sequences, None)
    assert unbound.kl is None
    torch.testing.assert_close(unbound.rewards - 0.3 * log_p, bound.rewards, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unbound.scores, bound.scores)


def test_kl_is_zero_where_the_actor_is_the_reference(make_objective):
    objective = make_objective()
    sequences = sequences_of(objective)
    settled = objective.settle(sequences, objective.reference.log_probs(sequences))
    assert settled.kl is not None
    assert settled.kl.abs().max() == 0
    last = torch.cumsum(sequences.lengths, 0) - 1
    torch.testing.assert_close(settled.rewards[last], settled.scores)
    assert settled.rewards.count_nonzero() == N


def test_beta_zero_pays_the_score_alone(make_objective, load_lm):
    objective = make_objective(kl_coef=0.0)
    sequences = sequences_of(objective)
    log_p = load_lm("llama", seed=3).log_probs(sequences)
    settled = objective.settle(sequences, log_p)
    assert settled.rewards.count_nonzero() == N


@pytest.mark.parametrize("kl_coef", [-0.1, float("nan")])
def test_a_beta_below_zero_is_refused(make_objective, kl_coef):
    with pytest.raises(InputError, match="kl_coef"):
        make_objective(kl_coef=kl_coef)


def reward_with_a_nan(prompts, responses):
    return [0.0] * (len(responses) - 1) + [float("nan")]


def reward_with_an_infinity(prompts, responses):
    return torch.tensor([float("inf")] + [0.0] * (len(responses) - 1))


def reward_one_short(prompts, responses):
    return [0.0] * (len(responses) - 1)


def reward_in_a_column(prompts, responses):
    return np.zeros((len(responses), 1))


def reward_of_nothing(prompts, responses):
    return None


@pytest.mark.parametrize(
    "reward",
    [
        reward_with_a_nan,
        reward_with_an_infinity,
        reward_one_short,
        reward_in_a_column,
        reward_of_nothing,
    ],
)
def test_a_bad_reward_function_is_named(make_objective, reward):
    objective = make_objective(reward=reward)
    with pytest.raises(InputError, match=reward.__name__):
        objective.settle(sequences_of(objective), None)


def test_shaping_is_applied_in_turn(make_objective):
    def double(responses: Responses, scores: torch.Tensor) -> torch.Tensor:
        return 2 * scores

    def no_eos(responses: Responses, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(responses.stopped, scores, -1.0)

    objective = make_objective(shaping=(double, no_eos))
    responses = np.array([[4, 5, ENDS[2], PAD, PAD], [4, 5, 6, 7, 8]] * 2 + [[EOS] + [PAD] * 4])
    settled = objective.settle(sequences_of(objective, responses), None)
    plain = make_objective().settle(sequences_of(objective, responses), None)
    stopped = torch.tensor([True, False, True, False, True])
    assert settled.responses.stopped.tolist() == stopped.tolist()
    assert settled.responses.finish_reasons == ["stop", "length", "stop", "length", "stop"]
    torch.testing.assert_close(settled.scores, torch.where(stopped, 2 * plain.scores, -1.0))


def test_scores_do_not_depend_on_neighbours(make_objective, save_reward_model):
    objective = make_objective(reward=RewardModel.load(save_reward_model()))
    sequences = sequences_of(objective)
    together = objective.settle(sequences, None)
    parts = together.rewards.split(sequences.lengths.tolist())
    for i in range(N):
        one = sequences.rows(slice(i, i + 1))
        end = int(one.starts + one.lengths)
        for tokens in (one.tokens[:, :end], torch.nn.functional.pad(one.tokens, (0, 7), value=PAD)):
            alone = objective.settle(one._replace(tokens=tokens), None)
            torch.testing.assert_close(alone.scores, together.scores[i : i + 1], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone.rewards, parts[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_score_is_read_at_the_eos_even_where_pad_is_eos(
    make_objective, save_reward_model, family, pad_is_eos
):
    options = {"family": family, "pad_is_eos": pad_is_eos}
    reward = RewardModel.load(save_reward_model(**options))
    assert (reward.tokenizer.pad_token_id == EOS) is pad_is_eos
    objective = make_objective(reward=reward, **options)
    responses = pad_rows([[4, 5, EOS], [6, EOS], [EOS], [7, 8, 9, 10, 11], [4, 5, 9, 8, EOS]])
    sequences = sequences_of(objective, responses)
    settled = objective.settle(sequences, None)

    whole = join(prompts_of(objective.reference).numpy(), responses)
    for i, row in enumerate(whole):
        ids = torch.tensor([[int(t) for t in row if t != PAD]])
        with torch.no_grad():
            hidden = reward.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            raw = float(reward.model.score(hidden[0, -1]))
        # The head carries the gain; the config the bias.
        assert float(settled.scores[i]) == pytest.approx(raw + reward.scale.bias, abs=1e-5)
    without = objective.settle(sequences_of(objective, pad_rows([[4, 5, 9, 8, 6]] * N)), None)
    assert abs(float(without.scores[4] - settled.scores[4])) > 1e-3, "the EOS itself counts"


def test_the_score_is_paid_once_on_the_last_token(make_objective, save_reward_model):
    reward = RewardModel.load(save_reward_model(pad_is_eos=True))
    objective = make_objective(reward=reward, pad_is_eos=True)
    sequences = sequences_of(objective, pad_rows([[4, EOS], [5, 6, EOS], [EOS], [7] * 5, [8, EOS]]))
    settled = objective.settle(sequences, objective.reference.log_probs(sequences))
    paid = [part.nonzero()[:, 0].tolist() for part in settled.rewards.split([2, 3, 1, 5, 2])]
    assert paid == [[1], [2], [0], [4], [1]]


def test_another_tokenizers_reward_model_reads_text(make_objective, save_reward_model):
    reward = RewardModel.load(save_reward_model())
    reward.tokenizer.add_tokens(["zz"])  # no longer the policy's vocabulary
    objective = make_objective(reward=reward)
    responses = pad_rows([[4, 5, EOS], [6, 7], [8, ENDS[1]], [4], [9, EOS]])
    settled = objective.settle(sequences_of(objective, responses), None)
    prompts = prompts_of(objective.reference).tolist()
    for i, (prompt, reply) in enumerate(zip(prompts, responses.tolist(), strict=True)):
        # Special tokens have no text; a finished row is closed by the reward model's own EOS.
        kept = [t for t in reply if t not in (EOS, PAD)]
        end = [EOS] if set(reply) & set(ENDS) else []
        row = torch.tensor([[t for t in prompt if t != PAD] + kept + end])
        assert float(settled.scores[i]) == pytest.approx(float(reward.scores(row)), abs=1e-5)


def test_stepping_and_settling_know_the_same_reference(make_objective):
    objective = make_objective()
    sequences = sequences_of(objective)
    whole = objective.ref_log_probs(sequences)
    steps = []
    for i in range(N):
        start, length = int(sequences.starts[i]), int(sequences.lengths[i])
        for t in range(start, start + length):
            state = torch.full((1, sequences.tokens.shape[1]), PAD)
            state[0, :t] = sequences.tokens[i, :t]
            token, taken = sequences.tokens[i, t : t + 1], torch.tensor([t - start])
            steps.append(objective.ref_log_prob_of_next(state, token, taken))
    torch.testing.assert_close(torch.cat(steps), whole, atol=1e-5, rtol=1e-5)


def test_observations_as_sequences():
    tokens = pad_rows([[2, 4, 5], [2, 6]], 6)
    sequences = observation_sequences(tokens, np.array([1, 2]))
    assert sequences.lengths.tolist() == [2, 0]
    assert sequences.chosen().tolist() == [4, 5]


def test_callables_by_name():
    assert load_callable("conftest:text_reward") is text_reward
    for name in ("conftest", "conftest:nothing", "no_such_module:f", "conftest:PROMPTS"):
        with pytest.raises(InputError, match=name):
            load_callable(name)


@pytest.mark.parametrize("name", ["human:compound", "human:choose", "shaping:length_penalty"])
def test_run_folders_may_name_modules_as_they_were(name):
    assert load_callable(f"rlhf_gym.{name}") is load_callable(f"rlhf_gym.rewards.{name}")
    with pytest.raises(InputError, match="no_such"):
        load_callable(f"rlhf_gym.{name.split(':')[0]}:no_such")


def test_a_response_is_what_it_adds_to_its_prompt(load_lm):
    lm = load_lm("llama")  # its tokenizer takes a space at the beginning away
    tokens = torch.tensor([[2, 4, 5, 6, 7, 3], [2, 4, 5, 8, PAD, PAD]])
    sequences = Sequences(tokens, torch.tensor([3, 3]), torch.tensor([3, 1]))
    responses = Responses(lm, sequences)
    wholes = lm.texts([[2, 4, 5, 6, 7, 3], [2, 4, 5, 8]])
    joined = [p + r for p, r in zip(responses.prompts, responses.texts, strict=True)]
    assert joined == wholes == ["a b c d", "a b e"]
