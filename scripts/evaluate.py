"""`python scripts/evaluate.py --policy DIR --env ID --episodes N` measures a policy.

On held-out prompts, beside its reference: score, gold, exact KL, the objective J, optimality,
perplexity under the reference, distinct n-grams, length, ends and win rates, each with a standard
error; samples side by side. Writes evaluation.json, samples.jsonl and evaluation_config.json, which
says what was evaluated, into the run folder, which may be that of the training; one that holds
another evaluation is refused.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import (
    device,
    listed,
    make_env,
    other_options,
    parse_values,
    progress_bar,
    run,
)
from rich.console import Console
from rich.table import Table

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation import Drawn, evaluate
from rlhf_gym.files import write_json, write_text
from rlhf_gym.lm import CausalLM

N_SAMPLES = 24

OPTIONS = "evaluation_config.json"
"""What evaluation.json is of."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    policy: str
    """The policy: a folder that from_pretrained can load, or a hub name."""
    env: str = "rlhf_gym/Reviews-v0"
    """Environment id."""
    episodes: int = 2304
    """Responses of the policy in all."""
    prompts: int = 48
    """Held-out prompts that they are spread over."""
    reference_samples: int = 128
    """Responses of the reference to each prompt; they carry the estimate of J*."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; `split` is held_out unless given."""
    run_dir: Path = Path("runs/evaluation")
    """Folder to write to."""
    seed: int = 0
    """Seed of prompts and responses."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""


def main(config: Config) -> dict[str, Any]:
    """Load, sample, measure, write; the figures."""
    if config.episodes < config.prompts or config.prompts < 2 or config.reference_samples < 1:
        raise InputError(
            "--prompts must be at least 2, --episodes no fewer, --reference-samples at least 1"
        )
    check_same_evaluation(config)
    keywords = {"split": "held_out", **parse_values(config.env_kwargs)}
    env = make_env(config.env, 1, {"device": device(config.device), **keywords})
    reference = env.objective.reference
    policy = CausalLM.load(config.policy, device=reference.device)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    # First, so that figures are never there without what they are of.
    write_json(config.run_dir / OPTIONS, asdict(config))
    figures = measure(
        env,
        policy,
        config.run_dir,
        n_prompts=config.prompts,
        n_policy=config.episodes // config.prompts,
        n_reference=config.reference_samples,
        seed=config.seed,
    )
    Console().print(table(figures))
    return figures


def check_same_evaluation(config: Config) -> None:
    """Raise an InputError if the folder holds the figures of another evaluation."""
    figures, options = config.run_dir / "evaluation.json", config.run_dir / OPTIONS
    if not figures.exists():
        return
    if not options.exists():
        raise InputError(f"{figures} is another script's; give another --run-dir")
    if other := other_options(options, asdict(config)):
        raise InputError(
            f"{figures} is of an evaluation with {listed(other)}; give another --run-dir"
        )


def measure(
    env: TokenVectorEnv,
    policy: CausalLM,
    run_dir: Path,
    *,
    n_prompts: int,
    n_policy: int,
    n_reference: int,
    seed: int,
) -> dict[str, Any]:
    """Evaluate on the environment's prompts and write evaluation.json and samples.jsonl."""
    n_prompts = min(n_prompts, len(env.prompts))
    if n_prompts < 2:
        raise InputError(
            "at least two held-out prompts are needed: give more prompts, or raise `held_out`"
        )
    with progress_bar("evaluating responses", n_prompts * (n_policy + n_reference)) as advance:
        figures, from_policy, from_reference = evaluate(
            policy,
            env.objective,
            env.prompts,
            max_new_tokens=env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
            n_prompts=n_prompts,
            n_policy=n_policy,
            n_reference=n_reference,
            gold=env.gold,
            seed=seed,
            progress=advance,
        )
    rows = samples(from_policy, from_reference)
    write_text(
        run_dir / "samples.jsonl",
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    )
    write_json(run_dir / "evaluation.json", figures)
    return figures


def samples(policy: Drawn, reference: Drawn) -> list[dict[str, Any]]:
    """The first response of both to some prompts, side by side."""
    return [
        {
            "prompt": policy.prompts[i],
            "reference": reference.texts[i][0],
            "policy": policy.texts[i][0],
            "reference_score": reference.scores[i, 0],
            "policy_score": policy.scores[i, 0],
            "reference_gold": None if reference.gold is None else reference.gold[i, 0],
            "policy_gold": None if policy.gold is None else policy.gold[i, 0],
        }
        for i in range(min(N_SAMPLES, len(policy.prompts)))
    ]


def table(figures: dict[str, Any]) -> Table:
    """The figures as a table, reference beside policy."""
    out = Table(title="held-out prompts, ± standard error over prompts")
    for heading in ("", "reference", "policy"):
        out.add_column(heading, justify="left" if not heading else "right")
    for name in [key.removesuffix("_after") for key in figures if key.endswith("_after")]:
        before, after = figures[f"{name}_before"], figures[f"{name}_after"]
        out.add_row(name, shown(before), shown(after))
    for name in ("kl", "kl_per_token", "win_rate_score", "win_rate_gold", "objective_optimum"):
        out.add_row(name, "", shown(figures[name]))
    if "optimum" in figures:
        for name in ("score", "kl", "ess"):
            out.add_row(f"optimal policy: {name}", "", shown(figures["optimum"][name]))
    for n, of_n in figures.get("best_of_n_optimality", {}).items():
        out.add_row(f"optimality of best-of-{n}", "", shown(of_n))
    optimality = figures["optimality"]
    if optimality is None:
        needed = figures.get("optimum", {}).get("samples_needed")
        more = f"; about {needed} samples a prompt would do" if needed else ""
        out.add_row("optimality", "", f"unknown: too few effective samples for J*{more}")
    else:
        interval = f"{optimality['value']:.3f}  [{optimality['low']:.3f}, {optimality['high']:.3f}]"
        out.add_row("optimality (95 % interval)", "0", interval)
    return out


def shown(figure: dict[str, float] | None) -> str:
    """A figure with its standard error."""
    return "–" if figure is None else f"{figure['value']:.3f} ± {figure['se']:.3f}"


if __name__ == "__main__":
    run(main, Config, __doc__)
