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
    """Tokens between two checks of how many rows are left; on a GPU each check waits for it."""
    return 1 if device.type == "cpu" else 8


class Sampled(NamedTuple):
    """Responses, with the log-probs and values that decoding computed on the way.

    They equal those of a pass over whole sequences up to rounding (1e-5 in float32).

    Attributes:
        responses: (N, T) int64, PAD after each response's end.
        log_probs: (N, T) float32 of the tokens; 0 after the end.
        values: (N, T) float32 of the value head; 0 after the end, and without a head.
    """

    responses: Tensor
    log_probs: Tensor
    values: Tensor


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row from tempered logits: (N, V) -> (N,) int64."""
    return _drawn(torch.softmax(logits, -1), generator)


def _drawn(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row: (N, V) -> (N,)."""
    find = _exponential_race if probabilities.is_cuda else _inverse_cdf
    return find(probabilities, generator)


def _exponential_race(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """The token with the shortest exponential waiting time, whose rate is its probability.

    Three operations. The inverse CDF takes seven; and a GPU's parallel sum is not monotone: by
    rounding it may rise at a token of probability 0, which could then be drawn.
    """
    # In float32 the shortest waits would be rounded to 2⁻²⁴, and tokens as rare as that would
    # hardly ever be drawn.
    waits = torch.empty_like(probabilities, dtype=torch.float64).exponential_(generator=generator)
    return torch.div(probabilities.detach(), waits, out=waits).argmax(-1)


def _inverse_cdf(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """The token whose interval of the cumulative sum contains a uniform point.

    One random number per row; V exponential ones would cost a CPU a third of a decoding step.
    """
    edges = probabilities.cumsum(-1)
    uniform = torch.rand(len(edges), 1, generator=generator, device=edges.device)
    # Take the first token whose right edge is beyond the point: never one of probability 0. The
    # point is kept below the end, where rounding could put it and no edge is beyond.
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
    """Draw one response per row: only the responses of `sample_with_log_probs`, (N, T)."""
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
    """Draw one response per row, and keep the log-prob and the value of each token.

    Args:
        lm: Model and temperature.
        prompts: (N, P) int64, right-padded, on the model's device.
        max_new_tokens: T, the token budget.
        stop_at_eos: Whether an EOS id ends a response (the EOS is part of the response).
        deterministic: Take the likeliest token instead of drawing one.
        generator: Source of randomness on the model's device; torch's global one if None.
        value_head: From last hidden states (N, d) to values (N, 1), in a new tensor.

    Returns:
        The responses, (N, T) int64 with PAD after each end, their log-probs and values.
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
    tokens = rows = torch.arange(
        len(prompts), device=prompts.device
    )  # the output row of each live slot
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    decoding = DecodingRows(lm, prompts, max_new_tokens)
    every = look_every(prompts.device) if stop_at_eos else max(max_new_tokens, 1)
    for begin in range(0, max_new_tokens, every):
        end = min(begin + every, max_new_tokens)
        # Results are written to the grids once per block: the fewer operations a step has, the less
        # a GPU waits for the host.
        steps = []
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
        # Without a value head there are two parts, so not strict.
        for grid, part in zip((out, chosen_with, values), zip(*steps, strict=True), strict=False):
            grid[rows, begin:end] = torch.stack(part, 1).to(grid.dtype)
        if end < max_new_tokens:
            alive &= ~torch.isin(out[rows, begin:end], eos).any(1)
            kept = decoding.drop_ended(alive)
            rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
            if not len(rows):
                break
    decoding.release()
    # Rows that ended were decoded on until they were dropped: remove what comes after their EOS.
    ends = torch.isin(out, eos)
    unused = out.masked_fill_(ends.cumsum(1) > ends.long(), PAD) == PAD
    log_probs = chosen_with.log().masked_fill_(unused, 0.0)
    return Sampled(out, log_probs, values.masked_fill_(unused, 0.0))
