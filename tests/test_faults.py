"""Each fault that can befall a training ends as it should: said clearly, with nothing lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import finish, learner_on, record

from agents.sb3.learning import checkpoint
from agents.sb3.response_ppo import PPO
from agents.tracking.training_run import TrainingRun
from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import whole_folder, whole_lines

SCRIPTS = Path(__file__).parents[1] / "scripts"
TOTAL = 600


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in learner.policy.state_dict().items()}


def test_a_reward_that_is_not_a_number_is_named(make_vector_env, tmp_path):
    calls = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(1)
        return [float("nan") if len(calls) > 2 and i == 1 else 0.5 for i in range(len(prompts))]

    learner = learner_on(make_vector_env(16, reward=reward))
    with (
        TrainingRun(tmp_path, TOTAL, "test") as run,
        pytest.raises(InputError, match="returned nan for response 1 of 16"),
    ):
        learner.learn(TOTAL, run)
    assert all(torch.isfinite(v).all() for v in weights(learner).values())
    assert len(list((tmp_path / "checkpoints").glob("tokens_*"))) == 2


@pytest.mark.parametrize("where", ["gradient", "value"])
def test_an_infinity_stops_before_the_update_and_leaves_the_batch(
    make_vector_env, tmp_path, monkeypatch, where
):
    learner = learner_on(make_vector_env(16))
    before: dict[str, torch.Tensor] = {}
    if where == "gradient":
        gradient = PPO._gradient

        def blown_up(self: PPO, minibatch: Any) -> dict[str, float]:
            found = gradient(self, minibatch)
            self.policy.critic.head.weight.grad[0, 3] = float("inf")
            before.update(weights(learner))
            return found

        monkeypatch.setattr(PPO, "_gradient", blown_up)
    else:
        with torch.no_grad():
            learner.policy.critic.head.bias.fill_(float("nan"))
        before.update(weights(learner))
    with TrainingRun(tmp_path, TOTAL, "test") as run, pytest.raises(InputError) as caught:
        learner.learn(TOTAL, run)
    said = str(caught.value)
    assert f"the {where} is not finite" in said
    assert "broken_batch" in said
    for name, value in weights(learner).items():
        assert torch.equal(value, before[name]) or not torch.isfinite(value).all()
    batch = load_file(tmp_path / "broken_batch" / "batch.safetensors")
    texts = json.loads((tmp_path / "broken_batch" / "texts.json").read_text())
    assert len(batch["tokens"]) == len(texts["texts"])
    if where == "value":
        assert texts["rows"] == list(range(16))
        assert "values" in texts["what"]


def test_a_full_disk_leaves_the_last_checkpoint(make_vector_env, tmp_path, monkeypatch):
    whole = finish(make_vector_env(16), tmp_path / "whole")
    save, written = checkpoint.save_file, []

    def full(tensors: Any, path: Any) -> None:
        written.append(path)
        if len(written) == 6:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    folder = tmp_path / "full"
    folder.mkdir()
    learner = learner_on(make_vector_env(16))
    with (
        TrainingRun(folder, TOTAL, "test") as run,
        pytest.raises(InputError, match=r"No space left(.|\n)*tokens_\d+, is unharmed; free space"),
    ):
        learner.learn(TOTAL, run)
    assert not list((folder / "checkpoints").glob(".*"))
    monkeypatch.undo()
    again = finish(make_vector_env(16), folder)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert record(folder) == record(tmp_path / "whole")


COMMAND = [
    *(sys.executable, str(SCRIPTS / "train_policy.py"), "--env", "rlhf_gym/Exact-v0"),
    *("--num-envs", "64", "--total-tokens", "8000", "--device", "cpu", "--resume"),
    *("--env-kwargs", "device", "cpu"),
]


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND[:-3], "--run-dir", str(folder), *COMMAND[-3:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def until(done: Any, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def policy_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_writes_a_checkpoint_and_goes_on_later(tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder)
    until(lambda: (folder / "metrics.csv").exists() and len(rows(folder)) >= 3, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "stopping after this update" in said
    assert "Traceback" not in said
    (kept,) = (folder / "checkpoints").glob("tokens_*")
    assert int(kept.name.split("_")[1]) == int(rows(folder)[-1].split(",")[0])
    if number == signal.SIGTERM:
        process = start(folder)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert (folder / "policy" / "model.safetensors").exists()


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()[1:]


def ended(process: subprocess.Popen[str]) -> int:
    """Its exit status; its pipes are read to their end and closed."""
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.slow
def test_killed_at_twenty_moments_it_ends_as_if_never_killed(tmp_path):
    whole = tmp_path / "whole"
    assert ended(start(whole)) == 0
    seconds = 12.0
    for i in range(20):
        folder = tmp_path / f"killed_{i}"
        process = start(folder)
        if i % 4 == 0:  # while a checkpoint is being written
            until(lambda: any((folder / "checkpoints").glob(".*")), process)  # noqa: B023
        else:
            until(lambda: False, process, seconds * (i + 1) / 22)
        process.kill()
        ended(process)
        assert ended(start(folder)) == 0, i
        ours, theirs = policy_of(folder), policy_of(whole)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), i
        assert record(folder) == record(whole), i


def test_a_folder_that_cannot_be_replaced_is_still_there(tmp_path, monkeypatch):
    folder = tmp_path / "policy"
    with whole_folder(folder) as partial:
        (partial / "weights").write_text("old")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == ".policy.partial":
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="not empty"):
        patch.setattr(Path, "rename", refused)
        with whole_folder(folder) as partial:
            (partial / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    folder.rename(tmp_path / ".policy.old")  # as if killed between the two renames
    with pytest.raises(KeyboardInterrupt), whole_folder(folder):
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "old"
    with whole_folder(folder) as partial:
        (partial / "weights").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert (folder / "weights").read_text() == "new"


def test_a_line_cut_off_within_a_character_is_taken_out(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b'{"a":"x"}\n{"a":"h\xc3')
    assert whole_lines(file) == ['{"a":"x"}']
    assert file.read_bytes() == b'{"a":"x"}\n'
