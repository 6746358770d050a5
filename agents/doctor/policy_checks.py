"""Is the policy what the environment takes it for, and are its log-probs one thing everywhere?"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from agents.doctor.subject import TOLERANCE, Problem, Subject
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from rlhf_gym.lm.decoding.sampling import draw
from rlhf_gym.lm.masks import NO_MASK, Mask
from rlhf_gym.tokens import PAD, append, row_lengths, row_sums

UNLIKELY = 6.0
"""Standard errors that a sample's surprise may lie from the entropy."""


def vocabulary(subject: Subject) -> Problem | None:
    """The policy may choose exactly the tokens that the environment's tokenizer can name."""
    wide = subject.policy.action_space.n  # type: ignore[attr-defined]
    named = subject.objective.reference.vocab_size
    ours = subject.policy.core.vocab_size
    largest = int(subject.responses.max())
    if ours == wide == named and largest < named:
        return None
    return Problem(
        "vocabulary",
        f"the policy chooses among {ours} tokens, the environment takes {wide}, its tokenizer "
        f"names {named}; the largest id drawn was {largest}",
        "start the policy from the environment's reference; logits beyond the tokenizer's names "
        "are padding and must be dropped before the softmax (CausalLM.vocab_size)",
    )


def temperature(subject: Subject) -> Problem | None:
    """Policy and reference divide their logits by the same temperature."""
    ours, theirs = subject.policy.core.temperature, subject.objective.reference.temperature
    if ours == theirs:
        return None
    return Problem(
        "temperature",
        f"the policy's temperature is {ours}, the environment's {theirs}",
        "pass the environment's temperature to the policy (agents.sb3.vec_env.policy_kwargs does)",
    )


def mask(subject: Subject) -> Problem | None:
    """Policy and reference may choose the same tokens."""
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
    """The reference does not learn, and shares no weight with the policy (below adapters, all)."""
    reference, policy = subject.objective.reference.model, subject.policy
    adapted = policy.lora_rank > 0
    ours = {p.data_ptr() for p in policy.parameters() if p.requires_grad or not adapted}
    shared = sum(p.data_ptr() in ours for p in reference.parameters())
    learning = sum(p.requires_grad for p in reference.parameters())
    if not shared and not learning:
        return None
    return Problem(
        "frozen",
        f"{shared} of the reference's tensors are the policy's own, {learning} would learn",
        "load the policy's weights a second time; call requires_grad_(False) on the reference",
    )


def start(subject: Subject) -> Problem | None:
    """Before it has learned, the policy is the reference: KL = 0."""
    if not subject.fresh:
        return None
    reference = subject.objective.ref_log_probs(subject.sequences)
    gap = float((subject.log_probs - reference).abs().max())
    if gap <= subject.tolerance:
        return None
    return Problem(
        "start",
        f"the policy has not learned yet, but is {gap:.2g} nats from its reference",
        "start the policy from the environment's reference, at its temperature and revision",
    )


def dropout(subject: Subject) -> Problem | None:
    """Training mode computes what evaluation mode does."""
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
        "does)",
    )


def ratio(subject: Subject) -> Problem | None:
    """Before the first update, the update's log-probs are the rollout's: the ratio is 1."""
    with torch.enable_grad():
        now = subject.policy.evaluate_actions(subject.sequences, subject.sequences.chosen())[1]
    if subject.agrees(now.detach()):
        return None
    worst = float((now.detach() - subject.log_probs).exp().sub(1).abs().max())
    return Problem(
        "ratio",
        f"the first ratio π_θ/π_old is off by {worst:.2g}",
        "compute old and new log-probs by one function, in one precision, at one temperature",
    )


