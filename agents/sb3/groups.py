"""Learning from groups of responses to one prompt, by a loss of their log-probs.

Notation: G prompts, k responses to each; a response's log-prob is the sum over its tokens, nats.
"""

from abc import abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.sb3.rollout.buffer import SequenceRolloutBuffer, SequenceSamples
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.kl import k3
from rlhf_gym.lm.batching import passes
from rlhf_gym.tokens import row_sums


class Groups(NamedTuple):
    """A minibatch of responses, (G, k) each.

    Attributes:
        log_probs: log π_θ(y|x), float64; the loss's gradient goes through it.
        old_log_probs: The same of the policy at the rollout.
        ref_log_probs: The same of the reference.
        scores: R(x, y), the KL penalty not taken off.
        lengths: Tokens of each response.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    scores: Tensor
    lengths: Tensor


class GroupLearner(ResponseAlgorithm):
    """Learns by a loss of whole responses, without a critic; a subclass defines `loss`.

    The gradient of a minibatch does not depend on how it is cut into passes: where it takes
    several, its log-probs are computed once without and once with gradients.
    """

    @property
    def env_kl_coef(self) -> float:
        """The environment's β.

        Raises:
            InputError: It is 0, at which these losses have no gradient or no value.
        """
        beta = self.token_env.objective.kl_coef
        if beta <= 0:
            raise InputError(
                f"{type(self).__name__} needs a β above 0: make the environment with kl_coef"
            )
        return beta

    @abstractmethod
    def loss(self, groups: Groups) -> Tensor:
        """The loss to minimise, a mean over the minibatch."""

    def _estimate(self, buffer: SequenceRolloutBuffer, rows_per_prompt: int) -> None:
        if rows_per_prompt < 2:
            raise InputError(
                f"{type(self).__name__} compares responses to one prompt: make the environment "
                f"with rows_per_prompt of at least 2, or give samples_per_prompt"
            )
        # Every token gets the score of its whole response.
        by_wave = buffer.rewards.reshape(self.options.n_waves, -1, self.n_envs)
        whole = np.broadcast_to(by_wave.sum(1, keepdims=True), by_wave.shape)
        taken = buffer.actions >= 0
        buffer.returns = np.where(taken, whole.reshape(taken.shape), 0).astype(np.float32)

    def _reward_kl_coef(self, env: TokenVectorEnv) -> float:
        return 0.0  # the score alone; the loss knows the reference's log-probs

    def _together(self) -> int:
        return self.token_env.rows_per_prompt

    def _gradient(self, minibatch: SequenceSamples) -> dict[str, float]:
        """Leave the gradient of `loss` on one minibatch; statistics of its tokens' ratios."""
        sequences, core = minibatch.observations, self.policy.core
        lengths = sequences.lengths
        self.policy.optimizer.zero_grad()
        at_most = self._microbatch_tokens()
        parts = list(passes(core.model, sequences, at_most))
        # A minibatch that fits in one go keeps its autograd graph. A larger one is computed twice:
        # without gradients for the loss, then pass by pass with them.
        kept: list[Tensor] | None = None
        if len(parts) == 1 or sum(len(p.lengths) * p.width for p, _ in parts) <= at_most:
            kept = [self._log_probs(minibatch.rows(*part), len(parts) == 1) for part in parts]
            order = torch.cat([places for _, places in parts])
            now = torch.cat(kept).detach()[torch.argsort(order)]
        else:
            now = core.log_probs(sequences)
        leaf = row_sums(now, lengths).requires_grad_()
        loss = self.loss(self._groups(minibatch, leaf))
        loss.backward()
        assert leaf.grad is not None
        # d loss / d log π of each token is that of its response.
        weights = leaf.grad.repeat_interleave(lengths).to(now.dtype)
        for i, (part, places) in enumerate(parts):
            log_probs = kept[i] if kept else self._log_probs(minibatch.rows(part, places), True)
            (log_probs * weights[places]).sum().backward()
        ratio = (now - minibatch.old_log_prob).exp()
        low, high = torch.stack(ratio.aminmax()).tolist()
        return {
            "policy_loss": loss.item(),
            "kl_old": float(k3(minibatch.old_log_prob, now).mean()),
            "ratio_min": low,
            "ratio_max": high,
            "ratio_max_error": max(high - 1, 1 - low),
        }

    def _log_probs(self, rows: SequenceSamples, alone: bool) -> Tensor:
        """Log π_θ of each chosen token, (M,), with gradients.

        `alone`: the backward pass of these rows comes before any other forward pass.
        """
        return self.policy.evaluate_sequences(
            rows.observations, values=False, learning=alone
        ).log_probs

    def _groups(self, minibatch: SequenceSamples, log_probs: Tensor) -> Groups:
        k, lengths = self._together(), minibatch.observations.lengths
        last = torch.cumsum(lengths, 0) - 1
        rows = (
            log_probs,
            row_sums(minibatch.old_log_prob, lengths),
            row_sums(minibatch.ref_log_prob, lengths),
            minibatch.returns[last].double(),
            lengths,
        )
        return Groups(*(row.reshape(-1, k) for row in rows))
