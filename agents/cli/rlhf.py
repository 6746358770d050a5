"""`python scripts/rlhf.py` is the whole of RLHF: comparisons, reward model, policy, report.

Collects comparisons among the reference's own samples (or takes yours with --data), trains a
reward model on them, trains a policy against it, evaluates it on held-out prompts and writes
report.html. By default on the embedded task, which needs no network. A stage whose output is
already in the run folder is skipped, so a stopped run goes on with the same command.

With --rounds n the loop is closed: the simulated human also chooses among the policy's own samples,
the reward model is trained again on all choices so far, and the policy goes on against it
(Christiano et al. 2017, Ziegler et al. 2019). Earlier rounds lie in rounds/1, rounds/2 …
"""

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console

import rlhf_gym
from agents.cli import train_policy, train_reward_model
from agents.cli.command import device
from agents.runs.setup import begin_run, check_same_run, make_env, parse_values
from agents.runs.training import DEFAULT_ALGORITHM, check_counts
from agents.runs.training import train as train_policy_on
from agents.sb3.vec_env import policy_kwargs
from agents.tracking.wandb import require_wandb
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.record import measure
from rlhf_gym.evaluation.reward_models import clustered, evaluate_reward_model, prompt_numbers
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.preferences.collect import collect_comparisons
from rlhf_gym.preferences.comparison import Comparison, write_comparisons
from rlhf_gym.preferences.encoding import candidate_rows, encode_comparisons
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.reports.run_page import write_report
from rlhf_gym.reports.terminal import print_samples, table
from rlhf_gym.rewards.functions import TextReward, load_callable
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.files import hash_files, read_json, write_json
from rlhf_gym.utils.progress import progress_bar

console = Console()


@dataclass(frozen=True)
class Config:
    """Options of the whole journey."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id; Text-v0 takes any model and any prompts."""
    algorithm: str = DEFAULT_ALGORITHM
    """A module under `agents`, or a dotted path."""
    total_tokens: int = 180_000
    """Response tokens that the policy samples while it learns."""
    num_envs: int = 256
    """Rows of the environment."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; values are parsed as JSON, else taken as text."""
    data: Path | None = None
    """Comparisons of your own; otherwise the simulated human chooses among fresh samples."""
    comparisons: int = 3072
    """Comparisons to collect, in all rounds together."""
    rounds: int = 1
    """Rounds of labelling; comparisons and tokens are spread over them evenly."""
    candidates: int = 4
    """Responses that the simulated human chooses among, K."""
    human: str = "rlhf_gym.rewards.human:compound"
    """The simulated human's utility of a response, as "package.module:function"; also the gold
    score that evaluation reports, and that no training sees."""
    human_temperature: float = 0.25
    """How far from always choosing the best the simulated human is."""
    reward_epochs: float = 1.0
    """Passes over the comparisons."""
    reward_learning_rate: float = 1e-3
    """Peak of the reward model's learning rate."""
    reward_batch_size: int = 16
    """Comparisons an update of the reward model."""
    episodes: int = 1920
    """Responses of the policy in the evaluation."""
    prompts: int = 32
    """Held-out prompts in the evaluation."""
    reference_samples: int = 256
    """Responses of the reference to each of them."""
    run_dir: Path = Path("runs/rlhf")
    """Folder to write to."""
    seed: int = 0
    """Seed of everything."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""
    wandb: bool = False
    """Log the policy's training to Weights & Biases too (the package wandb)."""


def main(config: Config) -> None:
    """Every stage in turn."""
    if config.wandb:
        require_wandb()  # now, not when the policy's turn comes
    begun = time.monotonic()
    keywords = {"device": device(config.device), **parse_values(config.env_kwargs)}
    _check(config, keywords)
    # The reward does not matter to the two stages that make it.
    env = make_env(config.env, 1, {**keywords, "reward_model": config.human})
    held_out = {**keywords, "split": "held_out"}
    make_env(config.env, 1, {**held_out, "reward_model": config.human})  # fail now, not at the end
    check_same_run(config.run_dir, dataclasses.asdict(config), resume=True)
    begin_run(config.run_dir, dataclasses.asdict(config))
    previous = None
    for stage in rounds(config):
        stage.folder.mkdir(parents=True, exist_ok=True)
        comparisons = collect(config, env, stage, previous)
        train_reward(config, env, stage, comparisons)
        rewarded = {"reward_model": str(stage.folder / "reward_model"), "gold": config.human}
        train(config, {**keywords, **rewarded}, stage, previous)
        previous = stage
    figures = evaluate_policy(config, {**held_out, **rewarded})
    summary = summarise(config, env, figures, comparisons)
    write_json(config.run_dir / "summary.json", summary)
    page = write_report(config.run_dir)
    print_samples(config.run_dir, console)
    console.print(table(figures))
    console.print(f"report: {page} ({time.monotonic() - begun:.0f} s)", highlight=False)


