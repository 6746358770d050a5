"""The stages of a journey. Each writes its outputs when they are complete, or finds them there.

The folder that a stage writes to is a round's; the last round's is the run folder.
"""

import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import torch
from rich.console import Console

import rlhf_gym
from agents.runs.journey_options import JourneyOptions
from agents.runs.labelling import hindsight, label_samples
from agents.runs.rounds import Round, rounds
from agents.runs.setup import make_env
from agents.runs.training import train
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.evaluation.record import evaluate_policy
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.preferences.comparison import Comparison, write_comparisons
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.reward_run import accuracy_line, fit_reward_model
from rlhf_gym.training.reward_training import RewardTraining
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.files import hash_files, read_json, write_json


@dataclass(frozen=True)
class Journey:
    """A journey under way: what its stages share.

    Attributes:
        options: Its options.
        algorithm_options: Those of its algorithm.
        keywords: Keywords of its environments but for reward and split.
        console: Where it says what it does.
    """

    options: JourneyOptions
    algorithm_options: Any
    keywords: dict[str, Any]
    console: Console

    @property
    def rounds(self) -> list[Round]:
        """Its rounds in turn."""
        return rounds(self.options.run_dir, self.options.rounds)

    @property
    def progress(self) -> bool:
        """Whether it says what it does."""
        return not self.console.quiet


def collect(journey: Journey, env: TokenVectorEnv, stage: Round, previous: Round | None) -> None:
    """Stage 1: comparisons.jsonl in the round's folder, all choices so far.

    The first round's are among samples of the reference, or those of ``options.data``; each later
    round adds choices among samples of the policy before it, and writes what they say of that
    round's reward model into its round.json.
    """
    options, console = journey.options, journey.console
    file = stage.folder / "comparisons.jsonl"
    if file.exists():
        console.print(stage.title("1/4 comparisons: done before"))
        return
    if options.data is not None:
        console.print(f"1/4 comparisons: {options.data}")
        comparisons = read_comparisons(options.data)
    else:
        who = "reference" if previous is None else "policy"
        console.print(
            stage.title(f"1/4 comparisons: the {who} speaks, the simulated human chooses")
        )
        policy = None
        if previous is not None:
            device = env.objective.reference.device
            policy = CausalLM.load(str(previous.folder / "policy"), device=device)
        comparisons = label_samples(
            env,
            stage.share(options.comparisons),
            model=policy,
            human=options.human,
            candidates=options.candidates,
            temperature=options.human_temperature,
            seed=stage.seed(options.seed),
            progress=journey.progress,
        )
    if previous is not None:
        look_back(journey, previous, comparisons)
        comparisons = [*read_comparisons(previous.folder / "comparisons.jsonl"), *comparisons]
    partial = file.with_name(".comparisons.partial.jsonl")
    write_comparisons(partial, comparisons)
    partial.rename(file)


def look_back(journey: Journey, stage: Round, comparisons: list[Comparison]) -> None:
    """round.json of a round: what choices among its policy's samples say of its reward model."""
    device = resolve_device(journey.options.device)
    model = RewardModel.load(str(stage.folder / "reward_model"), device=device)
    seen = {
        "round": stage.number,
        "comparisons": stage.share(journey.options.comparisons),
        **hindsight(model, comparisons, journey.options.human),
        "accuracy": read_json(stage.folder / "reward_model.json")["accuracy"],
    }
    write_json(stage.folder / "round.json", seen)


