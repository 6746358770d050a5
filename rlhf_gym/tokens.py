"""Rows of token ids of different lengths: the only module that knows about padding.

Notation: N rows, L columns, M chosen tokens over all rows. A row is padded on the right with
``PAD``, which is no token's id, so a mask never has to be guessed from `pad_token_id` or
`eos_token_id` (in GPT-2 these two are one id).
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Not a token id on purpose. In GPT-2 pad and EOS are one id, and any real id can be sampled: a mask
# derived from a real id would lose tokens.
PAD = -1

TokenArray = TypeVar("TokenArray", npt.NDArray[np.int64], Tensor)


class Sequences(NamedTuple):
    """Whole sequences; in each, an agent chose a contiguous run of tokens.

    The chosen tokens of row i are ``tokens[i, starts[i] : starts[i] + lengths[i]]``. The state in
    which a token was chosen is everything to its left. Quantities per chosen token are flat tensors
    of shape (M,), row after row.

    Attributes:
        tokens: (N, L) int64, right-padded with PAD.
        starts: (N,) int64, column of the first chosen token, at least 1.
        lengths: (N,) int64, number of chosen tokens, M = lengths.sum().
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor

    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and column of every chosen token, each (M,) int64, row after row."""
        rows = torch.repeat_interleave(self.lengths)
        first = torch.cumsum(self.lengths, 0) - self.lengths
        within = torch.arange(len(rows), device=rows.device) - first[rows]
        return rows, self.starts[rows] + within

    def chosen(self) -> Tensor:
        """The chosen tokens, (M,) int64."""
        return self.tokens[self.cells()]

    def rows(self, which: Tensor | slice) -> "Sequences":
        """The sequences at `which` (an index or a slice of rows)."""
        return Sequences(self.tokens[which], self.starts[which], self.lengths[which])

    def to(self, device: torch.device | str) -> "Sequences":
        """The same sequences on another device."""
        return Sequences(*(part.to(device) for part in self))

    @property
    def width(self) -> int:
        """Number of columns up to the last chosen token."""
        return int((self.starts + self.lengths).max()) if len(self.tokens) else 0


def row_lengths(tokens: TokenArray) -> TokenArray:
    """Number of real tokens of each row: (N, L) -> (N,)."""
    return (tokens != PAD).sum(-1)  # type: ignore[no-any-return]


def pad_rows(
    rows: Sequence[Sequence[int] | npt.NDArray[np.int64]], width: int | None = None
) -> npt.NDArray[np.int64]:
    """Ragged lists of ids as one (N, width) int64 array, right-padded with PAD.

    Args:
        rows: N lists of token ids.
        width: Number of columns; the longest row's length if None.

    Raises:
        ValueError: A row is longer than `width`.
    """
    longest = max(map(len, rows), default=0)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a row of {longest} tokens does not fit into {width} columns")
    out = np.full((len(rows), width), PAD, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def append(tokens: npt.NDArray[np.int64], new: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A new (N, L) copy of `tokens` with `new` (N,) written after the last real token."""
    out = tokens.copy()
    out[np.arange(len(out)), row_lengths(tokens)] = new
    return out


def join(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of `left` (N, A) continued by rows of `right` (N, B): (N, A + B), padding at the end."""
    both = np.concatenate([left, right], axis=1)
    order = np.argsort(both == PAD, axis=1, kind="stable")
    return np.take_along_axis(both, order, axis=1)


def longest_extensions(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each row, the index of a longest row that it is a prefix of: (N, L) -> (N,).

    The states of one response, each a token longer, all get the index of the last of them.
    """
    # PAD is below every id, so in lexicographic order a prefix comes right before its extensions.
    order = np.lexsort(tokens.T[::-1])
    rows = tokens[order]
    begins = ((rows[:-1] == rows[1:]) | (rows[:-1] == PAD)).all(1)
    last = np.where(np.append(begins, False), len(rows), np.arange(len(rows)))
    last = np.minimum.accumulate(last[::-1])[::-1]
    found = np.empty_like(order)
    found[order] = order[last]
    return found


def continuations(prompts: Tensor, responses: Tensor) -> Sequences:
    """Prompts (N, P) and the responses (N, T) chosen after them, both right-padded."""
    tokens = torch.from_numpy(join(prompts.cpu().numpy(), responses.cpu().numpy()))
    return Sequences(
        tokens.to(prompts.device), row_lengths(prompts), row_lengths(responses).to(prompts.device)
    )


def unflatten(flat: Tensor, lengths: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """Flat (M,) quantities as an (N, width) grid, with `fill` after each row's end."""
    grid = flat.new_full((len(lengths), width), fill)
    mask = torch.arange(width, device=flat.device) < lengths[:, None]
    grid[mask] = flat
    return grid


def row_sums(flat: Tensor, lengths: Tensor) -> Tensor:
    """Sum of flat (M,) quantities over each row, (N,), in float64 so that order does not matter."""
    rows = torch.repeat_interleave(lengths)
    out = torch.zeros(len(lengths), dtype=torch.float64, device=flat.device)
    return out.index_add_(0, rows, flat.double())


def model_ids(tokens: Tensor) -> Tensor:
    """Ids that a model can embed: padding is replaced by id 0.

    Causal attention never looks right, so the ids after a row's end cannot change its tokens. With
    padding on the left they would, and positions would shift.
    """
    return tokens.clamp(min=0)
