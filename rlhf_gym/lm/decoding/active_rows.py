"""Rows that decode together, by the model's method, and are dropped when they end."""

import torch
from torch import Tensor

from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import last_hidden
from rlhf_gym.lm.decoding.kv_slots import SlotDecoder
from rlhf_gym.lm.decoding.method import decoding_method, takes_graphs
from rlhf_gym.lm.decoding.own_cache import OwnCacheDecoder
from rlhf_gym.tokens import PAD, row_lengths

DROP_SHARE = 0.2
"""Dropping rows copies the cache, so it waits until this share of the rows has ended."""


class DecodingRows:
    """Rows that decode together, with a guide if the mask needs one.

    Args:
        lm: The model; if its mask follows a reference, the reference decodes the same rows.
        prompts: (N, P).
        max_new_tokens: Most tokens that a row gets.
    """

    def __init__(self, lm: CausalLM, prompts: Tensor, max_new_tokens: int) -> None:
        self._lm = lm
        self._guide = lm.guide if lm.guide is not None and lm.mask.follows_reference else lm
        models = dict.fromkeys((lm, self._guide))
        self._steppers = [_stepper(model, prompts, max_new_tokens) for model in models]

    @property
    def hidden(self) -> Tensor:
        """Last hidden states of the rows, (n, d); the next `advance` may overwrite them.

        Between `drop_ended` and `advance` they are still those of all rows.
        """
        return self._steppers[0].hidden

    def logits(self, taken: int) -> Tensor:
        """Logits of the next token, (n, V), in rows that have `taken` tokens already."""
        limits = None
        if not self._lm.mask.is_static:
            guiding = self._steppers[-1].hidden
            counts = torch.full((len(guiding),), taken, device=guiding.device)
            limits = self._guide.next_limits(guiding, counts)
        return self._lm.logits(self.hidden, limits)

    def advance(self, tokens: Tensor) -> None:
        """Append tokens (n,)."""
        for stepper in self._steppers:
            stepper.advance(tokens)

    def drop_ended(self, alive: Tensor) -> Tensor | slice:
        """Drop rows that have ended if they are enough; return the rows that remain."""
        n_alive = int(alive.sum())
        if not n_alive:
            return slice(0)
        room = max(stepper.room(n_alive) for stepper in self._steppers)
        if room > (1 - DROP_SHARE) * len(alive):
            return slice(None)
        # Live rows first; a graph has a fixed number of rows, so ended rows fill the rest.
        kept = (~alive).to(torch.uint8).argsort(stable=True)[:room]
        for stepper in self._steppers:
            stepper.keep(kept)
        return kept

    def release(self) -> None:
        """Return the slots."""
        for stepper in self._steppers:
            stepper.release()


def _stepper(lm: CausalLM, prompts: Tensor, max_new_tokens: int) -> "_Slotted | _OwnCache | _Full":
    method = decoding_method(lm, prompts.shape[1] + max_new_tokens)
    if lm.model.training or method == "full forwards":
        return _Full(lm, prompts)
    if method == "own cache":
        return _OwnCache(lm, prompts, max_new_tokens)
    return _Slotted(lm, prompts, max_new_tokens)


def _distinct(prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct prompts, and the place of each prompt among them.

    Rows with the same prompt share its prefill: group baselines and best-of-n sample one prompt
    many times, and a prefill costs as much as many steps.
    """
    distinct, places = torch.unique(prompts, dim=0, return_inverse=True)
    if len(distinct) == len(prompts):
        return prompts, torch.arange(len(prompts), device=prompts.device)
    return distinct, places


class _Slotted:
    """Decoding with keys and values in slots."""

    def __init__(self, lm: CausalLM, prompts: Tensor, max_new_tokens: int) -> None:
        distinct, places = _distinct(prompts)
        width = prompts.shape[1] + max_new_tokens
        fixed = takes_graphs(lm, width)
        rows = len(prompts if fixed else distinct)
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


class _OwnCache:
    """Decoding with the model's own cache."""

    def __init__(self, lm: CausalLM, prompts: Tensor, max_new_tokens: int) -> None:
        distinct, places = _distinct(prompts)
        self._decoder = OwnCacheDecoder(lm, distinct, prompts.shape[1] + max_new_tokens)
        self.hidden = self._decoder.hidden
        if len(distinct) < len(prompts):
            self._decoder.keep(places)
            self.hidden = self.hidden[places]

    def room(self, rows: int) -> int:
        return rows

    def release(self) -> None:
        pass

    def keep(self, rows: Tensor) -> None:
        self._decoder.keep(rows)

    def advance(self, tokens: Tensor) -> None:
        self.hidden = self._decoder.step(tokens)


class _Full:
    """Decoding by full forwards, for families that have no exact cache."""

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
