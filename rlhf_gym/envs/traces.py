"""Follow N conversations for rendering, from each prompt to the end of its response."""

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_gym.envs.render import Trace, as_image, as_text
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.utils.arrays import Bools, Ints

RENDER_FPS = 8
"""Frames per second of a video; each frame is one token."""

Frame = str | npt.NDArray[np.uint8]


class RowTraces:
    """What each row's conversation shows so far.

    Args:
        reference: The reference, whose tokenizer turns ids into text.
        num_envs: N, number of rows.
    """

    def __init__(self, reference: CausalLM, num_envs: int) -> None:
        self._reference = reference
        self._ids: list[list[int]] = [[] for _ in range(num_envs)]
        self.rows = [Trace("") for _ in range(num_envs)]

    def start(self, rows: Bools, prompts: list[tuple[int, ...]]) -> None:
        """Start the rows of the mask (N,) with these prompts, one for each of them."""
        texts = self._reference.texts([list(prompt) for prompt in prompts])
        for i, text in zip(np.flatnonzero(rows).tolist(), texts, strict=True):
            self._ids[i], self.rows[i] = [], Trace(text)

    def add(self, actions: Ints, going: Bools, infos: dict[str, Any]) -> None:
        """Append the tokens (N,) of the rows that go on; `infos` are those of the same step."""
        chosen = np.flatnonzero(going).tolist()
        for i in chosen:
            self._ids[i].append(int(actions[i]))
        whole = [self._ids[i] for i in chosen]
        # A token decoded alone loses spaces or is part of a character, so show what it adds to the
        # decoded text.
        texts = self._reference.tokenizer.batch_decode([*whole, *([ids[-1]] for ids in whole)])
        scored = infos.get("_score", np.zeros_like(going))
        for i, text, alone in zip(chosen, texts[: len(chosen)], texts[len(chosen) :], strict=True):
            trace = self.rows[i]
            shown = "".join(trace.tokens)
            if not scored[i]:  # the last character may be incomplete: show it once it is whole
                text = text.rstrip("\ufffd")
            bound = bool(infos["actor_bound"][i])
            ratio = float(infos["kl" if bound else "ref_log_prob"][i])
            trace.add(text[len(shown) :] if text.startswith(shown) else alone, ratio, bound)
            if scored[i]:
                trace.score = float(infos["score"][i])
                trace.finish_reason = str(infos["finish_reason"][i])

    def frames(self, render_mode: str) -> tuple[Frame, ...]:
        """One frame per row: text for "ansi", an image (360, 640, 3) uint8 for "rgb_array"."""
        show = as_text if render_mode == "ansi" else as_image
        return tuple(show(trace) for trace in self.rows)
