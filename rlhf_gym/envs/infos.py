"""Gymnasium's vector info: a dict of arrays, each with a mask of the rows that have it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_gym.objective.objective import Settlement
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tokens import row_sums
from rlhf_gym.utils.arrays import Bools


class EpisodeInfos:
    """Builds one step's infos for N rows.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int) -> None:
        self._num_envs = num_envs
        self._infos: dict[str, Any] = {}

    def add(self, key: str, values: npt.NDArray[Any], rows: Bools) -> None:
        """Set `values` (N,) for the rows where the mask `rows` (N,) is True."""
        # Gymnasium's convention: `_key` is the mask of the rows for which `key` is valid.
        self._infos[key] = np.where(rows, values, np.zeros((), values.dtype))
        self._infos[f"_{key}"] = rows.copy()

    def add_episodes(
        self,
        responses: Responses,
        scores: npt.NDArray[np.float64],
        kl_sums: npt.NDArray[np.float64] | None,
        rows: Bools,
    ) -> None:
        """Set what is known at the end of a response, for the n rows that ended.

        Args:
            responses: The responses of these rows.
            scores: (n,).
            kl_sums: (n,), NaN where a token's log π is not known; None if none is.
            rows: (N,) which rows have ended.
        """
        self._spread("score", scores, rows)
        if responses.score_std is not None:
            self._spread("score_std", responses.score_std.double().cpu().numpy(), rows)
        if kl_sums is not None and not np.isnan(kl_sums).all():
            known = rows.copy()
            known[rows] = ~np.isnan(kl_sums)
            self._spread("kl_sum", kl_sums[known[rows]], known)
        self._spread("finish_reason", _objects(responses.finish_reasons), rows)
        self._spread("prompt", _objects(responses.prompts), rows)
        self._spread("response", _objects(responses.texts), rows)

    def add_wave(self, settled: Settlement, mask: Bools) -> npt.NDArray[np.float64] | None:
        """Set per-token quantities of whole responses, (N, T); return the KL sums (N,) if known."""
        every = np.ones(self._num_envs, dtype=np.bool_)
        quantities = {"ref_log_prob": settled.ref_log_probs, "kl": settled.kl}
        for key, flat in quantities.items():
            if flat is not None:
                grid = np.zeros(mask.shape)
                grid[mask] = flat.double().cpu().numpy()
                self._infos[key], self._infos[f"_{key}"] = grid, every
        if settled.kl is None:
            return None
        return row_sums(settled.kl, settled.responses.sequences.lengths).cpu().numpy()

    def finalise(self, ended: Bools, observations: npt.NDArray[np.int64]) -> None:
        """Move the ended rows' infos to `final_info`, their last observations to `final_obs`."""
        final: dict[str, Any] = {}
        for key in [key for key in self._infos if not key.startswith("_")]:
            values, rows = self._infos.pop(key), self._infos.pop(f"_{key}")
            zero = np.full((), None if values.dtype == object else 0, values.dtype)
            for into, part in ((final, rows & ended), (self._infos, rows & ~ended)):
                if part.any():
                    into[key], into[f"_{key}"] = np.where(part, values, zero), part
        last = np.full(self._num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            last[i] = observations[i].copy()
        self._infos["final_obs"], self._infos["_final_obs"] = last, ended.copy()
        self._infos["final_info"], self._infos["_final_info"] = final, ended.copy()

    def to_dict(self) -> dict[str, Any]:
        """The finished dict."""
        return self._infos

    def _spread(self, key: str, values: npt.NDArray[Any], rows: Bools) -> None:
        full = np.full(self._num_envs, None if values.dtype == object else 0, dtype=values.dtype)
        full[rows] = values
        self._infos[key], self._infos[f"_{key}"] = full, rows.copy()


def _objects(texts: list[str]) -> npt.NDArray[np.object_]:
    out = np.empty(len(texts), dtype=object)
    out[:] = texts
    return out
