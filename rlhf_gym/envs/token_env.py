"""One conversation as a plain Gymnasium environment."""

from collections.abc import Callable
from typing import Any, TypeVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs.actor import Actor
from rlhf_gym.envs.render import to_terminal
from rlhf_gym.envs.token_vector_env import TokenVectorEnv
from rlhf_gym.envs.traces import RENDER_FPS, Frame
from rlhf_gym.errors import InputError
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.functions import TextReward
from rlhf_gym.utils.arrays import Ints

Maker = TypeVar("Maker", bound=Callable[..., "TokenEnv"])


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
        "render_fps": RENDER_FPS,
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
        self._rows = TokenVectorEnv(
            objective,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            autoreset_mode=AutoresetMode.DISABLED,
            gold=gold,
            # The rows follow what a terminal shows, too.
            render_mode="ansi" if render_mode == "human" else render_mode,
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

    def batch(self, num_envs: int) -> TokenVectorEnv:
        """The same task as a batch of `num_envs` rows."""
        return self._rows.resized(num_envs)

    def bind_actor(self, actor: Actor | None, *, named: bool = True) -> None:
        """Ask `actor` for log π from now on, as in `TokenVectorEnv.bind_actor`."""
        self._rows.bind_actor(actor, named=named)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Ints, dict[str, Any]]:
        """Start with a new prompt; `options` as in `TokenVectorEnv.reset`."""
        super().reset(seed=seed)
        observations, infos = self._rows.reset(seed=seed, options=options)
        self._print()
        return observations[0], _only_row(infos)

    def step(self, action: np.int64 | int) -> tuple[Ints, float, bool, bool, dict[str, Any]]:
        """Append one token to the response."""
        observations, rewards, ended, _, infos = self._rows.step(np.asarray([action]))
        info = _only_row(infos)
        self._print()
        return observations[0], float(rewards[0]), bool(ended[0]), False, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which tokens may be chosen now, (V,)."""
        mask: npt.NDArray[np.bool_] = self._rows.action_masks()[0]
        return mask

    def render(self) -> Frame | None:
        """The conversation so far; in mode "human" each step prints it instead.

        Returns:
            Text ("ansi"), an image (360, 640, 3) uint8 ("rgb_array") or None.
        """
        frames = None if self.render_mode == "human" else self._rows.render()
        return None if frames is None else frames[0]

    def _print(self) -> None:
        if self.render_mode == "human" and self._rows.traces is not None:
            to_terminal(self._rows.traces.rows[0])


def entry_point(maker: Maker) -> Maker:
    """Decorator of a function that `gymnasium.make` calls; it gets the class's metadata.

    Gymnasium reads the render modes before it calls the function. Without them it cannot add its
    wrapper for "rgb_array_list".
    """
    maker.metadata = TokenEnv.metadata  # type: ignore[attr-defined]
    return maker


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
