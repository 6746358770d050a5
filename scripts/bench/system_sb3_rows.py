"""Benchmark of Stable-Baselines3's own PPO and buffer, run by bench/speed.py.

`python scripts/bench/system_sb3_rows.py FOLDER` prints a JSON line in the format of `work.say`. The
policy and its decoding are the project's; rollout and update are SB3's, where each token is a row
with its whole observation. The time per token does not depend on the number of episodes, so it
plays only a few of them, with the shape's number of optimiser steps per epoch.
"""

import sys
from itertools import pairwise
from pathlib import Path

import stable_baselines3
import torch
from clock import Clock
from shapes import SHAPES, load_env
from stable_baselines3.common.buffers import RolloutBuffer
from work import begin, say

from agents.sb3 import build
from rlhf_gym.utils.files import read_json
from rlhf_gym.utils.process import prepare_process


def main(folder: Path) -> None:
    """Run the timed iterations, after one as a warm-up."""
    options = read_json(folder / "options.json")
    begin(options)
    prepare_process()
    shape = SHAPES[options["shape"]]
    env = load_env(shape, folder, options["device"])
    episodes = options["row_episodes"]
    env = type(env)(
        env.objective,
        env.prompts,
        num_envs=episodes,
        max_new_tokens=shape.response,
        stop_at_eos=env.stop_at_eos,
    )
    tokens = episodes * shape.response
    learner = build(
        stable_baselines3.PPO,
        env,
        rollout_buffer_class=RolloutBuffer,
        n_steps=shape.response,
        batch_size=tokens // shape.minibatches,
        n_epochs=shape.epochs,
        device=options["device"],
        seed=0,
    )
    clock = Clock()
    learner.learn((options["iterations"] + 1) * tokens, callback=clock)
    spent = [b - a for a, b in pairwise(clock.times)][1:]
    say(
        {"iteration": spent},
        tokens=[tokens] * len(spent),
        work={
            "episodes": episodes,
            "parameters": sum(p.numel() for p in learner.policy.parameters()),
        },
        versions={"sb3": stable_baselines3.__version__, "torch": torch.__version__},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
