"""Checks that the policy fits the environment and that all ways to compute log-probs agree."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from agents.doctor.subject import (
    TOLERANCE,
    Problem,
    Subject,
    changed_weights,
    plain_log_probs,
)
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from rlhf_gym.lm.decoding.sampling import draw
from rlhf_gym.lm.masks import NO_MASK, Mask
from rlhf_gym.tokens import PAD, append, row_lengths, row_sums

UNLIKELY = 6.0
"""Most standard errors by which the samples' mean −log p may differ from the entropy."""


def vocabulary(subject: Subject) -> Problem | None:
    """Check that the policy chooses among exactly the tokens of the environment's tokenizer."""
    wide = subject.policy.action_space.n  # type: ignore[attr-defined]
    named = subject.objective.reference.vocab_size
    ours = subject.policy.core.vocab_size
    largest = int(subject.responses.max())
    if ours == wide == named and largest < named:
        return None
    return Problem(
        "vocabulary",
        f"the policy chooses among {ours} tokens, the environment accepts {wide}, its tokenizer "
        f"has {named}; the largest id sampled was {largest}",
        "start the policy from the environment's reference; logits beyond the tokenizer's "
        "vocabulary are padding and must be dropped before the softmax (CausalLM.vocab_size)",
    )


def temperature(subject: Subject) -> Problem | None:
    """Check that policy and reference divide their logits by the same temperature."""
    ours, theirs = subject.policy.core.temperature, subject.objective.reference.temperature
    if ours == theirs:
        return None
    return Problem(
        "temperature",
        f"the policy's temperature is {ours}, the environment's {theirs}",
        "pass the environment's temperature to the policy (agents.sb3.vec_env.policy_kwargs does)",
    )


def mask(subject: Subject) -> Problem | None:
    """Check that policy and reference mask the same tokens."""
    core, reference = subject.policy.core, subject.objective.reference
    guided = core.guide is not None and core.guide.model is reference.model
    if core.mask == reference.mask and (guided or not core.mask.follows_reference):
        return None
    return Problem(
        "mask",
        f"the policy's mask is {_said(core.mask)}, the environment's {_said(reference.mask)}",
        "call CausalLMPolicy.follow(env.objective.reference) (agents.sb3.vec_env.build does)",
    )


def _said(mask: Mask) -> str:
    rules = [f"{len(mask.never)} tokens banned"] if mask.never else []
    for name in ("min_new_tokens", "top_k", "top_p"):
        if getattr(mask, name):
            rules.append(f"{name} {getattr(mask, name)}")
    return ", ".join(rules) or "none"


def frozen(subject: Subject) -> Problem | None:
    """Check that the reference is frozen and shares no trainable tensor with the policy.

    Without adapters it may share no tensor. With adapters the frozen base weights are shared.
    """
    reference, policy = subject.objective.reference.model, subject.policy
    adapted = policy.lora_rank > 0
    ours = {p.data_ptr() for p in policy.parameters() if p.requires_grad or not adapted}
    shared = sum(p.data_ptr() in ours for p in reference.parameters())
    learning = sum(p.requires_grad for p in reference.parameters())
    if not shared and not learning:
        return None
    return Problem(
        "frozen",
        f"the reference shares {shared} tensors with the policy, and {learning} of its tensors "
        "require gradients",
        "load a separate copy of the weights for the policy; call requires_grad_(False) on the "
        "reference",
    )


def start(subject: Subject) -> Problem | None:
    """Check that a policy that has not learned yet equals the reference: KL = 0."""
    if not subject.fresh:
        return None
    reference = subject.objective.ref_log_probs(subject.sequences)
    gap = float((subject.log_probs - reference).abs().max())
    if gap <= subject.tolerance:
        return None
    return Problem(
        "start",
        f"the policy has not learned yet, but its log-probs differ from the reference's by "
        f"{gap:.2g} nats",
        "start the policy from the environment's reference, with the same temperature and revision",
    )


def dropout(subject: Subject) -> Problem | None:
    """Check that training mode computes the same log-probs as evaluation mode."""
    subject.policy.set_training_mode(True)
    with torch.no_grad():
        trained = subject.policy.evaluate_actions(subject.sequences, subject.sequences.chosen())[1]
    subject.policy.set_training_mode(False)
    if subject.agrees(trained):
        return None
    gap = float((trained - subject.log_probs).abs().max())
    return Problem(
        "dropout",
        f"log-probs in training mode differ from those in evaluation mode by {gap:.2g} nats",
        "switch dropout off in the modules and the config (rlhf_gym.lm.loading.load_pretrained "
        "does this)",
    )


def ratio(subject: Subject) -> Problem | None:
    """Check that the first ratio is 1: the update computes the log-probs of the rollout."""
    with torch.enable_grad():
        now = subject.policy.evaluate_actions(subject.sequences, subject.sequences.chosen())[1]
    if subject.agrees(now.detach()):
        return None
    worst = float((now.detach() - subject.log_probs).exp().sub(1).abs().max())
    return Problem(
        "ratio",
        f"the first ratio π_θ/π_old differs from 1 by {worst:.2g}",
        "compute old and new log-probs with the same function, precision and temperature",
    )