@dataclass(frozen=True)
class Round:
    """One round of labelling, reward modelling and learning.

    Attributes:
        number: From 1.
        of: How many there are.
        folder: Where its outputs go; the last round's is the run folder.
    """

    number: int
    of: int
    folder: Path

    def share(self, total: int) -> int:
        """This round's share of a total."""
        return total * self.number // self.of - total * (self.number - 1) // self.of

    def title(self, stage: str) -> str:
        """What is printed as a stage begins."""
        return stage if self.of == 1 else f"round {self.number} of {self.of}, {stage}"


def rounds(config: Config) -> list[Round]:
    """The rounds in turn."""
    n = config.rounds
    earlier = [Round(i, n, config.run_dir / "rounds" / str(i)) for i in range(1, n)]
    return [*earlier, Round(n, n, config.run_dir)]


def _check(config: Config, keywords: dict[str, Any]) -> None:
    """Refuse what would fail hours later."""
    taken = {"split", "reward_model", "gold"} & keywords.keys()
    if taken:
        raise InputError(
            f"{', '.join(sorted(taken))}: set by the stages themselves; --human names the gold "
            "scorer, and scripts/train_policy.py takes a reward model of yours"
        )
    check_counts(config.algorithm_options)  # type: ignore[attr-defined]
    if config.candidates < 2 or config.comparisons < 2 or config.total_tokens < 1:
        raise InputError("--candidates and --comparisons must be at least 2, --total-tokens 1")
    if config.rounds < 1 or (config.rounds > 1 and config.data is not None):
        raise InputError("--rounds must be at least 1; further rounds need the simulated human")
    if min(config.comparisons, config.total_tokens) < 2 * config.rounds:
        raise InputError("--comparisons and --total-tokens must be at least twice --rounds")
    if config.prompts < 2 or config.episodes < config.prompts or config.reference_samples < 1:
        raise InputError(
            "--prompts must be at least 2, --episodes no fewer, --reference-samples at least 1"
        )


def collect(config: Config, env: TokenVectorEnv, stage: Round, previous: Round | None) -> Path:
    """Stage 1: comparisons.jsonl in the round's folder, all choices so far."""
    file = stage.folder / "comparisons.jsonl"
    if file.exists():
        console.print(stage.title("1/4 comparisons: done before"))
        return file
    partial = file.with_name(".comparisons.partial.jsonl")
    if config.data is not None:
        console.print(f"1/4 comparisons: {config.data}")
        write_comparisons(partial, read_comparisons(config.data))
    elif previous is None:
        console.print(
            stage.title("1/4 comparisons: the reference speaks, the simulated human chooses")
        )
        write_comparisons(partial, choices(config, env, env.objective.reference, stage))
    else:
        console.print(
            stage.title("1/4 comparisons: the policy speaks, the simulated human chooses")
        )
        reference = env.objective.reference
        policy = CausalLM.load(str(previous.folder / "policy"), device=reference.device)
        new = choices(config, env, policy.following(reference), stage)
        write_json(previous.folder / "round.json", hindsight(config, previous, new))
        earlier = read_comparisons(previous.folder / "comparisons.jsonl")
        write_comparisons(partial, [*earlier, *new])
    partial.rename(file)
    return file


def choices(
    config: Config, env: TokenVectorEnv, speaker: CausalLM, stage: Round
) -> list[Comparison]:
    """The simulated human's choices among a model's samples."""
    n = stage.share(config.comparisons)
    with progress_bar("comparisons", n) as advance:
        return collect_comparisons(
            speaker,
            env.prompts,
            cast(TextReward, load_callable(config.human)),
            n,
            k=config.candidates,
            temperature=config.human_temperature,
            max_new_tokens=env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
            seed=config.seed + 1000 * (stage.number - 1),
            progress=advance,
        )


def hindsight(config: Config, stage: Round, new: list[Comparison]) -> dict[str, Any]:
    """What new choices among a round's policy's samples say about the round's reward model.

    A policy that hacks its reward model has a high score, a gold score that does not follow, and
    samples among which the model no longer predicts the choices.
    """
    model = RewardModel.load(str(stage.folder / "reward_model"), device=device(config.device))
    encoded, _ = encode_comparisons(new, model, None)
    human = cast(TextReward, load_callable(config.human))
    texts = [text for c in new for text in c.candidates]
    # As the human read them when choosing; a chat is kept as its messages.
    asked = [model.tokenizer.decode(list(c.ids[0]), skip_special_tokens=True) for c in new if c.ids]
    said = [prompt for prompt, c in zip(asked, new, strict=True) for _ in c.candidates]
    gold = np.asarray(human(said, texts), float)
    scores = model.scores(candidate_rows(encoded).to(model.device)).double().cpu().numpy()
    prompts = prompt_numbers([c for c in new for _ in c.candidates])
    return {
        "round": stage.number,
        "comparisons": stage.share(config.comparisons),
        "score": clustered(scores, prompts),
        "gold": clustered(gold, prompts),
        "accuracy_on_own_samples": evaluate_reward_model(model, encoded)["accuracy"],
        "accuracy": read_json(stage.folder / "reward_model.json")["accuracy"],
    }


