"""The stages of a run of RLHF: comparisons, reward model, policy, evaluation, summary.

Each stage writes its outputs only when they are complete, and is skipped if they exist already. The
first three run once per round, in the folder of the round; the last round's is the run folder.
"""

import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import torch
from rich.console import Console

import rlhf_gym
from agents.runs.comparison_files import load_comparisons
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
from rlhf_gym.reports.display import measured_on
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.reward_run import accuracy_line, fit_reward_model
from rlhf_gym.training.reward_training import RewardTraining
from rlhf_gym.utils.files import hash_files, read_json, write_json


@dataclass(frozen=True)
class Journey:
    """The state that all stages of a run share.

    Attributes:
        options: Options of the run; `human` is None only with `data`.
        algorithm_options: Options of its algorithm.
        keywords: Keywords of its environments that the user asks for; neither reward model nor
            gold scorer.
        console: Console for progress messages.
    """

    options: JourneyOptions
    algorithm_options: Any
    keywords: dict[str, Any]
    console: Console

    @property
    def human(self) -> str:
        """Name of the simulated human's utility function; there is one without `data`."""
        assert self.options.human is not None
        return self.options.human

    @property
    def gold(self) -> str | None:
        """Name of the gold scorer; None if people chose and the options name no `human`."""
        return self.options.human

    @property
    def rounds(self) -> list[Round]:
        """The rounds in order."""
        return rounds(self.options.run_dir, self.options.rounds)

    @property
    def progress(self) -> bool:
        """Whether to print progress."""
        return not self.console.quiet


def collect(journey: Journey, env: TokenVectorEnv, stage: Round, previous: Round | None) -> None:
    """Stage 1: write comparisons.jsonl with all choices so far into the round's folder.

    The first round takes choices among samples of the reference, or the comparisons of
    ``options.data``. Each later round adds choices among samples of the previous round's policy.
    It also measures the previous round's reward model on them (see `look_back`).
    """
    options, console = journey.options, journey.console
    device = env.objective.reference.device
    file = stage.folder / "comparisons.jsonl"
    if file.exists():
        console.print(stage.title("1/4 comparisons: already done"))
        return
    if options.data is not None:
        console.print(f"1/4 comparisons: {options.data}")
        comparisons, _ = load_comparisons(
            options.data,
            format=options.format,
            columns=options.columns,
            on_bad_row=options.on_bad_row,
            split=options.data_split,
        )
    else:
        who = "reference" if previous is None else "policy"
        console.print(
            stage.title(f"1/4 comparisons: the simulated human chooses among samples of the {who}")
        )
        policy = None
        if previous is not None:
            policy = CausalLM.load(str(previous.folder / "policy"), device=device)
        comparisons = label_samples(
            env,
            stage.share(options.comparisons),
            model=policy,
            human=journey.human,
            candidates=options.candidates,
            temperature=options.human_temperature,
            seed=stage.seed(options.seed),
            progress=journey.progress,
        )
    if previous is not None:
        look_back(journey, previous, comparisons, device)
        comparisons = [*read_comparisons(previous.folder / "comparisons.jsonl"), *comparisons]
    partial = file.with_name(".comparisons.partial.jsonl")
    write_comparisons(partial, comparisons)
    partial.rename(file)


def look_back(
    journey: Journey, stage: Round, comparisons: list[Comparison], device: torch.device
) -> None:
    """Write a round's round.json: its reward model, measured on its own policy's samples."""
    model = RewardModel.load(str(stage.folder / "reward_model"), device=device)
    seen = {
        "round": stage.number,
        "comparisons": stage.share(journey.options.comparisons),
        **hindsight(model, comparisons, journey.human),
        "accuracy": read_json(stage.folder / "reward_model.json")["accuracy"],
    }
    write_json(stage.folder / "round.json", seen)


def fit_reward(journey: Journey, env: TokenVectorEnv, stage: Round) -> None:
    """Stage 2: train a reward model from the reference.

    The training works in the folder reward_run. When it is complete, reward_model/ and
    reward_model.json are moved from there into the round's folder.
    """
    options, work = journey.options, stage.folder / "reward_run"
    if (stage.folder / "reward_model.json").exists():
        # The folder is left over if the run stopped between the last move and its removal.
        shutil.rmtree(work, ignore_errors=True)
        journey.console.print(stage.title("2/4 reward model: already done"))
        return
    journey.console.print(stage.title("2/4 reward model: learns to predict the choices"))
    # If this file exists, the training was complete, but the run stopped before the moves below.
    if not (work / "reward_model.json").exists():
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
    # If this folder is missing, it was already moved when the run stopped.
    if (work / "reward_model").exists():
        shutil.rmtree(stage.folder / "reward_model", ignore_errors=True)
        (work / "reward_model").rename(stage.folder / "reward_model")
    (work / "reward_model.json").rename(stage.folder / "reward_model.json")
    shutil.rmtree(work)


def learn(journey: Journey, stage: Round, previous: Round | None) -> None:
    """Stage 3: train the policy.

    Writes policy/, reference/, metrics.csv and policy.json into the round's folder.
    """
    options = journey.options
    if (stage.folder / "policy.json").exists():
        journey.console.print(stage.title("3/4 policy: already done"))
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
    """Return the keywords of an environment that pays the scores of a round's reward model."""
    return {"reward_model": str(stage.folder / "reward_model"), "gold": journey.gold}


def evaluate(journey: Journey) -> dict[str, Any]:
    """Stage 4: write evaluation.json and samples.jsonl into the run folder; return the figures."""
    options = journey.options
    file = options.run_dir / "evaluation.json"
    if file.exists():
        journey.console.print("4/4 evaluation: already done")
        return cast(dict[str, Any], read_json(file))
    keywords = {**journey.keywords, **rewarded(journey, journey.rounds[-1])}
    env = make_env(options.env, 1, keywords, {"split": "held_out"})
    journey.console.print(f"4/4 evaluation: {measured_on({'split': env.prompts.split})}")
    return evaluate_policy(
        options.run_dir / "policy",
        env,
        episodes=options.episodes,
        prompts=options.prompts,
        reference_samples=options.reference_samples,
        seed=options.seed,
        run_dir=options.run_dir,
        progress=journey.progress,
    )


def learning(journey: Journey) -> dict[str, float]:
    """Return the episodes, tokens and seconds of training over all rounds."""
    records = [read_json(stage.folder / "policy.json") for stage in journey.rounds]
    total = {name: sum(r[name] for r in records) for name in ("episodes", "tokens", "seconds")}
    return {**total, "tokens_per_second": total["tokens"] / total["seconds"]}


def summarise(journey: Journey, figures: dict[str, Any]) -> dict[str, Any]:
    """Stage 5: return the content of summary.json."""
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
