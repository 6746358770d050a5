"""Which tokens may be chosen in a state, as lists of ids rather than (M, V) tables.

A mask belongs to the environment: policy and reference are masked alike, in sampling and in every
log-prob, so the objective and its optimum are those of the masked task. Notation: M states, V
usable tokens.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from rlhf_gym.errors import InputError
from rlhf_gym.tokens import PAD, pad_rows

# The logit of a token that may not be chosen. Its probability is exactly 0, but unlike -inf it
# leaves p · log p and differences of log-probs finite.
NEVER = -1e9

# Sampling and scoring add up the reference's states in different orders, so the edge of a top-k or
# top-p set may shift by one token between them. A chosen token within this distance of the edge (in
# nats, and in probability mass) counts as allowed. The distance covers float32's rounding only.
EDGE_NATS, EDGE_MASS = 1e-3, 1e-4


class Limits(NamedTuple):
    """What may be chosen in each of M states, besides what a mask allows nowhere.

    Attributes:
        only: (M, k) int64, the ids allowed in each state, padded with PAD; an empty list allows
            all. None if no state has such a list.
        no_eos: (M,) bool, True in states where the response may not end; None if it always may.
        barred: (M, j) int64, ids that are not allowed in each state, padded with PAD; None if
            there are none.
    """

    only: Tensor | None
    no_eos: Tensor | None
    barred: Tensor | None = None

    def rows(self, which: Tensor | slice) -> "Limits":
        """The limits of some of the states."""
        return Limits(*(None if part is None else part[which] for part in self))

    @staticmethod
    def joined(parts: list["Limits"]) -> "Limits":
        """Concatenate the limits of several groups of states."""
        no_eos = None
        if parts[0].no_eos is not None:
            no_eos = torch.cat([part.no_eos for part in parts if part.no_eos is not None])
        only, barred = (_joined([getattr(p, name) for p in parts]) for name in ("only", "barred"))
        return Limits(only, no_eos, barred)

    @staticmethod
    def of(lists: list[npt.NDArray[np.int64]], barred: list[bool]) -> "Limits":
        """Build limits from one list of ids per state.

        Args:
            lists: M lists of ids.
            barred: For each state, whether its ids are the forbidden ones (else the allowed ones).
        """
        none = np.zeros(0, dtype=np.int64)
        rows = list(zip(lists, barred, strict=True))
        only, never = (
            torch.from_numpy(pad_rows([ids if out == side else none for ids, out in rows]))
            for side in (False, True)
        )
        return Limits(only if only.shape[1] else None, None, never if never.shape[1] else None)

    def to(self, device: torch.device | str) -> "Limits":
        """The same limits on another device."""
        return Limits(*(None if part is None else part.to(device) for part in self))


def _joined(lists: list[Tensor | None]) -> Tensor | None:
    """Concatenate lists of ids of several groups of states."""
    there = [ids for ids in lists if ids is not None]
    if not there:
        return None
    k = max(ids.shape[1] for ids in there)
    return torch.cat([F.pad(ids, (0, k - ids.shape[1]), value=PAD) for ids in there])


@dataclass(frozen=True)
class Mask:
    """A rule for the tokens that may be chosen.

    Attributes:
        never: Ids that are never allowed.
        eos_ids: The ids that end a response, for `min_new_tokens`.
        min_new_tokens: The first `min_new_tokens` tokens of a response cannot be an EOS.
        top_k: Only the reference's k likeliest tokens of a state; None for all.
        top_p: Only the reference's likeliest tokens up to this probability mass, including the
            token that reaches it; None for all. Applied after `top_k` if both are given.

    Raises:
        InputError: An option is out of range.
    """

    never: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    top_k: int | None = None
    top_p: float | None = None
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.min_new_tokens < 0:
            raise InputError(f"min_new_tokens must be at least 0, not {self.min_new_tokens}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def follows_reference(self) -> bool:
        """Whether the allowed tokens depend on the reference's probabilities."""
        return self.top_k is not None or self.top_p is not None

    @property
    def is_static(self) -> bool:
        """Whether the same tokens are allowed in every state."""
        return not self.follows_reference and not self.min_new_tokens

    def __bool__(self) -> bool:
        return bool(self.never) or not self.is_static

    def ban(self, logits: Tensor, limits: Limits | None = None) -> Tensor:
        """Write `NEVER` over the logits of forbidden tokens, in place: (M, V), and return them."""
        never, eos = self._ids(logits.device)
        if self.never:
            logits.index_fill_(-1, never, NEVER)
        if limits is not None and limits.no_eos is not None:
            here = limits.no_eos.nonzero()[:, 0]
            logits[here[:, None], eos] = NEVER
        if limits is not None and limits.only is not None:
            # PAD = −1 modulo width is the last of V + 1 columns, which is dropped again.
            width = logits.shape[-1] + 1
            within = torch.zeros(len(logits), width, dtype=torch.bool, device=logits.device)
            within.scatter_(1, limits.only % width, True)
            within |= limits.only[:, :1] == PAD
            logits.masked_fill_(~within[:, :-1], NEVER)
        if limits is not None and limits.barred is not None:
            width = logits.shape[-1] + 1
            out = torch.zeros(len(logits), width, dtype=torch.bool, device=logits.device)
            logits.masked_fill_(out.scatter_(1, limits.barred % width, True)[:, :-1], NEVER)
        return logits

    def limits(
        self, taken: Tensor, reference_logits: Tensor | None = None, chosen: Tensor | None = None
    ) -> Limits | None:
        """What may be chosen in M states.

        Args:
            taken: (M,) number of tokens that the response has already.
            reference_logits: (M, V) the reference's tempered logits; needed, and overwritten, if
                the mask follows the reference.
            chosen: (M,) the token that was chosen there; at the edge of the set it counts as
                allowed.

        Returns:
            The limits; None if the mask is static.
        """
        if self.is_static:
            return None
        no_eos = taken < self.min_new_tokens if self.min_new_tokens else None
        if not self.follows_reference:
            return Limits(None, no_eos)
        assert reference_logits is not None
        # Ban first, so the k likeliest tokens are taken from those that are allowed at all.
        logits = self.ban(reference_logits, Limits(None, no_eos))
        return Limits(self._likeliest(logits, chosen), no_eos)

    def _likeliest(self, logits: Tensor, chosen: Tensor | None) -> Tensor:
        values, ids = self._candidates(logits)
        kept = values > NEVER / 2
        spared = torch.zeros_like(kept)
        if self.top_p is not None:
            total = values.logsumexp(-1) if self.top_k else logits.logsumexp(-1)
            p = (values - total[:, None]).exp()
            before = p.cumsum(-1) - p
            spared = kept & (before < self.top_p + EDGE_MASS)
            kept &= before < self.top_p
        only = ids.masked_fill(~kept, PAD)[:, : int(kept.sum(-1).max())]
        if chosen is None:
            return only
        edge = values.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
        here = chosen[:, None]
        near = (logits.gather(1, here) >= edge - EDGE_NATS) | (spared & (ids == here)).any(1, True)
        near &= (only != here).all(1, keepdim=True)
        if not near.any():
            return only
        return torch.cat([only, torch.where(near, here, PAD)], 1)

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and ids of enough tokens of each state, likeliest first: two (M, k)."""
        width = logits.shape[-1]
        if self.top_k is not None:
            return tuple(logits.topk(min(self.top_k, width)))  # type: ignore[return-value]
        assert self.top_p is not None
        # A few hundred tokens usually have nearly all of the mass; a full sort is rarely needed.
        k, total = 256, logits.logsumexp(-1)
        while True:
            values, ids = logits.topk(min(k, width))
            if k >= width or bool((values.logsumexp(-1) - total >= math.log(self.top_p)).all()):
                return values, ids
            k *= 8

    def _ids(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = (
                torch.tensor(self.never, dtype=torch.int64, device=device),
                torch.tensor(self.eos_ids, dtype=torch.int64, device=device),
            )
        return self._on[device]


NO_MASK = Mask()


def make_mask(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    *,
    max_new_tokens: int,
    stop_at_eos: bool = True,
    min_new_tokens: int = 0,
    decodable_only: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Mask:
    """The mask of an environment with these keywords.

    Args:
        tokenizer: The tokenizer that actions belong to.
        vocab_size: V.
        eos_ids: The ids that end a response.
        max_new_tokens: Token budget; an equal `min_new_tokens` forbids the EOS everywhere.
        stop_at_eos: Whether an EOS ends a response; if not, it is an ordinary token.
        min_new_tokens: As in `Mask`.
        decodable_only: Allow only the EOS and tokens that are text by themselves: no other special
            tokens, no parts of a character.
        top_k: As in `Mask`.
        top_p: As in `Mask`.

    Raises:
        InputError: An option is out of range, or no token is left to choose.
    """
    ends = tuple(i for i in eos_ids if i < vocab_size)
    never: set[int] = set()
    if decodable_only:
        never = set(range(vocab_size)) - set(decodable(tokenizer, vocab_size))
        never = never - set(ends) if stop_at_eos else never | set(ends)
    if min_new_tokens and not stop_at_eos:
        raise InputError(
            "min_new_tokens has no effect if no EOS ends a response; drop one of the two"
        )
    if min_new_tokens > max_new_tokens:
        raise InputError(f"min_new_tokens = {min_new_tokens} is above {max_new_tokens=}")
    if min_new_tokens == max_new_tokens:
        never, min_new_tokens = never | set(ends), 0
    if len(never | set(ends)) == vocab_size:
        raise InputError("the mask leaves no token but the EOS; allow more")
    mask = Mask(tuple(sorted(never)), ends, min_new_tokens, top_k, top_p)
    return mask if mask else NO_MASK


def decodable(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The ids below `vocab_size` that decode alone to one or more whole characters."""
    texts = tokenizer.batch_decode([[i] for i in range(vocab_size)], skip_special_tokens=True)
    return [i for i, text in enumerate(texts) if text and "\ufffd" not in text]
