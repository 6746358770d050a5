"""`python scripts/evaluate_reward_model.py --reward-model DIR --data FILE` judges a reward model.

On human comparisons, beside plain rules (the longest answer, a bag of words, chance): top-1 and
pairwise accuracy, likelihood, calibration, accuracy by kind of comparison, agreement between
annotators, and the worst mistakes to read; intervals are by bootstrap over prompts. Writes
reward_evaluation.json and reward_report.html (one file, readable without a network) into the run
folder.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console

from agents.cli.command import device, run
from agents.runs.comparison_files import load_comparisons
from rlhf_gym.data.prompts import PLAIN_TEMPLATE
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.reward_model_slices import analyse_reward_model, plain
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import TooLong
from rlhf_gym.preferences.splits import split_comparisons
from rlhf_gym.reports.reward_model_page import page, summary, terminal_table
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.files import write_json, write_text


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    reward_model: str
    """Reward model: a hub name or a local path, any classifier of transformers."""
    data: str
    """Comparisons: a file, or a dataset of the `datasets` library, in any format that
    rlhf_gym/preferences/formats.py reads."""
    run_dir: Path = Path("runs/reward_evaluation")
    """Folder to write to."""
    train_data: str | None = None
    """Comparisons that the bag of words is fitted to; best those that the model learnt from."""
    held_out: float | None = None
    """Judge this share of --data only, split by prompt as train_reward_model.py splits it, and fit
    the bag of words to the rest."""
    label: int | str | None = None
    """The label that is the reward, by name or index, of a classifier with several."""
    probability: bool = False
    """Judge the label's probability instead of its logit."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    format: str | None = None
    """What the rows are, one of `FORMATS` in rlhf_gym/preferences/formats.py; by default each row's
    keys tell."""
    tokenizer: str | None = None
    """For files of token ids, the tokenizer that they belong to: a hub name or a local path."""
    data_split: str = "train"
    """Split of a `datasets` dataset."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is no comparison: stop, or leave it out and say so."""
    max_tokens: int | None = None
    """Longest prompt + candidate; by default the model's context."""
    too_long: TooLong = "drop"
    """What to do with longer ones: drop them, or cut whole turns off the dialogue's front."""
    chat_template: Literal["own", "plain"] = "own"
    """Chat messages are written by the tokenizer's own template, or as plain Human / Assistant
    turns."""
    seed: int = 0
    """Seed of the resampling behind intervals."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""


def main(config: Config) -> dict[str, Any]:
    """Read the comparisons, evaluate, and write the page; the figures."""
    if config.held_out is not None and config.train_data is not None:
        raise InputError(
            "--held-out already says what the bag of words is fitted to; leave it or --train-data "
            "out"
        )
    comparisons, learnt, skipped = read(config)
    found = analyse_reward_model(
        load(config),
        comparisons,
        learnt,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        seed=config.seed,
    )
    counts = {**skipped, **found["counts"]}
    figures: dict[str, Any] = {"config": plain(asdict(config)), **found, "counts": counts}
    text = page(figures)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.run_dir / "reward_evaluation.json", figures)
    write_text(config.run_dir / "reward_report.html", text)
    console = Console()
    console.print(terminal_table(figures))
    console.print(summary(figures), highlight=False, markup=False, soft_wrap=True)
    print(f"report: {config.run_dir / 'reward_report.html'}")
    return figures


def read(config: Config) -> tuple[list[Comparison], list[Comparison], dict[str, int]]:
    """The comparisons to measure on, those to fit the bag of words to (or none), and bad rows."""

    def comparisons_of(source: str) -> tuple[list[Comparison], int]:
        return load_comparisons(
            source,
            format=config.format,
            on_bad_row=config.on_bad_row,
            tokenizer=config.tokenizer,
            split=config.data_split,
        )

    comparisons, skipped = comparisons_of(config.data)
    learnt: list[Comparison] = []
    counts = {"skipped": skipped}
    if config.held_out is not None:
        learnt, comparisons = split_comparisons(comparisons, config.held_out)
    elif config.train_data is not None:
        learnt, counts["skipped_train"] = comparisons_of(config.train_data)
    return comparisons, learnt, counts


def load(config: Config) -> RewardModel:
    """The reward model, with the chat template that was asked for."""
    model = RewardModel.load(
        config.reward_model,
        revision=config.revision,
        device=device(config.device),
        label=config.label,
        probability=config.probability,
    )
    if config.chat_template == "plain":
        model.tokenizer.chat_template = PLAIN_TEMPLATE
    return model


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog)
