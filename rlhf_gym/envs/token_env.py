"""One conversation as a plain Gymnasium environment."""

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from rlhf_gym.envs.actor import Actor
from rlhf_gym.envs.token_vector_env import TokenVectorEnv
from rlhf_gym.objective import Objective, TextReward
from rlhf_gym.prompts import PromptDataset

Ints = npt.NDArray[np.int64]


class TokenEnv(gymnasium.Env[Ints, np.int64]):
    """A language model's response, one token an action: row 0 of a one-row `TokenVectorEnv`.

    Args:
        objective: Reward, reference and β.
        prompts: The prompts that `reset` draws from.
        max_new_tokens: The token budget of a response.
        stop_at_eos: Whether an EOS ends a response.
        gold: A scorer that only evaluation looks at.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(
        self,
        objective: Objective,
        prompts: PromptDataset,
        *,
        max_new_tokens: int,
        stop_at_eos: bool = True,
        gold: TextReward | None = None,
    ) -> None:
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
        """The scorer that only evaluation looks at."""
        return self._rows.gold

    def bind_actor(self, actor: Actor | None) -> None:
        """Learn log π from `actor` from now on (weakly held); None unbinds."""
        self._rows.bind_actor(actor)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Ints, dict[str, Any]]:
        """Begin with a new prompt; `options` as in `TokenVectorEnv.reset`."""
        super().reset(seed=seed)
        observations, _ = self._rows.reset(seed=seed, options=options)
        return observations[0], {}

    def step(self, action: np.int64 | int) -> tuple[Ints, float, bool, bool, dict[str, Any]]:
        """Append one token to the response."""
        observations, rewards, ended, _, infos = self._rows.step(np.asarray([action]))
        info = {
            key: values[0].item() if isinstance(values[0], np.generic) else values[0]
            for key, values in infos.items()
            if not key.startswith("_")
        }
        return observations[0], float(rewards[0]), bool(ended[0]), False, info
