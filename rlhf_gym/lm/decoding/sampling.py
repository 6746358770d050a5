"""Whole responses drawn from a causal LM."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.active_rows import DecodingRows
from rlhf_gym.lm.precision import casts_kept
from rlhf_gym.tokens import PAD


def look_every(device: torch.device) -> int:
    """Tokens between two looks at how many rows are left: the host waits for a GPU to tell."""
    return 1 if device.type == "cpu" else 8


class Sampled(NamedTuple):
    """Responses, and what decoding knew of each token's state.

    It is what a pass over whole sequences says, up to rounding: 1e-5 in float32.

    Attributes:
        responses: (N, T) int64, PAD after each response's end.
        log_probs: (N, T) float32, of the tokens; 0 after the end.
        values: (N, T) float32, the value head's; 0 after the end, and without a head.
    """

    responses: Tensor
    log_probs: Tensor
    values: Tensor


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token a row from tempered logits: (N, V) -> (N,) int64."""
    return _drawn(torch.softmax(logits, -1), generator)


def _drawn(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row, (N, V) -> (N,)."""
    find = _exponential_race if probabilities.is_cuda else _inverse_cdf
    return find(probabilities, generator)


def _exponential_race(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """The token that comes first, where each comes after an exponential time of its own rate.

    Three operations. A running sum takes seven, and on a GPU, which adds in an order of its own, it
    may rise by rounding at a token of probability 0.
    """
    # In float32 the shortest waits are rounded to 2⁻²⁴, and what is as rare would hardly be drawn.
    waits = torch.empty_like(probabilities, dtype=torch.float64).exponential_(generator=generator)
    return torch.div(probabilities.detach(), waits, out=waits).argmax(-1)


def _inverse_cdf(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """The token in whose part of the running sum a uniform point lies.

    One random number a row; V exponential ones would cost a CPU a third of a decoding step.
    """
    edges = probabilities.cumsum(-1)
    uniform = torch.rand(len(edges), 1, generator=generator, device=edges.device)
    # The first token whose right edge lies beyond the point, so none of probability 0; rounding
    # must not carry the point to the end itself.
    end = edges[:, -1:]
    point = torch.minimum(uniform * end, torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(edges, point, right=True).squeeze(-1)


def sample_responses(
    lm: CausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    stop_at_eos: bool = True,
    deterministic: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one response a row: the responses of `sample_with_log_probs` alone, (N, T)."""
    return sample_with_log_probs(
        lm,
        prompts,
        max_new_tokens,
        stop_at_eos=stop_at_eos,
        deterministic=deterministic,
        generator=generator,
    ).responses


@torch.no_grad()
def sample_with_log_probs(
    lm: CausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    stop_at_eos: bool = True,
    deterministic: bool = False,
    generator: torch.Generator | None = None,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> Sampled:
    """Draw one response a row, and keep the log-prob and the value of each token.

    Args:
        lm: Model and temperature.
        prompts: (N, P) int64, right-padded; on the model's device.
        max_new_tokens: T, the token budget.
        stop_at_eos: Whether an EOS id ends a response (it is part of it).
        deterministic: Take the likeliest token instead of drawing one.
        generator: Source of randomness on the model's device; torch's global one if None.
        value_head: From last hidden states (N, d) to values (N, 1) in a tensor of their own, to be
            kept too.

    Returns:
        The responses, (N, T) int64 with PAD after each one's end, their log-probs and values.
    """
    with casts_kept(lm.device, lm.precision):
        lm = replace(lm, reuse_casts=True)
        return _sample(
            lm, prompts, max_new_tokens, stop_at_eos, deterministic, generator, value_head
        )


def _sample(
    lm: CausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    stop_at_eos: bool,
    deterministic: bool,
    generator: torch.Generator | None,
    value_head: Callable[[Tensor], Tensor] | None,
) -> Sampled:
    out = torch.full((len(prompts), max_new_tokens), PAD, device=prompts.device)
    chosen_with, values = torch.zeros(2, *out.shape, device=prompts.device)
    eos = torch.tensor(lm.eos_ids if stop_at_eos else [], dtype=torch.int64, device=prompts.device)
    tokens = rows = torch.arange(len(prompts), device=prompts.device)  # where a live slot writes to
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    decoding = DecodingRows(lm, prompts, max_new_tokens)
    every = look_every(prompts.device) if stop_at_eos else max(max_new_tokens, 1)
    for begin in range(0, max_new_tokens, every):
        end = min(begin + every, max_new_tokens)
        steps = []  # until the next look; the fewer operations a step has, the less a GPU waits
        for t in range(begin, end):
            if t > 0:
                decoding.advance(tokens)
            logits = decoding.logits(t)
            probabilities = torch.softmax(logits, -1)
            tokens = logits.argmax(-1) if deterministic else _drawn(probabilities, generator)
            found = [tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1)]
            if value_head is not None:
                found.append(value_head(decoding.hidden).squeeze(-1))
            steps.append(found)
        # Without a value head there are two parts.
        for grid, part in zip((out, chosen_with, values), zip(*steps, strict=True), strict=False):
            grid[rows, begin:end] = torch.stack(part, 1).to(grid.dtype)
        if end < max_new_tokens:
            alive &= ~torch.isin(out[rows, begin:end], eos).any(1)
            kept = decoding.drop_ended(alive)
            rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
            if not len(rows):
                break
    decoding.release()
    # Rows that ended went on until they were dropped.
    ends = torch.isin(out, eos)
    unused = out.masked_fill_(ends.cumsum(1) > ends.long(), PAD) == PAD
    log_probs = chosen_with.log().masked_fill_(unused, 0.0)
    return Sampled(out, log_probs, values.masked_fill_(unused, 0.0))
