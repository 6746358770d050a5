"""Finished responses, as rewards and shaping functions see them. Notation: N rows."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf_gym.data.prompts import Prompt
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.tokens import PAD, Sequences


class Responses:
    """Responses to N prompts.

    Args:
        lm: The model that wrote them, or one with its tokenizer and EOS ids.
        sequences: As the attribute.
        ended: As the attribute; all, if None.
        stop_at_eos: Whether an EOS ends a response.
        chats: For prompts that were chat messages: the messages, by the prompt's ids.

    Attributes:
        sequences: Token ids; a row's chosen tokens are its whole response.
        stopped: (N,) bool, whether the response ended with an EOS (if not, with the budget).
        closed: (N,) bool, whether the last token is the EOS that ended it; False where a cut left
            out the end of a response that stopped.
        ended: (N,) bool, whether the response is complete; False while more tokens may follow.
        score_std: (N,) standard deviation of an ensemble's members once they have scored; None
            before, and without an ensemble.
    """

    def __init__(
        self,
        lm: CausalLM,
        sequences: Sequences,
        ended: Tensor | None = None,
        *,
        stop_at_eos: bool = True,
        chats: Mapping[tuple[int, ...], Prompt] | None = None,
    ) -> None:
        self._lm = lm
        self._chats = {} if chats is None else chats
        self.sequences = sequences
        self.ended = torch.ones_like(sequences.lengths) > 0 if ended is None else ended
        ends = (sequences.starts + sequences.lengths - 1).clamp(min=0)
        last = sequences.tokens.gather(1, ends[:, None])[:, 0]
        ends_it = torch.tensor(lm.eos_ids if stop_at_eos else [], device=last.device)
        self.stopped = self.closed = torch.isin(last, ends_it)
        self.score_std: Tensor | None = None

    @cached_property
    def prompts(self) -> list[str]:
        """N prompts as text."""
        tokens, starts, _ = (part.tolist() for part in self.sequences)
        return self._lm.texts([row[:s] for row, s in zip(tokens, starts, strict=True)])

    @cached_property
    def asked(self) -> list[Prompt]:
        """N prompts as their authors gave them: chat messages where they were a chat, else text."""
        if not self._chats:
            return list(self.prompts)
        tokens, starts, _ = (part.tolist() for part in self.sequences)
        rows = [tuple(row[:start]) for row, start in zip(tokens, starts, strict=True)]
        return [self._chats.get(*pair) for pair in zip(rows, self.prompts, strict=True)]

    def cut(self, kept: Tensor) -> "Responses":
        """The same responses, of which only the first `kept` (N,) tokens count.

        They stay finished or not: that is about the response, whatever part of it is scored.
        """
        tokens, starts, _ = self.sequences
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        inside = columns < (starts + kept)[:, None]
        part = Sequences(torch.where(inside, tokens, PAD), starts, kept)
        shorter = Responses(self._lm, part, self.ended, chats=self._chats)
        shorter.closed = shorter.closed & self.stopped
        shorter.stopped = self.stopped
        return shorter

    @cached_property
    def texts(self) -> list[str]:
        """N responses as text: the text that each adds to its prompt's.

        Some tokenizers (Llama's) drop a space at the beginning of a text. Decoded alone, a response
        would lose it, and its first word would join the prompt's last one.
        """
        tokens, starts, lengths = (part.tolist() for part in self.sequences)
        cut = list(zip(tokens, starts, lengths, strict=True))
        wholes = self._lm.texts([row[: s + n] for row, s, n in cut])
        found = zip(cut, self.prompts, wholes, strict=True)
        return [
            whole[len(prompt) :]
            if whole.startswith(prompt)
            else self._lm.texts([row[s : s + n]])[0]
            for (row, s, n), prompt, whole in found
        ]

    @property
    def finish_reasons(self) -> list[str]:
        """Why each ended: "stop" (an EOS) or "length" (the budget)."""
        return ["stop" if stopped else "length" for stopped in self.stopped.tolist()]


def observation_sequences(
    tokens: npt.NDArray[np.int64], prompt_lengths: npt.NDArray[np.int64]
) -> Sequences:
    """Observations (N, L) and the lengths of their prompts (N,), as sequences of responses."""
    lengths = (tokens != PAD).sum(1)
    return Sequences(
        torch.from_numpy(tokens),
        torch.from_numpy(prompt_lengths),
        torch.from_numpy(lengths - prompt_lengths),
    )