def recomputed(subject: Subject) -> Problem | None:
    """The score pass agrees with plain transformers, one unpadded row at a time."""
    core = subject.policy.core
    first = int(subject.sequences.lengths[0])
    row = subject.sequences.tokens[:1, : int(subject.sequences.starts[0]) + first]
    with torch.no_grad():
        logits = core.model(input_ids=row, use_cache=False).logits[0]
    logits = logits[-first - 1 : -1, : subject.objective.reference.vocab_size].float()
    logits = logits / subject.objective.reference.temperature
    limits = core.limits(subject.sequences.rows(slice(0, 1)))
    log_p = torch.log_softmax(core.mask.ban(logits, limits), -1)
    plain = log_p.gather(1, row[0, -first:, None])[:, 0]
    gap = float((plain - subject.log_probs[:first]).abs().max())
    if gap <= subject.tolerance:
        return None
    return Problem(
        "recomputed",
        f"the policy's log-probs are {gap:.2g} nats from those of a plain forward pass",
        "logits[t] score token t + 1; divide by the temperature; drop the padded vocabulary",
    )


def drawn_as_scored(subject: Subject) -> Problem | None:
    """Responses are drawn from the very distribution that the log-probs describe."""
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
    how = "likelier" if gap < 0 else "less likely"
    return Problem(
        "drawn as scored",
        f"the responses are {how} than chance allows under the policy's own log-probs "
        f"({abs(gap) / spread:.0f} standard errors)",
        "the sampler must not have a temperature, top-k, top-p or minimum length that the "
        "log-probs do not have",
    )


def decoding(subject: Subject) -> Problem | None:
    """What decoding keeps of each token, and the rollout stores, is what the update computes."""
    if not subject.policy.decoding_scores:
        return None  # the rollout takes a score pass
    kept = subject.sampled.log_probs[subject.responses != PAD]
    gap = float((kept - subject.log_probs).abs().max())
    if gap <= TOLERANCE:
        return None
    return Problem(
        "decoding",
        f"the log-probs that decoding keeps are {gap:.2g} nats from those of whole sequences",
        "look at what the model's attention or positions take from a row's length: decoding must "
        "leave such a model to full forwards (rlhf_gym.lm.architecture.has_full_attention)",
    )


def neighbours(subject: Subject) -> Problem | None:
    """A row's log-probs depend neither on the other rows nor on padding."""
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
        f"a response's log-prob changes by {gap:.2g} nats with its padding or its neighbours",
        "pad on the right, mask by length and never by pad_token_id or eos_token_id",
    )


def cache(subject: Subject) -> Problem | None:
    """Cached decoding is a full forward, also right after the weights have changed."""
    # Two columns more, for the tokens that are added below.
    observations = np.pad(subject.env.reset(seed=0)[0], ((0, 0), (0, 2)), constant_values=PAD)
    policy = subject.policy
    weights = [p for p in policy.lm.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in weights]
    worst = 0.0
    with torch.no_grad(), _unmasked(policy):
        try:
            for change in (False, False, True):  # a prefill, a step, a step by other weights
                if change:
                    for p in weights:
                        p.mul_(1.1)
                rows = torch.from_numpy(observations).to(policy.device)
                cached = policy.get_distribution(rows).log_p
                full = torch.log_softmax(policy.core.logits(_full(policy, rows)), -1)
                worst = max(worst, float((cached - full).abs().max()))
                if not change:
                    observations = append(observations, draw(full).cpu().numpy())
        finally:
            for p, before in zip(weights, kept, strict=True):
                p.copy_(before)
    if worst <= subject.tolerance:
        return None
    return Problem(
        "cache",
        f"cached decoding is {worst:.2g} nats from a full forward pass",
        "drop keys and values whenever a parameter changes "
        "(rlhf_gym.lm.decoding.decode_cache.DecodeCache does), and write each row at its own "
        "position",
    )


@contextmanager
def _unmasked(policy: CausalLMPolicy) -> Iterator[None]:
    # An observation does not say how long its response is, which a mask may ask.
    core, policy.core = policy.core, dataclasses.replace(policy.core, mask=NO_MASK)
    try:
        yield
    finally:
        policy.core = core


def _full(policy: CausalLMPolicy, rows: Tensor) -> Tensor:
    lengths = row_lengths(rows)
    hidden = policy.core.hidden_states(rows.clamp(min=0), use_cache=False)
    return hidden[torch.arange(len(rows), device=rows.device), lengths - 1]