def train_reward(config: Config, env: TokenVectorEnv, stage: Round, comparisons: Path) -> None:
    """Stage 2: reward_model/ and reward_model.json in the round's folder."""
    if (stage.folder / "reward_model.json").exists():
        shutil.rmtree(stage.folder / "reward_run", ignore_errors=True)  # a stop in between
        console.print(stage.title("2/4 reward model: done before"))
        return
    console.print(stage.title("2/4 reward model: learns to predict the choices"))
    work = stage.folder / "reward_run"
    train_reward_model.main(
        train_reward_model.Config(
            data=str(comparisons),
            backbone=env.objective.reference.model.name_or_path,
            backbone_tokenizer=policy_kwargs(env)["tokenizer"],
            revision=getattr(env.objective.reference.model.config, "_commit_hash", None),
            run_dir=work,
            seed=config.seed,
            device=config.device,
            epochs=config.reward_epochs,
            batch_size=config.reward_batch_size,
            learning_rate=config.reward_learning_rate,
        )
    )
    if (work / "reward_model").exists():  # else it was moved before a stop
        shutil.rmtree(stage.folder / "reward_model", ignore_errors=True)
        (work / "reward_model").rename(stage.folder / "reward_model")
    (work / "reward_model.json").rename(stage.folder / "reward_model.json")
    shutil.rmtree(work)


def train(config: Config, keywords: dict[str, Any], stage: Round, previous: Round | None) -> None:
    """Stage 3: policy/, reference/, metrics.csv and policy.json in the round's folder."""
    if (stage.folder / "policy.json").exists():
        console.print(stage.title("3/4 policy: done before"))
        return
    console.print(stage.title(f"3/4 policy: {config.algorithm} on {config.env}"))
    train_policy_on(
        make_env(config.env, config.num_envs, keywords),
        config.algorithm,
        config.algorithm_options,  # type: ignore[attr-defined]
        total_tokens=stage.share(config.total_tokens),
        run_dir=stage.folder,
        seed=config.seed + 1000 * (stage.number - 1),
        start=None if previous is None else previous.folder / "policy",
        goes_on=stage.number < config.rounds,
        wandb=config.wandb,
    )


def evaluate_policy(config: Config, keywords: dict[str, Any]) -> dict[str, Any]:
    """Stage 4: evaluation.json and samples.jsonl in the run folder."""
    file = config.run_dir / "evaluation.json"
    if file.exists():
        console.print("4/4 evaluation: done before")
        return cast(dict[str, Any], read_json(file))
    console.print("4/4 evaluation: held-out prompts")
    env = make_env(config.env, 1, keywords)
    policy = CausalLM.load(str(config.run_dir / "policy"), device=env.objective.reference.device)
    return measure(
        env,
        policy,
        config.run_dir,
        n_prompts=config.prompts,
        n_policy=max(1, config.episodes // config.prompts),
        n_reference=config.reference_samples,
        seed=config.seed,
    )


def learning(config: Config) -> dict[str, float]:
    """Episodes, tokens and seconds of all rounds together."""
    records = [read_json(stage.folder / "policy.json") for stage in rounds(config)]
    total = {name: sum(r[name] for r in records) for name in ("episodes", "tokens", "seconds")}
    return {**total, "tokens_per_second": total["tokens"] / total["seconds"]}


def summarise(
    config: Config, env: TokenVectorEnv, figures: dict[str, Any], comparisons: Path
) -> dict[str, Any]:
    """What summary.json says."""
    names = (
        "score_before score_after gold_before gold_after kl objective_before objective_after "
        "objective_optimum optimality"
    ).split()
    packages = ("torch", "transformers", "gymnasium", "stable_baselines3", "numpy")
    return {
        "env_id": config.env,
        "algorithm": config.algorithm,
        "seed": config.seed,
        **learning(config),
        **{name: figures[name] for name in names},
        "hashes": {
            "reference": hash_files(config.run_dir / "reference"),
            "reward_model": hash_files(config.run_dir / "reward_model"),
            "data": hash_files(comparisons),
        },
        "versions": {"python": sys.version.split()[0], "rlhf_gym": rlhf_gym.__version__}
        | {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
    }


def cli() -> None:
    """Parse the command line and run; never returns."""
    train_policy.parse_and_run(main, Config, __doc__)
