"""Observations from Stable-Baselines3: rows of token ids, if no wrapper has changed them."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rlhf_gym.errors import InputError
from rlhf_gym.tokens import PAD


def token_ids(observations: Tensor) -> Tensor:
    """Observations (N, L) as int64.

    Raises:
        InputError: They are real numbers, such as those of `VecNormalize`, whose observation space
            does not say so.
    """
    if observations.is_floating_point():
        kind = str(observations.dtype).removeprefix("torch.")
        raise _changed(f"are {kind}")
    return observations.long()


def host_rows(observations: Tensor) -> npt.NDArray[np.int64]:
    """Observations (N, L) on the host.

    Raises:
        InputError: They are not rows of token ids with PAD behind them.
    """
    seen: npt.NDArray[np.int64] = token_ids(observations.detach()).cpu().numpy()
    if ((seen[:, 1:] != PAD) & (seen[:, :-1] == PAD)).any():
        raise _changed("have PAD between tokens")
    return seen


def _changed(what: str) -> InputError:
    return InputError(
        f"an observation is a row of token ids (int64) with PAD = {PAD} behind them, but these "
        f"{what}. A wrapper such as VecNormalize(norm_obs=True) or VecFrameStack changes them: "
        "take it away"
    )
