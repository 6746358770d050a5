"""Who is examined: an environment and a policy, with some of the policy's own responses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.tokens import PAD, Sequences, continuations

TOLERANCE = 1e-3
"""Nats by which two computations of one log-prob may differ (float32, in another order)."""

ROUNDED = 0.5
"""The same for a policy in bfloat16, whose logits have 8 bits, against float32 or another order."""

REPEATED = 5e-2
"""The same for two computations in bfloat16 by one function; their mean to `TOLERANCE`."""


@dataclass(frozen=True)
class Problem:
    """Something that does not hold.

    Attributes:
        check: The check's name.
        what: What is wrong.
        mend: How to mend it.
    """

    check: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}\n  mend: {self.mend}"


class Subject:
    """An environment and a policy, with one wave of the policy's own responses.

    Args:
        env: The environment. A small one with its objective and prompts is examined in its place,
            so that its rows stay where they are.
        policy: The policy.
        fresh: Whether the policy has not learned yet, so that it must be the reference.
        rows: Responses to examine.
    """

    def __init__(
        self, env: TokenVectorEnv, policy: CausalLMPolicy, *, fresh: bool = True, rows: int = 16
    ) -> None:
        env = TokenVectorEnv(
            env.objective,
            env.prompts,
            num_envs=rows,
            max_new_tokens=env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
        )
        self.env, self.policy, self.fresh = env, policy, fresh
        self.objective = env.objective
        policy.set_training_mode(False)
        observations, _ = env.reset(seed=0)
        self.prompts = torch.from_numpy(observations[:, : env.prompts.max_tokens])
        self.prompts = self.prompts.to(policy.device)
        with own_chance():
            self.sampled = policy.sample_with_log_probs(
                self.prompts, env.max_new_tokens, env.stop_at_eos
            )
        self.responses = self.sampled.responses
        self.sequences = continuations(self.prompts, self.responses)

    @property
    def tolerance(self) -> float:
        """Nats by which two computations of one of the policy's log-probs may differ."""
        return TOLERANCE if self.policy.precision == "fp32" else ROUNDED

    def agrees(self, log_probs: Tensor) -> bool:
        """Whether log-probs (M,) that the score pass's function computed anew are the same."""
        gap = (log_probs - self.log_probs).abs()
        most = TOLERANCE if self.policy.precision == "fp32" else REPEATED
        return float(gap.max()) <= most and float(gap.mean()) <= TOLERANCE

    @cached_property
    def log_probs(self) -> Tensor:
        """(M,) by the policy's score pass."""
        return self.policy.score(self.sequences)[1]

    @property
    def padded(self) -> Sequences:
        """The same sequences with more padding on the right."""
        wide = torch.nn.functional.pad(self.sequences.tokens, (0, 3), value=PAD)
        return Sequences(wide, self.sequences.starts, self.sequences.lengths)


@contextmanager
def own_chance() -> Iterator[None]:
    """The global generators are left as they were: a run must not depend on its examination."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
