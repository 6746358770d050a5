"""Sample responses of a training, token by token, for the run folder and the report."""

from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback

from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.tracking.training_run import TrainingRun
from rlhf_gym.lm.causal_lm import CausalLM

DECIMALS = 5


class SampleCallback(BaseCallback):
    """Records a few responses of the first update, of every n-th one after it, and of the last.

    The rows are fixed, so recording draws no random number and changes no result.

    Args:
        run: Where they go.
        every: n.
        responses: How many each time.
    """

    def __init__(self, run: TrainingRun, every: int, responses: int = 4) -> None:
        super().__init__()
        self._run, self._every, self._responses = run, every, responses
        self._wave: dict[str, Any] | None = None  # the infos of the rollout's first

    def _on_rollout_start(self) -> None:
        self._wave = None

    def _on_step(self) -> bool:
        if self._wave is None:
            self._wave = self.locals["wave"]
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, ResponseAlgorithm)
        assert self._wave is not None
        done = self._run.updates
        is_last = self.num_timesteps >= self.model._total_timesteps
        if done % self._every == 0 or is_last:
            n = self.model.n_envs
            rows = sorted({i * n // self._responses for i in range(self._responses)})
            self._run.add_samples([self._sample(row, self._wave, done + 1) for row in rows])

    def _sample(self, row: int, wave: dict[str, Any], update: int) -> dict[str, Any]:
        """The response of one row in the first wave, with its prompt and metrics."""
        assert isinstance(self.model, ResponseAlgorithm)
        buffer = self.model.rollout_buffer
        budget = wave["kl"].shape[1]
        actions = buffer.actions[:budget, row]
        ids = actions[actions >= 0].tolist()
        quantities = (
            wave["kl"][row, : len(ids)],
            buffer.values[: len(ids), row],
            buffer.advantages[: len(ids), row],
        )
        texts = token_texts(self.model.policy.core, buffer.prompt(0, row), ids)
        return {
            "update": update,
            "tokens": self.num_timesteps,
            "prompt": wave["prompt"][row],
            "response": wave["response"][row],
            "finish_reason": wave["finish_reason"][row],
            "score": _rounded(wave["score"][row]),
            "kl": _rounded(wave["kl_sum"][row]),
            "pieces": [
                {"text": text, "log_ratio": ratio, "value": value, "advantage": advantage}
                for text, ratio, value, advantage in zip(
                    texts, *map(_rounded, quantities), strict=True
                )
            ],
        }


def _rounded(values: npt.ArrayLike) -> Any:
    """A number or a list of numbers for JSON, rounded."""
    return np.asarray(values, dtype=np.float64).round(DECIMALS).tolist()


def token_texts(lm: CausalLM, prompt: list[int], response: list[int]) -> list[str]:
    """The text that each token of a response adds; for a special token, its name.

    A token that ends inside a character adds nothing; the token that completes the character adds
    all of it. Without the special tokens, the pieces join to the response.
    """
    special = set(lm.tokenizer.all_special_ids)
    # What a token decodes to depends on those before it.
    texts = lm.texts([[*prompt, *response[:i]] for i in range(len(response) + 1)])
    shown = texts[0]
    pieces = []
    for i, (token, text) in enumerate(zip(response, texts[1:], strict=True), 1):
        complete = i == len(response) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        if token in special:
            pieces.append(str(lm.tokenizer.convert_ids_to_tokens(token)))
        elif complete and not text.startswith(shown):  # a tokenizer that rewrites its past
            return [lm.texts([[token]])[0] for token in response]
        else:
            pieces.append(text[len(shown) :] if complete else "")
            shown = text if complete else shown
    return pieces
