"""One conversation as a plain Gymnasium environment."""

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs.actor import Actor
from rlhf_gym.envs.render import Trace, as_image, as_text, to_terminal
from rlhf_gym.envs.token_vector_env import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.functions import TextReward
from rlhf_gym.tokens import PAD
from rlhf_gym.utils.arrays import Ints


class TokenEnv(gymnasium.Env[Ints, np.int64]):
    """A language model's response, one token per action: row 0 of a one-row `TokenVectorEnv`.

    Args:
        objective: Reward, reference and β.
        prompts: The prompts that `reset` draws from.
        max_new_tokens: The token budget of a response.
        stop_at_eos: Whether an EOS ends a response.
        gold: A scorer that only evaluation uses.
        render_mode: "ansi" (text), "human" (a coloured terminal), "rgb_array" (an image) or None.

    Raises:
        InputError: There is no such render mode.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own declaration)
        "render_modes": ["ansi", "human", "rgb_array"],
        "render_fps": 8,
    }

    def __init__(
        self,
        objective: Objective,
        prompts: PromptDataset,
        *,
        max_new_tokens: int,
        stop_at_eos: bool = True,
        gold: TextReward | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError(
                f"render_mode must be one of {self.metadata['render_modes']}, not {render_mode!r}"
            )
        self.render_mode = render_mode
        self._trace = Trace("")
        self._ids: list[int] = []
        self._rows = TokenVectorEnv(
            objective,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            autoreset_mode=AutoresetMode.DISABLED,
            gold=gold,
        )
        self.observation_space = self._rows.single_observation_space
        self.action_space = self._rows.single_action_space

    @property
    def objective(self) -> Objective:
        """Reward, reference and β."""
        return self._rows.objective

    @property
    def prompts(self) -> PromptDataset:
        """The prompts that `reset` draws from."""
        return self._rows.prompts

    @property
    def max_new_tokens(self) -> int:
        """The token budget of a response."""
        return self._rows.max_new_tokens

    @property
    def gold(self) -> TextReward | None:
        """The scorer that only evaluation uses."""
        return self._rows.gold

    def bind_actor(self, actor: Actor | None) -> None:
        """Ask `actor` for log π from now on (weak reference); None unbinds."""
        self._rows.bind_actor(actor)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Ints, dict[str, Any]]:
        """Start with a new prompt; `options` as in `TokenVectorEnv.reset`."""
        super().reset(seed=seed)
        observations, infos = self._rows.reset(seed=seed, options=options)
        if self.render_mode is not None:
            prompt = [int(i) for i in observations[0] if i != PAD]
            self._ids = []
            self._trace = Trace(self.objective.reference.texts([prompt])[0])
        if self.render_mode == "human":
            to_terminal(self._trace)
        return observations[0], _only_row(infos)

    def step(self, action: np.int64 | int) -> tuple[Ints, float, bool, bool, dict[str, Any]]:
        """Append one token to the response."""
        observations, rewards, ended, _, infos = self._rows.step(np.asarray([action]))
        info = _only_row(infos)
        if self.render_mode is not None:
            self._follow(int(action), info)
        return observations[0], float(rewards[0]), bool(ended[0]), False, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which tokens may be chosen now, (V,)."""
        mask: npt.NDArray[np.bool_] = self._rows.action_masks()[0]
        return mask

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """The conversation so far; in mode "human" each step prints it instead.

        Returns:
            Text ("ansi"), an image (360, 640, 3) uint8 ("rgb_array") or None.
        """
        if self.render_mode == "ansi":
            return as_text(self._trace)
        if self.render_mode == "rgb_array":
            return as_image(self._trace)
        return None

    def _follow(self, action: int, info: dict[str, Any]) -> None:
        # A token decoded alone loses spaces or is part of a character, so show what it adds to the
        # decoded text.
        self._ids.append(action)
        whole, alone = self._rows.objective.reference.tokenizer.batch_decode([self._ids, [action]])
        shown = "".join(self._trace.tokens)
        if not info[
            "finish_reason"
        ]:  # the last character may be incomplete: show it once it is whole
            whole = whole.rstrip("\ufffd")
        new = whole[len(shown) :] if whole.startswith(shown) else alone
        bound = bool(info["actor_bound"])
        self._trace.add(new, float(info["kl" if bound else "ref_log_prob"]), bound)
        if info["finish_reason"]:
            self._trace.score = float(info["score"])
            self._trace.finish_reason = str(info["finish_reason"])
        if self.render_mode == "human":
            to_terminal(self._trace)


def _only_row(infos: dict[str, Any]) -> dict[str, Any]:
    """The infos of a one-row vector environment, with the same keys on every step.

    Returns:
        Texts as `str`, flags as `bool`, numbers as `np.float64`: a float with the dtype that
        TorchRL's reader of infos asks for.
    """
    row = {key: values[0] for key, values in infos.items() if not key.startswith("_")}
    return {
        key: bool(value) if isinstance(value, np.bool_) else value for key, value in row.items()
    }
