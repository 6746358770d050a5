"""The objective, defined once: r_t = −β (log π − log π_ref) + 1[t = T] · R(x, y).

Nothing else in the project computes a reward. An agent with a KL weight of its own adds the
difference of the two penalties (`agents.sb3.rollout.collection.WavePlayer`).
Notation: N rows, M chosen tokens, β = `kl_coef`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_gym.data.prompts import Prompt
from rlhf_gym.errors import InputError
from rlhf_gym.kl import REWARD_ESTIMATORS, RewardEstimator, k1
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import DecodeCache
from rlhf_gym.lm.loading import same_tokens
from rlhf_gym.rewards.ensemble import RewardEnsemble
from rlhf_gym.rewards.functions import (
    Cut,
    Reward,
    Shaping,
    TokenReward,
    called,
    check_scores,
    reward_name,
)
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import Sequences, pad_rows, row_sums


class Settlement(NamedTuple):
    """What an environment pays for whole responses.

    Attributes:
        rewards: (M,) reward of every chosen token.
        ref_log_probs: (M,) log π_ref of every chosen token.
        kl: (M,) k1 of every chosen token; None if the actor's log-probs are unknown.
        scores: (N,) R(x, y).
        responses: The responses' texts and finish reasons.
    """

    rewards: Tensor
    ref_log_probs: Tensor
    kl: Tensor | None
    scores: Tensor
    responses: Responses


class Objective:
    """Reward model or callable + shaping + reference + β.

    Args:
        reference: The frozen reference π_ref with the environment's temperature.
        reward: A `RewardModel`, a `RewardEnsemble`, or a function of (prompts, responses).
        kl_coef: β ≥ 0, the penalty per nat of divergence.
        cuts: The part of a response that reward and shaping see, applied in turn.
        shaping: Pure functions applied to the scores in turn.
        token_rewards: Rewards paid token by token; their sum is a part of R(x, y).
        chats: For prompts that were chat messages: the messages, by the prompt's ids. A reward
            model with another tokenizer reads them by its own chat template.
        kl_estimator: Estimator of the penalty. Only with "k1" is the expected return J; "k2" and
            "k3" exist to be studied, and their optimum is not J*.

    Raises:
        InputError: β is negative, or there is no such estimator.
    """

    def __init__(
        self,
        reference: CausalLM,
        reward: Reward,
        *,
        kl_coef: float,
        cuts: Sequence[Cut] = (),
        shaping: Sequence[Shaping] = (),
        token_rewards: Sequence[TokenReward] = (),
        chats: Mapping[tuple[int, ...], Prompt] | None = None,
        kl_estimator: RewardEstimator = "k1",
    ) -> None:
        if not kl_coef >= 0:
            raise InputError(f"kl_coef must be at least 0, not {kl_coef}")
        if kl_estimator not in REWARD_ESTIMATORS:
            raise InputError(
                f"kl_estimator must be one of {list(REWARD_ESTIMATORS)}, not {kl_estimator!r}"
            )
        self.reference = reference
        self.reward = reward
        self.kl_coef = float(kl_coef)
        self.cuts, self.shaping = tuple(cuts), tuple(shaping)
        self.token_rewards = tuple(token_rewards)
        self.chats = {} if chats is None else chats
        self.kl_estimator = kl_estimator
        # A reward model with the policy's tokenizer scores the sampled ids themselves: text that is
        # tokenised again need not give the same ids, and has lost the EOS.
        self._shares_ids = isinstance(reward, RewardModel | RewardEnsemble) and same_tokens(
            reward.tokenizer, reference.tokenizer
        )
        self._chat_rows: dict[tuple[int, ...], Sequence[int]] = {}  # by the policy's ids
        self._decode = DecodeCache(reference)

    @property
    def members(self) -> int:
        """Number of scores that are pooled into one; 1 unless the reward is an ensemble."""
        reward = self.reward
        return reward.heads if isinstance(reward, RewardModel | RewardEnsemble) else 1

    def scores(self, responses: Responses) -> Tensor:
        """R(x, y), shaping and token rewards included: (N,) float32 on the reference's device.

        Raises:
            InputError: A reward function returned the wrong number of scores, or a NaN or
                infinity.
        """
        scores = self.final_scores(responses)
        if not self.token_rewards:
            return scores
        along = row_sums(self.rewards_along(responses), responses.sequences.lengths)
        return scores + along.float()

    def final_scores(self, responses: Responses) -> Tensor:
        """The score paid on the last token, without token rewards: (N,) float32."""
        seen = responses
        for cut in self.cuts:
            seen = cut(seen)
        if isinstance(self.reward, RewardModel | RewardEnsemble):
            ids = self._reward_ids(seen, self.reward).to(self.reward.device)
            members = self.reward.member_scores(ids)
            if members.shape[1] > 1:
                # How far an ensemble disagrees; high where the policy exploits a member.
                responses.score_std = members.std(1, correction=0)
            scores = self.reward.pooled(members)
        else:
            scores = torch.as_tensor(called(self.reward, seen).astype(np.float32))
        scores = scores.float().to(self.reference.device)
        # A reward of another shape is refused below, by name; shaping could fail on it first.
        if scores.shape == responses.stopped.shape:
            for shape in self.shaping:
                scores = shape(seen, scores)
        check_scores(reward_name(self.reward), scores.cpu().numpy(), responses)
        return scores

    def rewards_along(self, responses: Responses) -> Tensor:
        """Token rewards of every chosen token, (M,); responses need not have ended."""
        total = torch.zeros(int(responses.sequences.lengths.sum()), device=self.reference.device)
        for reward in self.token_rewards:
            total = total + reward(responses)
        return total

    def ref_log_probs(self, sequences: Sequences) -> Tensor:
        """Log π_ref of every chosen token by one pass over whole sequences: (M,)."""
        return self.reference.log_probs(sequences)

    @torch.no_grad()
    def ref_log_prob_of_next(self, observations: Tensor, actions: Tensor, taken: Tensor) -> Tensor:
        """Log π_ref of one next token per row: (N,).

        Args:
            observations: (N, L).
            actions: (N,) the next tokens.
            taken: (N,) number of tokens that each response has already.
        """
        hidden = self._decode.last_hidden(observations)
        limits = self.reference.next_limits(hidden, taken, actions)
        return self.reference.log_probs_of(hidden, actions, limits)

    @torch.no_grad()
    def allowed_next(self, observations: Tensor, taken: Tensor) -> Tensor:
        """Which tokens may come next: (N, L) and (N,) -> (N, V) bool, a new tensor."""
        reference = self.reference
        hidden = self._decode.last_hidden(observations)
        logits = hidden.new_zeros(len(hidden), reference.vocab_size)
        return reference.mask.ban(logits, reference.next_limits(hidden, taken)) == 0

    def penalties(self, ref_log_probs: Tensor, log_probs: Tensor | None) -> Tensor:
        """The penalty on each token, −β · k1; without the actor's log-probs only the known half.

        That half is +β · log π_ref; the agent has to pay −β · log π in its own loop.

        Raises:
            InputError: Nobody is bound, and the estimator cannot be split into two halves.
        """
        # k1 in the reward: the expected return is then exactly J = E[R] − β · KL, and so is its
        # policy gradient. The exact KL of a state does not depend on the token chosen there, so as
        # a reward its own gradient is lost; k2 and k3 are biased.
        if log_probs is not None:
            estimate = REWARD_ESTIMATORS[self.kl_estimator]
            return -self.kl_coef * estimate(log_probs, ref_log_probs)
        if self.kl_estimator != "k1":
            raise InputError(
                f"kl_estimator={self.kl_estimator!r} needs the actor's log-probs; bind an actor "
                "(env.unwrapped.bind_actor), or use k1"
            )
        return self.kl_coef * ref_log_probs

    def settle(
        self, sequences: Sequences, log_probs: Tensor | None, *, stop_at_eos: bool = True
    ) -> Settlement:
        """Rewards of whole responses, given the actor's log-probs (M,), or None if unknown."""
        responses = Responses(self.reference, sequences, stop_at_eos=stop_at_eos, chats=self.chats)
        ref_log_probs = self.ref_log_probs(sequences)
        along = self.rewards_along(responses)
        rewards = self.penalties(ref_log_probs, log_probs) + along
        scores = self.final_scores(responses)
        rewards[torch.cumsum(sequences.lengths, 0) - 1] += scores
        scores = scores + row_sums(along, sequences.lengths).float()
        kl = None if log_probs is None else k1(log_probs, ref_log_probs)
        return Settlement(rewards, ref_log_probs, kl, scores, responses)

    def value(self, scores: Tensor, kl: Tensor, lengths: Tensor) -> Tensor:
        """One sample of J per response: score − β · Σ_t KL_t, from (N,), (M,) and (N,) to (N,)."""
        return scores.double() - self.kl_coef * row_sums(kl, lengths)

    def _reward_ids(self, responses: Responses, reward: RewardModel | RewardEnsemble) -> Tensor:
        """The rows that a reward model reads: sampled ids if it shares the tokenizer, else text."""
        rows = (self._sampled_rows if self._shares_ids else self._text_rows)(responses, reward)
        # Its own end and its own chat template may need more tokens than the policy was given, so
        # the check is here and not where the environment is made.
        if reward.context is not None and rows.shape[1] > reward.context:
            raise InputError(
                f"a prompt and its response are {rows.shape[1]} tokens to the reward model "
                f"{reward_name(reward)}, whose context is {reward.context}; lower max_new_tokens "
                "or max_prompt_tokens"
            )
        return rows

    def _text_rows(self, responses: Responses, reward: RewardModel | RewardEnsemble) -> Tensor:
        """Prompts and responses as the reward model's own tokenizer reads their texts."""
        # A prompt's text has the roles of the policy's template, which mean nothing to another
        # model: it reads the messages by its own template.
        by_template = bool(reward.tokenizer.chat_template)
        prompts: list[Prompt] = responses.asked if by_template else list(responses.prompts)
        ended = responses.closed.tolist()
        texts = zip(prompts, responses.texts, ended, strict=True)
        rows = [reward.encode(prompt, text, finished=closed) for prompt, text, closed in texts]
        return torch.from_numpy(pad_rows(rows))

    def _sampled_rows(self, responses: Responses, reward: RewardModel | RewardEnsemble) -> Tensor:
        """The sampled ids, with the end and after the chat prompt that the reward model reads.

        A policy may stop at any of its EOS ids; to the reward model they are one end, the one that
        closed the answers it learned from. And it may have another chat template than the policy.
        """
        tokens, starts, lengths = responses.sequences
        chats = [not isinstance(prompt, str) for prompt in responses.asked] if self.chats else []
        text = reward.closing(chat=False)
        if not any(chats) and len(text) <= 1:
            closed = responses.closed.nonzero()[:, 0]
            if not len(closed) or not text:
                return tokens
            out = tokens.clone()
            out[closed, (starts + lengths - 1)[closed]] = text[0]
            return out
        rows = []
        cells = zip(tokens.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        ends = responses.closed.tolist()
        for i, (row, start, n) in enumerate(cells):
            was_chat = bool(chats) and chats[i]
            prompt, answer = row[:start], row[start : start + n]
            if was_chat:
                prompt = self._chat_ids(tuple(prompt), responses.asked[i], reward)
            closing = reward.closing(chat=was_chat)
            rows.append([*prompt, *(answer[:-1] + closing if ends[i] and closing else answer)])
        return torch.from_numpy(pad_rows(rows)).to(tokens.device)

    def _chat_ids(
        self, ids: tuple[int, ...], prompt: Prompt, reward: RewardModel | RewardEnsemble
    ) -> Sequence[int]:
        """A chat prompt as the reward model's own template writes it, if it has one."""
        if ids not in self._chat_rows:
            self._chat_rows[ids] = reward.chat_ids(prompt) or ids
        return self._chat_rows[ids]
