"""Gymnasium's vector info: a dict of arrays, each with a mask of the rows that have it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_gym.objective.objective import Settlement
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tokens import row_sums
from rlhf_gym.utils.arrays import Bools

NUMBERS = ("ref_log_prob", "kl", "score", "kl_sum")
TEXTS = ("finish_reason", "prompt", "response")


class EpisodeInfos:
    """Builds one step's infos for N rows.

    Every step has the same keys with the same types, because Minari, TorchRL and others stack the
    infos of all steps. What is not known is 0.0, False or "" and has a False mask. (A number is not
    NaN, because Gymnasium's `check_env` compares two infos with ==.)

    Args:
        num_envs: N.
        ensemble: Whether the reward's members disagree by a `score_std`.
        texts: Whether steps in which no response ends have the texts' keys too.
    """

    def __init__(self, num_envs: int, *, ensemble: bool, texts: bool) -> None:
        self._num_envs = num_envs
        self._infos: dict[str, Any] = {}
        nobody = np.zeros(num_envs, dtype=np.bool_)
        for key in (*NUMBERS, "score_std") if ensemble else NUMBERS:
            self.add(key, np.zeros(num_envs), nobody)
        self.add("actor_bound", nobody, nobody)
        for key in TEXTS if texts else ():
            self._spread(key, _objects([]), nobody)

    def add(self, key: str, values: npt.NDArray[Any], rows: Bools) -> None:
        """Set `values` (N,) for the rows where the mask `rows` (N,) is True."""
        # Gymnasium's convention: `_key` is the mask of the rows for which `key` is valid.
        self._infos[key] = np.where(rows, values, _filler(values.dtype))
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
        quantities = {"ref_log_prob": settled.ref_log_probs, "kl": settled.kl}
        for key, flat in quantities.items():
            grid = np.zeros(mask.shape)
            if flat is not None:
                grid[mask] = flat.double().cpu().numpy()
            known = np.full(self._num_envs, flat is not None)
            self._infos[key], self._infos[f"_{key}"] = grid, known
        if settled.kl is None:
            return None
        return row_sums(settled.kl, settled.responses.sequences.lengths).cpu().numpy()

    def finalise(self, ended: Bools, observations: npt.NDArray[np.int64]) -> None:
        """Move the ended rows' infos to `final_info`, their last observations to `final_obs`.

        As in Gymnasium, these two keys exist only in steps in which a row ended.
        """
        final: dict[str, Any] = {}
        for key in [key for key in self._infos if not key.startswith("_")]:
            values, rows = self._infos.pop(key), self._infos.pop(f"_{key}")
            for into, part in ((final, rows & ended), (self._infos, rows & ~ended)):
                # TorchRL reads the infos of every row into tensors, and takes texts only here.
                if into is final or key not in TEXTS:
                    into[key] = np.where(part, values, _filler(values.dtype))
                    into[f"_{key}"] = part
        last = np.full(self._num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            last[i] = observations[i].copy()
        self._infos["final_obs"], self._infos["_final_obs"] = last, ended.copy()
        self._infos["final_info"], self._infos["_final_info"] = final, ended.copy()

    def to_dict(self) -> dict[str, Any]:
        """The finished dict."""
        return self._infos

    def _spread(self, key: str, values: npt.NDArray[Any], rows: Bools) -> None:
        full = np.full(self._num_envs, _filler(values.dtype), dtype=values.dtype)
        full[rows] = values
        self._infos[key], self._infos[f"_{key}"] = full, rows.copy()


def _filler(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """What an unknown value is: an empty text, 0 or False."""
    return np.array("" if dtype.kind == "O" else 0, dtype=dtype)


def _objects(texts: list[str]) -> npt.NDArray[np.object_]:
    out = np.empty(len(texts), dtype=object)
    out[:] = texts
    return out
