"""Checkpoints of a `ResponseAlgorithm` between two updates: safetensors and JSON, never a pickle.

A checkpoint is written under a temporary name, synced and renamed, so that a run stopped at any
moment leaves the last complete one. A run on a CPU that resumes from it ends with the same bits
as a run that was never stopped.
"""

import base64
import random
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from stable_baselines3.common.callbacks import BaseCallback

from agents.sb3.learning.stopping import StopRequest
from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import own_memory, read_json, whole_folder, write_json

KEEP = 2
EXTRA = "extra.safetensors"


class CheckpointCallback(BaseCallback):
    """Writes a checkpoint before a rollout begins, at most every `seconds`, and after the last.

    Args:
        folder: Where checkpoints go.
        seconds: Least time between two checkpoints.
        stop: Once it is asked for, a checkpoint is written and the training ends.
    """

    def __init__(self, folder: Path, seconds: float, stop: StopRequest) -> None:
        super().__init__()
        self.folder, self.seconds, self.stop = folder, seconds, stop
        self._last = time.monotonic()

    def _on_rollout_start(self) -> None:
        due = time.monotonic() - self._last >= self.seconds
        if self.num_timesteps and (due or self.stop.asked):
            self._write()
        if self.stop.asked:
            raise KeyboardInterrupt

    def _on_training_end(self) -> None:
        self._write()

    def _on_step(self) -> bool:
        return True

    def _write(self) -> None:
        assert isinstance(self.model, ResponseAlgorithm)
        save_checkpoint(self.model, self.folder)
        self._last = time.monotonic()


def save_checkpoint(model: ResponseAlgorithm, folder: Path) -> Path:
    """Write everything that the next update depends on; keep the newest checkpoints."""
    name = f"tokens_{model.num_timesteps:012d}"
    try:
        with whole_folder(folder / name) as partial:
            save_file(own_memory(model.policy.state_dict()), partial / "policy.safetensors")
            save_file(_optimizer(model), partial / "optimizer.safetensors")
            if extra := model.extra_state():
                save_file(own_memory(extra), partial / EXTRA)
            write_json(partial / "state.json", _state(model))
    except (OSError, SafetensorError) as error:
        older = sorted(path.name for path in folder.glob("tokens_*"))
        kept = f"the last one, {older[-1]}, is unharmed" if older else "there is no earlier one"
        raise InputError(
            f"cannot write the checkpoint {folder / name}: {error}\n{kept}; free space on the disk "
            "and continue with --resume"
        ) from error
    for old in sorted(folder.glob("tokens_*"))[:-KEEP]:
        shutil.rmtree(old)
    return folder / name


def restore_latest(model: ResponseAlgorithm, run: TrainingRun) -> bool:
    """Restore the newest checkpoint of a run, if there is one; the record is cut back to it.

    Raises:
        InputError: It cannot be read, or belongs to another model.
    """
    found = sorted(run.checkpoints.glob("tokens_*"))
    if not found:
        return False
    try:
        _restore(model, found[-1])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"cannot resume from {found[-1]}: {error}\nDelete that folder to resume from the "
            "checkpoint before it, or start in another run folder"
        ) from error
    run.rewind(model.num_timesteps)
    return True


def _restore(model: ResponseAlgorithm, path: Path) -> None:
    state = read_json(path / "state.json")
    model.policy.load_state_dict(load_file(path / "policy.safetensors"))
    saved = load_file(path / "optimizer.safetensors")
    current = model.policy.optimizer.state_dict()
    current["state"] = _join_optimizer(saved)
    model.policy.optimizer.load_state_dict(current)
    if (path / EXTRA).exists():
        model.set_extra_state(load_file(path / EXTRA))
    model.num_timesteps, model._n_updates = state["num_timesteps"], state["n_updates"]
    if model.kl_controller is not None:
        model.kl_controller.kl_coef = float(state["kl_coef"])
    model._last_obs = _environment(model).set_state(state["environment"])
    model._last_episode_starts = np.ones(model.n_envs, dtype=np.bool_)
    episodes = state.get("episodes", [])  # of Stable-Baselines3's mean return
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    for key, value in state["logged"].items():  # of the last update, shown with the next rollout
        model.logger.record(key, value)
    np.random.set_state(_from_json(state["numpy"]))
    random.setstate(_tuples(state["python"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), model.device)


def _state(model: ResponseAlgorithm) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "environment": _environment(model).get_state(),
        "episodes": [
            {key: float(value) for key, value in episode.items()}
            for episode in model.ep_info_buffer or ()
        ],
        "kl_coef": None if model.kl_controller is None else model.kl_controller.kl_coef,
        "logged": {k: float(v) for k, v in model.logger.name_to_value.items()},
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
        "torch": _text(torch.get_rng_state()),
    }
    if model.device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(model.device))
    return state


def _environment(model: ResponseAlgorithm) -> TokenVectorEnv:
    return model.token_env


def _optimizer(model: ResponseAlgorithm) -> dict[str, torch.Tensor]:
    state = model.policy.optimizer.state_dict()["state"]
    flat = {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}
    return own_memory(flat)


def _join_optimizer(flat: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return state


def _text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _from_json(state: list[Any]) -> tuple[Any, ...]:
    kind, keys, *rest = state
    return (kind, np.array(keys, dtype=np.uint32), *rest)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
