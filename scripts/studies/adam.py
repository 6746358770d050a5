"""`python scripts/studies/adam.py --run-dir DIR` compares PyTorch's Adam with TensorFlow 1's form.

PyTorch corrects ε for the bias of the second moment and TensorFlow 1 does not, so the first updates
of TensorFlow 1 are smaller (Huang et al. 2023, The N Implementation Details of RLHF with PPO). For
each seed, both forms train on one rollout of the flagship, from the same weights and in the same
order. Then the trained policy is compared with the one that sampled: approximate KL (k3, nats per
token), share of ratios outside the clip range, smallest and largest ratio. The script writes
results.csv (one row per seed; a second run skips finished seeds) and adam.json.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.utils import set_random_seed

from agents import ppo_ziegler2019
from agents.cli.command import run
from agents.runs.experiments import read_rows, run_jobs
from agents.runs.setup import begin_run, check_same_run, env_keywords, make_env
from agents.sb3.response_ppo import PPO
from rlhf_gym.evaluation.yardstick import Row
from rlhf_gym.kl import k3
from rlhf_gym.tokens import Sequences
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.progress import quiet
from rlhf_gym.utils.statistics import interval

ADAMS = ("torch", "tf1")
FIGURES = ("approx_kl", "clip_fraction", "ratio_min", "ratio_max")
COLUMNS = ("seed", *(f"{adam}_{name}" for adam in ADAMS for name in FIGURES))


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; a value that is not JSON is taken as text."""
    num_envs: int = 256
    """Rows of the environment; an update uses twice as many episodes."""
    learning_rate: float = 1e-5
    """Learning rate, constant."""
    adam_eps: float = 1e-5
    """ε of both forms."""
    n_epochs: int = 2
    """Passes over the rollout before the policy is measured."""
    n_minibatches: int = 8
    """Optimiser steps per pass."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Seeds."""
    workers: int = 1
    """Parallel processes; they divide the cores among themselves."""
    run_dir: Path = Path("runs/study_adam")
    """Folder to write to."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Train both forms with each seed; write means and differences with intervals over seeds."""
    plain = dataclasses.asdict(config)
    # These may differ between runs, so that more seeds can be added to a study later.
    fixed = {k: v for k, v in plain.items() if k not in ("seeds", "workers")}
    check_same_run(config.run_dir, fixed, resume=True)
    begin_run(config.run_dir, fixed)
    file = config.run_dir / "results.csv"
    done = {int(row["seed"]) for row in read_rows(file)}
    left = [seed for seed in config.seeds if seed not in done]
    run_jobs(left, partial(both, config), file, COLUMNS, config.workers)
    rows = [row for row in read_rows(file) if int(row["seed"]) in config.seeds]
    table: dict[str, Any] = {}
    for name in FIGURES:
        torch_form, tf1_form = (
            np.array([float(row[f"{adam}_{name}"]) for row in rows]) for adam in ADAMS
        )
        table[name] = {
            "torch": [float(torch_form.mean()), interval(torch_form)],
            "tf1": [float(tf1_form.mean()), interval(tf1_form)],
            "difference": [float((torch_form - tf1_form).mean()), interval(torch_form - tf1_form)],
        }
        print(name, {k: [f"{x:.3g}" for x in v] for k, v in table[name].items()})
    options = {k: v for k, v in plain.items() if k not in ("run_dir", "workers")}
    write_json(config.run_dir / "adam.json", {"config": options, "mean_and_interval": table})


def both(config: Config, seed: int) -> Row:
    """Run one update with each form, on the same rollout."""
    quiet()
    row: Row = {"seed": seed}
    for adam in ADAMS:
        row |= {f"{adam}_{name}": x for name, x in updated(config, adam, seed).items()}
    return row


def updated(config: Config, adam: Any, seed: int) -> dict[str, float]:
    """Run one update with one form of Adam; return KL and statistics of the ratios."""
    set_random_seed(seed)
    env = make_env(
        config.env,
        config.num_envs,
        env_keywords(config.env_kwargs, config.device),
    )
    env.reset(seed=seed)
    options = ppo_ziegler2019.Config(
        learning_rate=config.learning_rate,
        anneal=False,
        adam=adam,
        adam_eps=config.adam_eps,
        n_epochs=config.n_epochs,
        n_minibatches=config.n_minibatches,
    )
    model = ppo_ziegler2019.make(options, env).algorithm
    assert isinstance(model, PPO)
    _, callback = model._setup_learn(1)
    callback.on_training_start({}, {})
    model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, 0)
    model.train()
    (everything,) = model.rollout_buffer.get(None)
    sequences = everything.observations
    assert isinstance(sequences, Sequences)
    model.policy.set_training_mode(False)
    _, log_probs = model.policy.score(sequences)
    old = everything.old_log_prob
    ratio = (log_probs - old).exp()
    epsilon = model.clip_range(1.0)
    return {
        "approx_kl": float(k3(old, log_probs).mean()),
        "clip_fraction": float(((ratio - 1).abs() > epsilon).float().mean()),
        "ratio_min": float(ratio.min()),
        "ratio_max": float(ratio.max()),
    }


if __name__ == "__main__":
    run(main, Config, __doc__)
