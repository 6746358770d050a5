"""Whole responses drawn from a causal LM."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_gym.decode import last_hidden, supports_slots, takes_graphs
from rlhf_gym.lm import CausalLM
from rlhf_gym.precision import casts_kept
from rlhf_gym.slots import SlotDecoder
from rlhf_gym.tokens import PAD, row_lengths

# Dropping finished rows copies the cache, so it waits until this share of them is done.
DROP_SHARE = 0.2


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
    """One token a row, (N, V) -> (N,).

    One uniform number a row and a running sum of the probabilities; the usual V exponential
    variables a row would cost a third of a decode step.
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
        value_head: From last hidden states (N, d) to values (N, 1), to be kept too.

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
    log_probs, values = torch.zeros(2, *out.shape, device=prompts.device)
    eos = torch.tensor(lm.eos_ids if stop_at_eos else [], dtype=torch.int64, device=prompts.device)
    rows = torch.arange(len(prompts), device=prompts.device)  # where each live slot writes to
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    guide = lm.guide if lm.guide is not None and lm.mask.follows_reference else lm
    # A guide decodes along, to say which tokens may be chosen.
    steppers = [_stepper(model, prompts, max_new_tokens) for model in dict.fromkeys((lm, guide))]
    every = look_every(prompts.device) if stop_at_eos else max_new_tokens
    for t in range(max_new_tokens):
        taken = torch.full_like(rows, t)
        logits = lm.logits(steppers[0].hidden, guide.next_limits(steppers[-1].hidden, taken))
        probabilities = torch.softmax(logits, -1)
        tokens = logits.argmax(-1) if deterministic else _drawn(probabilities, generator)
        taken_with = probabilities.gather(-1, tokens[:, None]).squeeze(-1).log().float()
        # PAD in rows that have ended: to pick the others out would wait for the device.
        out[rows, t] = torch.where(alive, tokens, PAD)
        log_probs[rows, t] = torch.where(alive, taken_with, 0.0)
        if value_head is not None:
            value = value_head(steppers[0].hidden).squeeze(-1).float()
            values[rows, t] = torch.where(alive, value, 0.0)
        if t == max_new_tokens - 1:
            break
        if stop_at_eos:
            alive &= ~torch.isin(tokens, eos)
        if (t + 1) % every == 0:
            kept = _drop_ended(alive, steppers)
            rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
            if not len(rows):
                break
        for stepper in steppers:
            stepper.advance(tokens)
    for stepper in steppers:
        stepper.release()
    return Sampled(out, log_probs, values)


def _drop_ended(alive: Tensor, steppers: "list[_Slotted | _Full]") -> Tensor | slice:
    """Drop rows that have ended, where there are enough of them; the rows to go on with."""
    n_alive = int(alive.sum())
    if not n_alive:
        return slice(0)
    room = max(stepper.room(n_alive) for stepper in steppers)
    if room > (1 - DROP_SHARE) * len(alive):
        return slice(None)
    # Those that live first; graphs take some that have ended to fill up.
    kept = (~alive).to(torch.uint8).argsort(stable=True)[:room]
    for stepper in steppers:
        stepper.keep(kept)
    return kept


def _stepper(lm: CausalLM, prompts: Tensor, max_new_tokens: int) -> "_Slotted | _Full":
    if lm.model.training or not supports_slots(lm):
        return _Full(lm, prompts)
    return _Slotted(lm, prompts, max_new_tokens)


class _Slotted:
    """Decoding with keys and values in slots."""

    def __init__(self, lm: CausalLM, prompts: Tensor, max_new_tokens: int) -> None:
        # Rows with the same prompt share its prefill.
        distinct, places = torch.unique(prompts, dim=0, return_inverse=True)
        if len(distinct) == len(prompts):
            distinct, places = prompts, torch.arange(len(prompts), device=prompts.device)
        fixed = takes_graphs(lm)
        rows, width = len(prompts if fixed else distinct), prompts.shape[1] + max_new_tokens
        self._decoder = SlotDecoder(lm, rows, width, fixed=fixed)
        self._positions = row_lengths(prompts)
        self._last = int(self._positions.max())
        every = torch.arange(len(distinct), device=prompts.device)
        self.hidden = self._decoder.prefill(every, distinct)
        if len(distinct) < len(prompts):
            self._decoder.keep(places)
            self.hidden = self.hidden[places]

    def room(self, rows: int) -> int:
        return self._decoder.room(rows)

    def release(self) -> None:
        self._decoder.release()

    def keep(self, rows: Tensor) -> None:
        self._decoder.keep(rows)
        self._positions = self._positions[rows]
        self._last = int(self._positions.max())

    def advance(self, tokens: Tensor) -> None:
        self.hidden = self._decoder.step(tokens, self._positions, self._last)
        self._positions, self._last = self._positions + 1, self._last + 1


class _Full:
    """The same by full forwards, for families that slots cannot serve."""

    def __init__(self, lm: CausalLM, prompts: Tensor) -> None:
        self._lm, self._tokens = lm, prompts
        self.hidden = last_hidden(lm, prompts)

    def room(self, rows: int) -> int:
        return rows

    def release(self) -> None:
        pass

    def keep(self, rows: Tensor) -> None:
        self._tokens = self._tokens[rows]

    def advance(self, tokens: Tensor) -> None:
        grown = torch.nn.functional.pad(self._tokens, (0, 1), value=PAD)
        grown[torch.arange(len(tokens), device=tokens.device), row_lengths(self._tokens)] = tokens
        self._tokens = grown
        self.hidden = last_hidden(self._lm, grown)
