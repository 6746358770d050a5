"""One wave of a rollout: sample a whole response per row, score it, let the environment play it.

Notation: N rows of the environment, P the longest prompt, T the token budget, M chosen tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.sb3.finite import check_finite
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.kl import REWARD_ESTIMATORS
from rlhf_gym.lm.decoding.sampling import Sampled
from rlhf_gym.tokens import PAD, Sequences, continuations, unflatten
from rlhf_gym.utils.arrays import Ints


class Wave(NamedTuple):
    """What one wave leaves besides the buffer's rows.

    Attributes:
        infos: The environment's infos, with `length` (N,), `log_prob_mean` and `seconds` by stage.
        before: (N, L) the prompts.
        actions: (N, T) the responses, PAD after their ends.
        rewards: (N, T) what the environment paid, at its own β.
        observations: (N, L) the next prompts.
    """

    infos: dict[str, Any]
    before: Ints
    actions: Ints
    rewards: npt.NDArray[np.floating]
    observations: Ints


@dataclass
class WavePlayer:
    """Plays waves with a policy.

    Attributes:
        policy: Scores the responses, and samples them unless `sample` does.
        env: Pays for them.
        sample: From prompts (N, P) to responses with their log-probs and values.
        with_values: Whether values are needed.
        scoring_pass: Whether log-probs come from a pass over whole sequences. Else decoding's are
            taken, which costs nothing more.
        kl_coef: Weight of the KL penalty in the rewards that the agent learns from.
    """

    policy: CausalLMPolicy
    env: TokenVectorEnv
    sample: Callable[[Tensor], Sampled]
    with_values: bool
    scoring_pass: bool
    kl_coef: float

    def play(self, observations: Ints, buffer: SequenceRolloutBuffer) -> Wave:
        """Play one episode in every row, from prompts (N, L), and add it to the buffer."""
        env, device = self.env, self.policy.device
        prompts = observations[:, : env.prompts.max_tokens]
        begun = now(device)
        on_device = torch.from_numpy(prompts).to(device)
        found = self.sample(on_device)
        sampled = now(device)
        sequences = continuations(on_device, found.responses)
        log_probs, values = self._score(found, sequences)
        value_grid, log_prob_grid = (
            unflatten(flat, sequences.lengths, env.max_new_tokens).cpu().numpy()
            for flat in (values, log_probs)
        )
        check_finite("log π", log_probs, sequences, log_probs=log_probs, values=values)
        check_finite("the value", values, sequences, log_probs=log_probs, values=values)
        scored = now(device)
        actions = found.responses.cpu().numpy()
        paid, infos, following = env.play(actions, log_prob_grid)
        flat = torch.from_numpy(paid[actions >= 0]).to(log_probs.device)
        check_finite("the reward", flat, sequences, rewards=flat, log_probs=log_probs)
        ref_log_probs = infos["ref_log_prob"]
        rewards = paid + self._own_penalty(actions, log_prob_grid, ref_log_probs)
        buffer.add_responses(prompts, actions, rewards, value_grid, log_prob_grid, ref_log_probs)
        infos["seconds"] = {"sample": sampled - begun, "play": now(device) - scored}
        if self._makes_a_pass:
            infos["seconds"]["score"] = scored - sampled
        infos["length"] = sequences.lengths.cpu().numpy()
        infos["log_prob_mean"] = float(log_probs.double().mean())
        return Wave(infos, observations, actions, paid, following)

    @property
    def _own_trunk(self) -> bool:
        """Whether values come from a trunk that does not decode."""
        return self.with_values and not self.policy.critic.shared

    @property
    def _makes_a_pass(self) -> bool:
        return self.scoring_pass or self._own_trunk

    def _score(self, found: Sampled, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probs and values of the chosen tokens, (M,) each."""
        if self.scoring_pass:
            values, log_probs = self.policy.score(sequences)
            return log_probs, values
        taken = found.responses != PAD
        log_probs, values = found.log_probs[taken], found.values[taken]
        return log_probs, self.policy.values(sequences) if self._own_trunk else values

    def _own_penalty(
        self,
        actions: npt.NDArray[np.int64],
        log_probs: npt.NDArray[np.float32],
        ref_log_probs: npt.NDArray[np.float32],
    ) -> npt.NDArray[np.floating] | float:
        """What turns the environment's penalty, at its β, into the agent's, at its own: (N, T)."""
        objective = self.env.objective
        difference = objective.kl_coef - self.kl_coef
        if not difference:
            return 0.0
        estimate = REWARD_ESTIMATORS[objective.kl_estimator]
        kl = estimate(torch.from_numpy(log_probs), torch.from_numpy(ref_log_probs))
        penalty: npt.NDArray[np.floating] = difference * np.where(actions >= 0, kl.numpy(), 0.0)
        return penalty


def now(device: torch.device) -> float:
    """Seconds, once the device has finished what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
