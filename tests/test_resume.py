"""Stopped and resumed = never stopped: weights, optimiser, prompts, randomness and the record."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import LinearSchedule, set_random_seed

from agents.sb3 import PPO, build
from agents.sb3.checkpoint import save_checkpoint
from agents.sb3.learner import SB3Learner
from agents.training_run import TrainingRun
from rlhf_gym.errors import InputError

TOTAL = 600


def learner_on(env) -> SB3Learner:
    set_random_seed(3)
    env.reset(seed=3)
    algorithm = build(
        PPO, env, n_minibatches=2, n_epochs=2, learning_rate=LinearSchedule(1e-2, 0, 1)
    )
    return SB3Learner(algorithm, checkpoint_seconds=0.0, sample_every=2)


def finish(env, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    learner = learner_on(env)
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


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_stopped_at_an_update_goes_on_bit_for_bit(
    make_vector_env, tmp_path, monkeypatch, stop_at
):
    whole = finish(make_vector_env(16), tmp_path / "whole")
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
            finish(make_vector_env(16), tmp_path / "resumed")
    with (tmp_path / "resumed" / "training_samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"update": 9, "tok')  # cut off midway, too
    torch.manual_seed(99)
    np.random.seed(99)
    resumed = finish(make_vector_env(16), tmp_path / "resumed")
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
        pytest.raises(InputError, match="cannot go on from") as raised,
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


def test_no_pickle_is_written(make_vector_env, tmp_path):
    finish(make_vector_env(4), tmp_path / "run")
    suffixes = {path.suffix for path in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    assert suffixes == {".safetensors", ".json"}
