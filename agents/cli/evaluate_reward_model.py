"""`python scripts/evaluate_reward_model.py --reward-model DIR --data FILE` measures a reward model.

It measures, on human comparisons: top-1 and pairwise accuracy, likelihood, calibration, accuracy by
kind of comparison and the agreement between annotators, and lists the worst mistakes. Three simple
rules are measured next to the model: the longest answer, a bag of words, and chance. Intervals are
bootstrap intervals over prompts. Writes reward_evaluation.json and reward_report.html (one file
that needs no network) into the run folder.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console

from agents.cli.command import device, run
from agents.runs.comparison_files import load_comparisons
from rlhf_gym.data.prompts import PLAIN_TEMPLATE
from rlhf_gym.data.row_problems import RowReport
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.reward_model_slices import analyse_reward_model, plain
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import TooLong
from rlhf_gym.preferences.splits import split_comparisons
from rlhf_gym.reports.reward_model_page import page, summary, terminal_table
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.files import check_folder, write_json, write_text


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    reward_model: str
    """The reward model: any sequence classifier of transformers, a hub name or a local path."""
    data: str
    """Comparisons to measure on: a file, or a dataset of the `datasets` library, in a format of
    rlhf_gym/preferences/known_formats.py or with a map of its --columns."""
    run_dir: Path = Path("runs/reward_evaluation")
    """Folder for the results."""
    train_data: str | None = None
    """Comparisons to fit the bag of words to, ideally those that the model was trained on. None
    leaves this rule out, unless --held-out is given."""
    held_out: float | None = None
    """Measure only this share of --data, between 0 and 1, and fit the bag of words to the rest. The
    split is by prompt and the same as in train_reward_model.py. None measures on all of --data."""
    label: int | str | None = None
    """Name or index of the label that is the reward, for a classifier with several labels."""
    probability: bool = False
    """Measure the label's probability instead of its logit."""
    revision: str | None = None
    """Commit or tag of a hub model. None takes the newest."""
    format: str | None = None
    """Format of the rows, a key of `FORMATS` in rlhf_gym/preferences/known_formats.py. None
    recognises each row by its keys."""
    columns: tuple[str, ...] = ()
    """Which column is what, in place of a format, as in `prompt=question chosen=answer_a
    rejected=answer_b`. See docs/reward-models.md for all words."""
    tokenizer: str | None = None
    """Tokenizer of files that have token ids instead of text: a hub name or a local path."""
    data_split: str = "train"
    """Split to read from a `datasets` dataset. Ignored for a file."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is not a comparison: stop (error), or print the problem and leave
    out the row, or only its bad candidate (skip)."""
    max_tokens: int | None = None
    """Most tokens of a prompt with one candidate, at most the model's context. None takes the
    model's context."""
    too_long: TooLong = "drop"
    """What to do with a comparison longer than that: drop it, or cut whole turns off the start of
    the dialogue until it fits (cut_turns)."""
    chat_template: Literal["own", "plain"] = "own"
    """Write chat messages with the tokenizer's own template, or as plain Human / Assistant turns
    (plain)."""
    seed: int = 0
    """Seed of the bootstrap behind the intervals."""
    device: str = "auto"
    """Where to run: auto (the GPU if there is one, else the CPU), cpu or cuda."""


def main(config: Config) -> dict[str, Any]:
    """Read the comparisons, evaluate, write the page, and return the figures."""
    if config.held_out is not None and config.train_data is not None:
        raise InputError(
            "--held-out and --train-data both choose what the bag of words is fitted to; give only "
            "one of them"
        )
    check_folder(config.run_dir)
    comparisons, learnt, skipped, rows = read(config)
    found = analyse_reward_model(
        load(config),
        comparisons,
        learnt,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        seed=config.seed,
    )
    counts = {**skipped, **found["counts"]}
    figures: dict[str, Any] = {
        "config": plain(asdict(config)),
        **found,
        "counts": counts,
        "rows": rows,
    }
    text = page(figures)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.run_dir / "reward_evaluation.json", figures)
    write_text(config.run_dir / "reward_report.html", text)
    console = Console()
    console.print(terminal_table(figures))
    console.print(summary(figures), highlight=False, markup=False, soft_wrap=True)
    print(f"report: {config.run_dir / 'reward_report.html'}")
    return figures


def read(
    config: Config,
) -> tuple[list[Comparison], list[Comparison], dict[str, int], dict[str, Any]]:
    """Read the comparisons.

    Returns:
        The comparisons to measure on, those to fit the bag of words to (may be empty), the number
        of bad rows skipped in each file, and by reason what was left out of the first and repaired.
    """

    def comparisons_of(source: str) -> tuple[list[Comparison], RowReport]:
        return load_comparisons(
            source,
            format=config.format,
            columns=config.columns,
            on_bad_row=config.on_bad_row,
            tokenizer=config.tokenizer,
            split=config.data_split,
        )

    comparisons, report = comparisons_of(config.data)
    learnt: list[Comparison] = []
    counts = {"skipped": len(report.skipped)}
    if config.held_out is not None:
        learnt, comparisons = split_comparisons(comparisons, config.held_out)
    elif config.train_data is not None:
        learnt, train_report = comparisons_of(config.train_data)
        counts["skipped_train"] = len(train_report.skipped)
    return comparisons, learnt, counts, report.figures()


def load(config: Config) -> RewardModel:
    """Load the reward model and set its chat template."""
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
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog)
