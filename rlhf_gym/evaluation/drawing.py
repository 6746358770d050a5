"""Draw a model's responses to prompts, and measure each response.

Notation: P prompts, n responses to each.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.causal_lm import CausalLM, kl_to
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.functions import TextReward, judged_by
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tokens import PAD, Sequences, continuations, pad_rows, row_sums
from rlhf_gym.utils.arrays import Floats

ROWS_PER_PASS = 512

DISTINCT_RESPONSES = 16
"""Responses per prompt in which distinct n-grams are counted.

The share of distinct n-grams falls with the number of responses, so this number is fixed.
"""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Responses of one model to P prompts, and measurements of each; arrays are (P, n).

    Attributes:
        prompts: P prompts as text.
        texts: P lists of n responses.
        scores: Score R(x, y) of the response.
        gold: Gold score of the response; None without a gold scorer.
        kl: Sum over the response of the exact KL(π ‖ π_ref) in each state, nats. 0 if the sampler
            is not the policy.
        log_ratio: log π(y | x) − log π_ref(y | x), where π is the policy evaluated, also if the
            sampler is the reference.
        ref_log_prob: log π_ref(y | x).
        lengths: Number of tokens in the response.
        stopped: 1 if the response ended with an EOS, else 0.
        distinct: (P, 2) share of distinct 1- and 2-grams in the first `DISTINCT_RESPONSES`
            responses to the prompt.
    """

    prompts: list[str]
    texts: list[list[str]]
    scores: Floats
    gold: Floats | None
    kl: Floats
    log_ratio: Floats
    ref_log_prob: Floats
    lengths: Floats
    stopped: Floats
    distinct: Floats


def draw_responses(
    sampler: CausalLM,
    policy: CausalLM,
    objective: Objective,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    max_new_tokens: int,
    stop_at_eos: bool = True,
    gold: TextReward | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Drawn:
    """Draw n responses to each prompt from `sampler` and measure them against `policy`.

    Args:
        sampler: The model that responds: the policy or the reference.
        policy: The policy evaluated, for `log_ratio` (and for `kl` if it is the sampler).
        objective: Reward, reference and β.
        prompts: P prompts as token ids.
        n: Responses to each prompt.
        max_new_tokens: Token budget of a response.
        stop_at_eos: Whether an EOS ends a response.
        gold: Gold scorer; None for no gold scores.
        generator: Source of randomness.
        progress: Called after each batch with its number of responses.
    """
    per_pass = max(1, ROWS_PER_PASS // n)
    parts = []
    for at in range(0, len(prompts), per_pass):
        some = prompts[at : at + per_pass]
        rows = torch.from_numpy(pad_rows([p for p in some for _ in range(n)])).to(sampler.device)
        replies = sample_responses(
            sampler, rows, max_new_tokens, stop_at_eos=stop_at_eos, generator=generator
        )
        sequences = continuations(rows, replies)
        parts.append(_measure(sampler, policy, objective, sequences, n, gold, stop_at_eos))
        if progress is not None:
            progress(len(rows))
    return _concatenate(parts)


@torch.no_grad()
def _measure(
    sampler: CausalLM,
    policy: CausalLM,
    objective: Objective,
    sequences: Sequences,
    n: int,
    gold: TextReward | None,
    stop_at_eos: bool,
) -> Drawn:
    reference = objective.reference
    responses = Responses(reference, sequences, stop_at_eos=stop_at_eos, chats=objective.chats)
    kl = torch.zeros(int(sequences.lengths.sum()), device=reference.device)
    log_ratio, ref_log_prob = torch.zeros_like(kl), torch.zeros_like(kl)
    for part, places in passes(reference.model, sequences):
        at_ref, at_policy, chosen = reference.states(part), policy.states(part), part.chosen()
        limits = reference.limits(part, at_ref)
        ref_log_prob[places] = reference.log_probs_of(at_ref, chosen, limits)
        log_ratio[places] = policy.log_probs_of(at_policy, chosen, limits) - ref_log_prob[places]
        if sampler is policy:
            kl[places] = kl_to(at_policy, policy, at_ref, reference, limits)

    def per_prompt(flat: torch.Tensor) -> Floats:
        sums: Floats = row_sums(flat, sequences.lengths).cpu().numpy().reshape(-1, n)
        return sums

    texts, prompts = responses.texts, responses.prompts
    golden = None if gold is None else judged_by(gold, responses).reshape(-1, n)
    replies = [row[row != PAD] for row in _reply_ids(sequences)]
    groups = [replies[i : i + min(n, DISTINCT_RESPONSES)] for i in range(0, len(replies), n)]
    return Drawn(
        prompts=prompts[::n],
        texts=[texts[i : i + n] for i in range(0, len(texts), n)],
        scores=objective.scores(responses).double().cpu().numpy().reshape(-1, n),
        gold=golden,
        kl=per_prompt(kl),
        log_ratio=per_prompt(log_ratio),
        ref_log_prob=per_prompt(ref_log_prob),
        lengths=sequences.lengths.double().cpu().numpy().reshape(-1, n),
        stopped=responses.stopped.double().cpu().numpy().reshape(-1, n),
        distinct=np.array([[distinct_n(group, k) for k in (1, 2)] for group in groups]),
    )


def _reply_ids(sequences: Sequences) -> list[npt.NDArray[np.int64]]:
    tokens, starts, lengths = (part.cpu().numpy() for part in sequences)
    return [row[s : s + k] for row, s, k in zip(tokens, starts, lengths, strict=True)]


def distinct_n(replies: Sequence[npt.NDArray[np.int64]], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams of some responses (Li et al. 2016)."""
    grams = [tuple(row[i : i + n].tolist()) for row in replies for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _concatenate(parts: list[Drawn]) -> Drawn:
    whole: dict[str, Any] = {}
    for field in dataclasses.fields(Drawn):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], list):
            whole[field.name] = [item for value in values for item in value]
        else:
            whole[field.name] = None if values[0] is None else np.concatenate(values)
    return Drawn(**whole)
