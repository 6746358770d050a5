"""The subject of the checks: an environment, a policy and some of the policy's responses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.tokens import PAD, Sequences, continuations

TOLERANCE = 1e-3
"""Most nats between two float32 computations of one log-prob: the order of the sums may differ."""

ROUNDED = 0.5
"""The same if one computation is in bfloat16, which rounds logits to 8 significant bits."""

REPEATED = 5e-2
"""The same for one function called twice in bfloat16. The mean must agree to `TOLERANCE`."""


@dataclass(frozen=True)
class Problem:
    """A problem that a check has found.

    Attributes:
        check: Name of the check.
        what: What is wrong.
        fix: How to fix it.
    """

    check: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}\n  fix: {self.fix}"


class Subject:
    """An environment and a policy, with one batch of the policy's own responses.

    Args:
        env: The environment. The checks use a small copy with the same objective and prompts, so
            its own state does not change.
        policy: The policy.
        fresh: Whether the policy has not learned yet, so that it must equal the reference.
        rows: Responses to draw and check.
    """

    def __init__(
        self, env: TokenVectorEnv, policy: CausalLMPolicy, *, fresh: bool = True, rows: int = 16
    ) -> None:
        env = env.resized(rows)
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
        """Most nats by which two computations of one of the policy's log-probs may differ."""
        return TOLERANCE if self.policy.precision == "fp32" else ROUNDED

    def agrees(self, log_probs: Tensor) -> bool:
        """Return whether log-probs (M,), computed again by the same function, agree."""
        gap = (log_probs - self.log_probs).abs()
        most = TOLERANCE if self.policy.precision == "fp32" else REPEATED
        return float(gap.max()) <= most and float(gap.mean()) <= TOLERANCE

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probs (M,) of all response tokens, from the policy's score pass."""
        return self.policy.score(self.sequences)[1]

    @property
    def padded(self) -> Sequences:
        """The same sequences with more padding on the right."""
        wide = torch.nn.functional.pad(self.sequences.tokens, (0, 3), value=PAD)
        return Sequences(wide, self.sequences.starts, self.sequences.lengths)


@contextmanager
def own_chance() -> Iterator[None]:
    """Use fixed randomness inside, and restore torch's global generators after.

    Otherwise the results of a training would depend on whether the doctor ran before it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def changed_weights(policy: CausalLMPolicy, factor: float) -> Iterator[None]:
    """Multiply the policy's trained weights by `factor` inside, and restore them after."""
    weights = [p for p in policy.lm.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p in weights:
            p.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(weights, kept, strict=True):
                p.copy_(before)


@torch.no_grad()
def plain_log_probs(lm: CausalLM, row: Sequences) -> Tensor:
    """Log-probs (M,) of one row's chosen tokens, by one plain forward pass of transformers."""
    start, length = int(row.starts[0]), int(row.lengths[0])
    ids = row.tokens[:1, : start + length]
    logits = lm.model(input_ids=ids, use_cache=False).logits[0]
    logits = logits[start - 1 : -1, : lm.vocab_size].float() / lm.temperature
    log_p = torch.log_softmax(lm.mask.ban(logits, lm.limits(row)), -1)
    return log_p.gather(1, ids[0, start:, None])[:, 0]
