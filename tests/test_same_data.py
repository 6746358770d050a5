"""A stopped run goes on with its own data only."""

import json

import gymnasium
import pytest

from agents.runs.training import train
from rlhf_gym.errors import InputError
from rlhf_gym.utils.same_data import check_same_data, digest


def test_data_that_changed_are_refused(tmp_path):
    check_same_data(tmp_path, goes_on=False, prompts=digest([[1, 2], [3]]))
    check_same_data(tmp_path, goes_on=True, prompts=digest([(1, 2), (3,)]), examples="a")
    for other in ([[3], [1, 2]], [[1, 2]], [[1], [2, 3]]):
        with pytest.raises(InputError, match="its prompts have changed since"):
            check_same_data(tmp_path, goes_on=True, prompts=digest(other))
    with pytest.raises(InputError, match="its prompts and examples have changed"):
        check_same_data(tmp_path, goes_on=True, prompts="b", examples="b")
    check_same_data(tmp_path, goes_on=False, prompts="b")  # a new run writes over it
    assert json.loads((tmp_path / "data.json").read_text()) == {"prompts": "b"}


def test_a_policys_training_knows_its_prompts(tmp_path):
    def env(held_out):
        return gymnasium.make_vec(
            "rlhf_gym/Reviews-v0", num_envs=8, device="cpu", held_out=held_out, max_new_tokens=4
        ).unwrapped

    train(env(0.1), total_tokens=64, run_dir=tmp_path, progress=False)
    (tmp_path / "checkpoints" / "tokens_32").mkdir(parents=True)  # as if it had been stopped
    with pytest.raises(InputError, match="its prompts have changed since"):
        train(env(0.3), total_tokens=64, run_dir=tmp_path, resume=True, progress=False)
