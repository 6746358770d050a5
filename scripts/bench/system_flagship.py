"""Benchmark of the flagship, run by bench/speed.py in a separate process.

`python scripts/bench/system_flagship.py FOLDER` prints a JSON line in the format of `work.say`:
seconds of each stage of each timed iteration, work per iteration, peak memory, versions.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from expected_memory import expected_bytes
from shapes import SHAPES, Shape, load_env
from work import begin, say

import rlhf_gym
from agents.sb3 import PPO, build
from rlhf_gym.lm.batching import MAX_LOGITS
from rlhf_gym.utils.files import read_json
from rlhf_gym.utils.process import prepare_process

# Options of the policy for each system: the critic's trunk, and the precision.
SYSTEMS: dict[str, dict[str, Any]] = {
    "rlhf_gym": {"critic": "shared"},
    "rlhf_gym_bf16": {"critic": "shared", "precision": "bf16"},
    "rlhf_gym_separate": {"critic": "separate"},
}
"""Options of the flagship."""


def main(folder: Path) -> None:
    """Run the timed iterations, after one as a warm-up."""
    options = read_json(folder / "options.json")
    begin(options)
    prepare_process()
    shape = SHAPES[options["shape"]]
    env = load_env(shape, folder, options["device"])
    learner = build(
        PPO,
        env,
        n_waves=1,
        n_epochs=shape.epochs,
        n_minibatches=shape.minibatches,
        critic_warmup=0,  # an update of the critic alone would be less work
        **SYSTEMS[options["system"]],
        device=options["device"],
        seed=0,
    )
    stages: dict[str, list[float]] = {"iteration": []}
    tokens = []

    def iteration() -> None:
        learner.learn(1, reset_num_timesteps=True)

    for i in range(options["iterations"] + 1):
        begun = time.perf_counter()
        iteration()
        ended = time.perf_counter()  # includes callbacks and logs
        if not i:
            continue
        tokens.append(learner.rollout_buffer.n_tokens)
        for stage, seconds in learner.stage_seconds.items():
            stages.setdefault(stage, []).append(seconds)
        stages["iteration"].append(ended - begun)
    work = {
        "episodes": env.num_envs,
        "parameters": sum(p.numel() for p in learner.policy.parameters()),
    }
    if options["system"] == "rlhf_gym":  # the formula assumes float32 and a shared trunk
        work["expected_bytes"] = expected(learner, shape)
    say(
        stages,
        tokens=tokens,
        work=work,
        versions={"rlhf_gym": rlhf_gym.__version__, "torch": torch.__version__},
        profiled=iteration if options["profile"] else None,
    )


def expected(learner: PPO, shape: Shape) -> int:
    """Return the expected memory of an iteration, in addition to that of the started process."""
    most = learner._microbatch_tokens() // (shape.prompt + shape.response)
    return expected_bytes(
        learner.policy.lm.config,
        sum(p.numel() for p in learner.policy.parameters()),
        rows=min(shape.episodes // shape.minibatches, most),
        prompt=shape.prompt,
        response=shape.response,
        logits=MAX_LOGITS,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
