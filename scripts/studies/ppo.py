"""`python scripts/studies/ppo.py --run-dir DIR` measures what each detail of the flagship is worth.

A variant is the default with one detail changed, or a preset from the literature. Each variant
trains with each seed on the same number of tokens and is measured on held-out prompts. The table
shows its optimality with a 95 % interval over seeds, and the difference to the default on the same
seeds. Runs use parallel processes (--workers). The script writes results.csv (one row per run; a
second run skips finished rows), study.json and study.md into the run folder.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from agents.cli.command import run
from agents.runs.experiments import read_rows, run_jobs, train_and_measure, with_options
from agents.runs.setup import begin_run, check_same_run, env_keywords, make_env, parse_values
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.yardstick import Row, Yardstick
from rlhf_gym.utils.files import write_json, write_text
from rlhf_gym.utils.statistics import interval

COLUMNS = ("variant", "seed", "optimality", "objective", "score", "kl", "tokens", "seconds")


@dataclass(frozen=True)
class Variant:
    """A change of the default options, or a preset.

    Attributes:
        name: Its name in the table.
        changes: Options of the algorithm that differ from its defaults.
        algorithm: A module under `agents`.
        env: Keywords of the environment that differ from the study's.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    algorithm: str = "ppo"
    env: dict[str, Any] = field(default_factory=dict)


GROUPS = {"rows_per_prompt": 8}
"""Group baselines need several responses to each prompt."""

SHARED = {"critic": "shared", "value_lr_scale": 42.0}
"""A value head on the policy's trunk."""

PLAIN = {
    "critic": "shared",
    "critic_warmup": 0,
    "critic_lambda": None,
    "gae_lambda": 0.95,
    "learning_rate": 3e-4,
    "n_epochs": 1,
    "n_waves": 2,
    "normalize_advantage": True,
    "value_lr_scale": 1.0,
    "vf_coef": 0.5,
}
"""PPO as most libraries implement it: one trunk, one learning rate, whitened advantages."""

VARIANTS = (
    Variant("default"),
    Variant("plain PPO", PLAIN),
    Variant("learning rate × 3", {"learning_rate": 4.5e-4}),
    Variant("learning rate ÷ 3", {"learning_rate": 5e-5}),
    Variant("no decay", {"anneal": False}),
    Variant("two waves", {"n_waves": 2}),
    Variant("four waves", {"n_waves": 4}),
    Variant("one epoch", {"n_epochs": 1}),
    Variant("four epochs", {"n_epochs": 4}),
    Variant("one minibatch", {"n_minibatches": 1}),
    Variant("λ 0.95", {"gae_lambda": 0.95}),
    Variant("λ 1", {"gae_lambda": 1.0}),
    Variant("critic λ 1", {"critic_lambda": 1.0}),
    Variant("no warm-up of the critic", {"critic_warmup": 0}),
    Variant("shared critic", SHARED),
    Variant("critic from the reference", {"critic": "separate"}),
    Variant("one learning rate", {"critic_lr_scale": 1.0, "value_lr_scale": 1.0}),
    Variant("leave one out", {"baseline": "leave_one_out"}, env=GROUPS),
    Variant("group mean", {"baseline": "group_mean"}, env=GROUPS),
    Variant("value weight 0.5", {"vf_coef": 0.5}),
    Variant("value clip", {"clip_range_vf": 0.2}),
    Variant("advantages whitened", {"normalize_advantage": True}),
    Variant(
        "whitened over the rollout", {"normalize_advantage": True, "normalize_over": "rollout"}
    ),
    Variant("rewards whitened", {"whiten_rewards": True}),
    Variant("no clip", {"clip_range": 1e9}),
    Variant("KL to the last iterate", {"kl_old_coef": 0.1}),
    Variant("early stopping", {"n_epochs": 4, "target_kl": 0.01}),
    Variant("entropy bonus", {"ent_coef": 0.01}),
    Variant("no gradient clip", {"max_grad_norm": 1e9}),
    Variant("TF1 Adam", {"adam": "tf1"}),
    Variant("ε of Adam 1e-8", {"adam_eps": 1e-8}),
    Variant("KL in the loss, exact", {"kl_loss": "exact"}),
    Variant("KL in the loss, k2", {"kl_loss": "k2"}),
    Variant("KL in the loss, k3", {"kl_loss": "k3"}),
    Variant("adaptive β", {"kl_control": "adaptive", "kl_target": 1.1, "kl_horizon": 10_000.0}),
    Variant("ppo_seed", algorithm="ppo_seed"),
    Variant("ppo_ziegler2019", algorithm="ppo_ziegler2019"),
    Variant("ppo_nplus2024", algorithm="ppo_nplus2024"),
    Variant("ppo_rl4lms", algorithm="ppo_rl4lms"),
)


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    env: str = "rlhf_gym/Exact-v0"
    """Environment id."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; a value that is not JSON is taken as text."""
    total_tokens: int = 260_000
    """Response tokens that each run samples."""
    num_envs: int = 256
    """Rows of the environment."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of the algorithm for every run, NAME VALUE …; they replace its defaults."""
    variants: tuple[str, ...] = tuple(v.name for v in VARIANTS)
    """Variants to run; all by default."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds."""
    prompts: int = 64
    """Held-out prompts for the evaluation."""
    reference_samples: int = 1024
    """Responses of the reference per held-out prompt, sampled once for all runs."""
    policy_samples: int = 64
    """Responses of each policy per held-out prompt."""
    workers: int = 1
    """Parallel processes; they divide the cores among themselves."""
    run_dir: Path = Path("runs/study_ppo")
    """Folder to write to."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Train and measure the missing runs, then write the table."""
    unknown = set(config.variants) - {v.name for v in VARIANTS}
    if unknown:
        raise InputError(
            f"unknown variants {sorted(unknown)}; choose from {[v.name for v in VARIANTS]}"
        )
    if min(config.workers, config.total_tokens) < 1:
        raise InputError("--workers and --total-tokens must be at least 1")
    chosen = [v for v in VARIANTS if v.name in config.variants]
    # An invalid option must fail now, not after hours of other runs.
    for variant in chosen:
        with_options(variant.algorithm, options(config, variant))
    plain = dataclasses.asdict(config)
    # These may differ between runs, so that more of them can be added to a study later.
    fixed = {k: v for k, v in plain.items() if k not in ("seeds", "variants", "workers")}
    check_same_run(config.run_dir, fixed, resume=True)
    begin_run(config.run_dir, fixed)
    ruler = yardstick(config)  # samples the reference once, before the processes read it
    file = config.run_dir / "results.csv"
    done = {(r["variant"], int(r["seed"])) for r in read_rows(file)}
    jobs = [(v, s) for s in config.seeds for v in chosen if (v.name, s) not in done]
    run_jobs(jobs, partial(trained, config), file, COLUMNS, config.workers)
    summarise(config, ruler, read_rows(file))


