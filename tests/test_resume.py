"""Stopped and resumed = never stopped: weights, optimiser, prompts, randomness and the record."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PLAIN
from stable_baselines3.common.utils import set_random_seed

from agents.nlpo import NLPO
from agents.sb3 import PPO, build
from agents.sb3.learning.checkpoint import save_checkpoint
from agents.sb3.learning.learner import SB3Learner
from agents.sb3.ptx import PretrainingMix
from agents.tracking.training_run import TrainingRun
from rlhf_gym.errors import InputError
from rlhf_gym.tokens import Sequences

TOTAL = 600


def learner_on(env, kind: type[PPO] = PPO, **options: Any) -> SB3Learner:
    set_random_seed(3)
    env.reset(seed=3)
    ptx = options.pop("ptx", None)
    algorithm = build(
        kind, env, n_minibatches=2, n_epochs=2, learning_rate=1e-2, **{**PLAIN, **options}
    )
    algorithm.ptx = ptx
    return SB3Learner(algorithm, checkpoint_seconds=0.0, sample_every=2)


def finish(env, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    learner = learner_on(env, **options)
    with TrainingRun(folder, TOTAL, "test") as run:
        learner.learn(TOTAL, run)
    return {name: value.clone() for name, value in learner.policy.state_dict().items()}


def record(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clocks = ("seconds", "time/fps", "time/time_elapsed", "time/iterations")
    kinds = ("_seconds", "tokens_per_second")
    return [
        {k: v for k, v in row.items() if k not in clocks and not k.endswith(kinds)} for row in rows
    ]


def samples(folder: Path) -> list[str]:
    return (folder / "training_samples.jsonl").read_text(encoding="utf-8").split("\n")


class Stopped(Exception):
    pass


def everything(save_lm: Callable[..., str]) -> dict[str, Any]:
    """Options that keep something from one update to the next, all of them at once."""
    texts = torch.tensor([[3, 4, 5, 6], [4, 6, 3, 5], [5, 5, 4, 3]])
    ones = torch.ones(3, dtype=torch.int64)
    return {
        "critic_warmup": 2,
        "critic_lambda": 1.0,
        "kl_old": "exact",
        "kl_old_coef": 0.1,
        "ptx": PretrainingMix(Sequences(texts, ones, 3 * ones), 0.5),
        "kl_control": "adaptive",
        "kl_coef": 0.3,
        "kl_target": 0.5,
        "kl_horizon": 500.0,
        "policy_options": {"critic": save_lm("llama", seed=4), "critic_lr_scale": 2.0},
    }


@pytest.mark.parametrize("stop_at", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "everything", "nlpo"])
def test_a_run_stopped_at_an_update_goes_on_bit_for_bit(
    make_vector_env, save_lm, tmp_path, monkeypatch, stop_at, kind
):
    def options() -> dict[str, Any]:
        if kind == "nlpo":
            return {"kind": NLPO, "top_p": 0.8, "mask_every": 2}
        return everything(save_lm) if kind == "everything" else {}

    whole = finish(make_vector_env(16), tmp_path / "whole", **options())
    updates = 0
    train = PPO.train

    def interrupted(self) -> None:
        nonlocal updates
        updates += 1
        if updates > stop_at:
            raise Stopped
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(PPO, "train", interrupted)
        with pytest.raises(Stopped):
            finish(make_vector_env(16), tmp_path / "resumed", **options())
    with (tmp_path / "resumed" / "training_samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"update": 9, "tok')  # cut off midway, too
    torch.manual_seed(99)
    np.random.seed(99)
    resumed = finish(make_vector_env(16), tmp_path / "resumed", **options())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert record(tmp_path / "whole") == record(tmp_path / "resumed")
    assert len(record(tmp_path / "whole")) > stop_at + 1
    assert samples(tmp_path / "whole") == samples(tmp_path / "resumed")


def test_a_broken_checkpoint_is_named_and_the_older_one_stands(make_vector_env, tmp_path):
    learner = learner_on(make_vector_env(4))
    learner.algorithm.learn(40)
    first = save_checkpoint(learner.algorithm, tmp_path / "checkpoints")
    learner.algorithm.learn(40, reset_num_timesteps=False)
    second = save_checkpoint(learner.algorithm, tmp_path / "checkpoints")
    weights = second / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fresh = learner_on(make_vector_env(4))
    with (
        TrainingRun(tmp_path, TOTAL, "test") as run,
        pytest.raises(InputError, match="cannot resume from") as raised,
    ):
        fresh.learn(TOTAL, run)
    assert second.name in str(raised.value)
    for file in second.iterdir():
        file.unlink()
    second.rmdir()
    with TrainingRun(tmp_path, TOTAL, "test") as run:
        fresh.learn(TOTAL, run)
    assert fresh.algorithm.num_timesteps >= TOTAL
    assert first.name < second.name


def test_a_run_killed_while_writing_its_first_checkpoint_begins_anew(make_vector_env, tmp_path):
    whole = finish(make_vector_env(16), tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    with TrainingRun(folder, TOTAL, "test") as run:
        run.record(80, {"rollout/score": 1.0})
        run.add_samples([{"tokens": 80, "prompt": "a", "response": "b", "score": 1.0, "kl": 0.0}])
    cut_off = folder / "checkpoints" / ".tokens_80.partial"
    cut_off.mkdir(parents=True)
    (cut_off / "policy.safetensors").write_bytes(b"half")
    resumed = finish(make_vector_env(16), folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert record(tmp_path / "whole") == record(folder)
    assert samples(tmp_path / "whole") == samples(folder)


def test_no_pickle_is_written(make_vector_env, tmp_path):
    finish(make_vector_env(4), tmp_path / "run")
    suffixes = {path.suffix for path in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    assert suffixes == {".safetensors", ".json"}