def fit_reward(journey: Journey, env: TokenVectorEnv, stage: Round) -> None:
    """Stage 2: reward_model/ and reward_model.json in the round's folder, from the reference."""
    options, work = journey.options, stage.folder / "reward_run"
    if (stage.folder / "reward_model.json").exists():
        shutil.rmtree(work, ignore_errors=True)  # a stop in between
        journey.console.print(stage.title("2/4 reward model: done before"))
        return
    journey.console.print(stage.title("2/4 reward model: learns to predict the choices"))
    if not (work / "reward_model.json").exists():  # else it was trained before a stop
        _, figures = fit_reward_model(
            read_comparisons(stage.folder / "comparisons.jsonl"),
            env.objective.reference,
            RewardTraining(
                epochs=options.reward_epochs,
                batch_size=options.reward_batch_size,
                learning_rate=options.reward_learning_rate,
                seed=options.seed,
            ),
            run_dir=work,
            resume=True,
            progress=journey.progress,
        )
        journey.console.print(accuracy_line(figures), highlight=False, soft_wrap=True)
    if (work / "reward_model").exists():  # else it was moved before a stop
        shutil.rmtree(stage.folder / "reward_model", ignore_errors=True)
        (work / "reward_model").rename(stage.folder / "reward_model")
    (work / "reward_model.json").rename(stage.folder / "reward_model.json")
    shutil.rmtree(work)


def learn(journey: Journey, stage: Round, previous: Round | None) -> None:
    """Stage 3: policy/, reference/, metrics.csv and policy.json in the round's folder."""
    options = journey.options
    if (stage.folder / "policy.json").exists():
        journey.console.print(stage.title("3/4 policy: done before"))
        return
    journey.console.print(stage.title(f"3/4 policy: {options.algorithm} on {options.env}"))
    train(
        make_env(options.env, options.num_envs, {**journey.keywords, **rewarded(journey, stage)}),
        options.algorithm,
        journey.algorithm_options,
        total_tokens=stage.share(options.total_tokens),
        run_dir=stage.folder,
        seed=stage.seed(options.seed),
        start=None if previous is None else previous.folder / "policy",
        goes_on=not stage.last,
        resume=True,
        wandb=options.wandb,
        progress=journey.progress,
    )


def rewarded(journey: Journey, stage: Round) -> dict[str, Any]:
    """Keywords of an environment that pays a round's reward model."""
    return {"reward_model": str(stage.folder / "reward_model"), "gold": journey.options.human}


def evaluate(journey: Journey) -> dict[str, Any]:
    """Stage 4: evaluation.json and samples.jsonl in the run folder; the figures."""
    options = journey.options
    file = options.run_dir / "evaluation.json"
    if file.exists():
        journey.console.print("4/4 evaluation: done before")
        return cast(dict[str, Any], read_json(file))
    journey.console.print("4/4 evaluation: held-out prompts")
    keywords = {**journey.keywords, **rewarded(journey, journey.rounds[-1]), "split": "held_out"}
    return evaluate_policy(
        options.run_dir / "policy",
        make_env(options.env, 1, keywords),
        episodes=options.episodes,
        prompts=options.prompts,
        reference_samples=options.reference_samples,
        seed=options.seed,
        run_dir=options.run_dir,
        progress=journey.progress,
    )


def learning(journey: Journey) -> dict[str, float]:
    """Episodes, tokens and seconds of all rounds together."""
    records = [read_json(stage.folder / "policy.json") for stage in journey.rounds]
    total = {name: sum(r[name] for r in records) for name in ("episodes", "tokens", "seconds")}
    return {**total, "tokens_per_second": total["tokens"] / total["seconds"]}


def summarise(journey: Journey, figures: dict[str, Any]) -> dict[str, Any]:
    """Stage 5: what summary.json says."""
    names = (
        "score_before score_after gold_before gold_after kl objective_before objective_after "
        "objective_optimum optimality"
    ).split()
    packages = ("torch", "transformers", "gymnasium", "stable_baselines3", "numpy")
    folder = journey.options.run_dir
    return {
        "env_id": journey.options.env,
        "algorithm": journey.options.algorithm,
        "seed": journey.options.seed,
        **learning(journey),
        **{name: figures[name] for name in names},
        "hashes": {
            "reference": hash_files(folder / "reference"),
            "reward_model": hash_files(folder / "reward_model"),
            "data": hash_files(folder / "comparisons.jsonl"),
        },
        "versions": {"python": sys.version.split()[0], "rlhf_gym": rlhf_gym.__version__}
        | {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
    }