def yardstick(config: Config) -> Yardstick:
    """Return the evaluation that all runs share."""
    keywords = env_keywords(config.env_kwargs, config.device)
    env = make_env(config.env, 1, keywords, {"split": "held_out"})
    return Yardstick(
        env,
        config.run_dir / "reference_scores.npz",
        config.prompts,
        config.reference_samples,
        config.policy_samples,
    )


def options(config: Config, variant: Variant) -> dict[str, Any]:
    """Return the options of a variant's algorithm that differ from its defaults."""
    return {**parse_values(config.options), **variant.changes}


def trained(config: Config, job: tuple[Variant, int]) -> Row:
    """Train one variant with one seed, measure it, and keep its metrics.csv."""
    variant, seed = job
    keywords = {**env_keywords(config.env_kwargs, config.device), **variant.env}
    row = train_and_measure(
        yardstick(config),
        variant.algorithm,
        options(config, variant),
        make_env(config.env, config.num_envs, keywords),
        config.run_dir / "runs" / f"{variant.name}-{seed}",
        total_tokens=config.total_tokens,
        seed=seed,
    )
    return {"variant": variant.name, "seed": seed, **{c: row[c] for c in COLUMNS[2:]}}


def summarise(config: Config, ruler: Yardstick, found: list[dict[str, str]]) -> None:
    """Write means with 95 % intervals over seeds to study.json and study.md."""
    values = {(r["variant"], int(r["seed"])): {c: float(r[c]) for c in COLUMNS[2:]} for r in found}
    table = []
    for variant in VARIANTS:
        seeds = sorted(seed for name, seed in values if name == variant.name)
        if not seeds:
            continue
        row: dict[str, Any] = {
            "variant": variant.name,
            "algorithm": variant.algorithm,
            "changes": variant.changes,
            "env": variant.env,
            "seeds": len(seeds),
        }
        for name in COLUMNS[2:]:
            over = np.array([values[variant.name, seed][name] for seed in seeds])
            row[name], row[f"{name}_interval"] = float(over.mean()), interval(over)
        row["lowest"] = min(values[variant.name, s]["optimality"] for s in seeds)
        both = [seed for seed in seeds if ("default", seed) in values]
        if both and variant.name != "default":
            ours, theirs = (
                np.array([values[name, seed]["optimality"] for seed in both])
                for name in (variant.name, "default")
            )
            row["gain"], row["gain_interval"] = (
                float((ours - theirs).mean()),
                interval(ours - theirs),
            )
        table.append(row)
    plain = {k: v for k, v in dataclasses.asdict(config).items() if k != "run_dir"}
    write_json(
        config.run_dir / "study.json",
        {
            "config": plain,
            "objective_reference": float(ruler.before.mean()),
            "objective_optimum": float(ruler.best.mean()),
            "effective_sample_size": ruler.ess if np.isfinite(ruler.ess) else None,
            "best_of_n_optimality": {str(n): ruler.best_of(n) for n in (4, 16)},
            "rows": table,
            "versions": {"python": sys.version.split()[0]}
            | {name: version(name) for name in ("torch", "transformers", "stable_baselines3")},
        },
    )
    text = markdown(table)
    write_text(config.run_dir / "study.md", text)
    print(text)


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| variant | what is switched | optimality | against default | score | KL, nats | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        changes = ", ".join(f"`{k}={v}`" for k, v in (row["changes"] | row["env"]).items())
        gain = _shown(row["gain"], row["gain_interval"], "+.3f") if "gain" in row else ""
        cells = [
            row["variant"],
            changes or (f"`{row['algorithm']}`" if row["algorithm"] != "ppo" else ""),
            _shown(row["optimality"], row["optimality_interval"], ".3f"),
            gain,
            _shown(row["score"], row["score_interval"], ".3f"),
            _shown(row["kl"], row["kl_interval"], ".2f"),
            str(row["seeds"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(mean: float, half: float, form: str) -> str:
    text = f"{mean:{form}} ± {half:{form.lstrip('+')}}"
    return text.replace("-", "\N{MINUS SIGN}")


if __name__ == "__main__":
    run(main, Config, __doc__)