def recomputed(subject: Subject) -> Problem | None:
    """Check the score pass against a plain forward pass of transformers on one unpadded row."""
    plain = plain_log_probs(subject.policy.core, subject.sequences.rows(slice(0, 1)))
    first = len(plain)
    gap = float((plain - subject.log_probs[:first]).abs().max())
    if gap <= subject.tolerance:
        return None
    return Problem(
        "recomputed",
        f"the policy's log-probs differ from those of a plain forward pass by {gap:.2g} nats",
        "check three things: logits[t] score token t + 1, the logits are divided by the "
        "temperature, and the padded vocabulary is dropped",
    )


def drawn_as_scored(subject: Subject) -> Problem | None:
    """Check that responses are sampled from the distribution that the log-probs describe.

    Over samples of π, the mean of −log π equals the entropy, up to a sampling error of known
    variance. A sampler with another temperature or mask breaks this.
    """
    with torch.no_grad():
        core = subject.policy.core
        hidden, limits = core.states(subject.sequences), core.limits(subject.sequences)
        log_p = torch.log_softmax(core.logits(hidden, limits), -1)
    p = log_p.exp()
    surprise = -log_p.gather(1, subject.sequences.chosen()[:, None])[:, 0]
    entropy = -(p * log_p).sum(1)
    variance = (p * log_p**2).sum(1) - entropy**2
    gap = float((surprise - entropy).sum())
    spread = float(variance.clamp(min=0).sum().sqrt()) + 1e-6
    if abs(gap) <= UNLIKELY * spread:
        return None
    how = "more likely" if gap < 0 else "less likely"
    return Problem(
        "drawn as scored",
        f"the responses are {how} under the policy's own log-probs than chance explains "
        f"({abs(gap) / spread:.0f} standard errors)",
        "use the same temperature, top-k, top-p and minimum length in the sampler and in the "
        "log-probs",
    )


def decoding(subject: Subject) -> Problem | None:
    """Check that the log-probs recorded while decoding equal those that the update computes."""
    if not subject.policy.decoding_scores:
        return None  # the rollout does not use them: it computes a score pass instead
    kept = subject.sampled.log_probs[subject.responses != PAD]
    gap = float((kept - subject.log_probs).abs().max())
    if gap <= TOLERANCE:
        return None
    return Problem(
        "decoding",
        f"the log-probs recorded while decoding differ from those of whole sequences by {gap:.2g} "
        "nats",
        "look for attention or positions that depend on a row's length: such a model must decode "
        "with full forward passes (rlhf_gym.lm.decoding.method.decoding_method)",
    )


def neighbours(subject: Subject) -> Problem | None:
    """Check that a row's log-probs depend neither on the other rows nor on padding."""
    score = subject.policy.score
    whole = row_sums(subject.log_probs, subject.sequences.lengths)
    padded = row_sums(score(subject.padded)[1], subject.sequences.lengths)
    alone = torch.stack(
        [
            score(subject.sequences.rows(torch.tensor([i], device=whole.device)))[1].double().sum()
            for i in range(min(len(whole), 4))
        ]
    )
    gap = max(float((whole - padded).abs().max()), float((whole[: len(alone)] - alone).abs().max()))
    if gap <= subject.tolerance * subject.env.max_new_tokens:
        return None
    return Problem(
        "neighbours",
        f"padding or the other rows change a response's log-prob by {gap:.2g} nats",
        "pad on the right, and mask by length, never by pad_token_id or eos_token_id",
    )


def cache(subject: Subject) -> Problem | None:
    """Check cached decoding against full forward passes, also right after a change of weights.

    The weights are changed for this check and restored at the end.
    """
    # More columns, for the tokens appended below.
    observations = np.pad(subject.env.reset(seed=0)[0], ((0, 0), (0, 3)), constant_values=PAD)
    policy = subject.policy
    worst = 0.0

    def compare() -> None:
        nonlocal observations, worst
        rows = torch.from_numpy(observations).to(policy.device)
        cached = policy.get_distribution(rows).log_p
        full = torch.log_softmax(policy.core.logits(_full(policy, rows)), -1)
        worst = max(worst, float((cached - full).abs().max()))
        observations = append(observations, draw(full).cpu().numpy())

    with torch.no_grad(), _unmasked(policy):
        # A prefill, a step with the cache, and a step after the weights have changed.
        compare()
        compare()
        with changed_weights(policy, 1.1):
            compare()
    if worst <= subject.tolerance:
        return None
    return Problem(
        "cache",
        f"log-probs of cached decoding differ from a full forward pass by {worst:.2g} nats",
        "drop cached keys and values whenever a parameter changes "
        "(rlhf_gym.lm.decoding.decode_cache.DecodeCache does this), and write each row at its own "
        "position",
    )


@contextmanager
def _unmasked(policy: CausalLMPolicy) -> Iterator[None]:
    # A mask may need the length of the response so far, which an observation alone does not show.
    core, policy.core = policy.core, dataclasses.replace(policy.core, mask=NO_MASK)
    try:
        yield
    finally:
        policy.core = core


def _full(policy: CausalLMPolicy, rows: Tensor) -> Tensor:
    lengths = row_lengths(rows)
    hidden = policy.core.hidden_states(rows.clamp(min=0), use_cache=False)
    return hidden[torch.arange(len(rows), device=rows.device), lengths - 1]
