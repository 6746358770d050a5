"""`python scripts/train_reward_model.py --data FILE --backbone MODEL` trains a reward model.

Training is listwise: P(y_i | x) is the softmax over the K candidates of a comparison, and the loss
is the negative log-likelihood of the human's choice. Writes reward_model/ (model and tokenizer, for
transformers' from_pretrained), reward_model.json (held-out accuracy and baselines) and config.json
into the run folder. The same command continues a stopped run from its last checkpoint.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from agents.cli.command import command_line, device, results_and_next, run
from agents.runs.comparison_files import load_comparisons
from agents.runs.setup import check_same_run
from rlhf_gym.data.prompts import PLAIN_TEMPLATE
from rlhf_gym.preferences.column_map import ColumnMap
from rlhf_gym.preferences.encoded import TooLong
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.reward_run import UNFINISHED, accuracy_line, fit_reward_model
from rlhf_gym.training.reward_training import RewardTraining


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    data: str
    """Comparisons to train on: a file, or a dataset of the `datasets` library, in a format of
    rlhf_gym/preferences/known_formats.py or with a map of its --columns."""
    backbone: str
    """Causal LM or classifier to start from: a hub name or a local path."""
    backbone_tokenizer: str | None = None
    """Hub name or local path of the backbone's tokenizer. None loads it from the backbone."""
    run_dir: Path = Path("runs/reward_model")
    """Folder for the results."""
    revision: str | None = None
    """Commit or tag of a hub model. None takes the newest."""
    format: str | None = None
    """Format of the rows, a key of `FORMATS` in rlhf_gym/preferences/known_formats.py. None
    recognises each row by its keys."""
    columns: tuple[str, ...] = ()
    """Which column is what, in place of a format, as in `prompt=question chosen=answer_a
    rejected=answer_b`. See docs/reward-models.md for all words."""
    data_revision: str | None = None
    """Commit or tag of a hub dataset. None takes the newest."""
    data_split: str = "train"
    """Split to read from a `datasets` dataset. Ignored for a file."""
    tokenizer: str | None = None
    """Tokenizer of files that have token ids instead of text: a hub name or a local path."""
    seed: int = 0
    """Seed of the head's initial weights and of the order of the data."""
    device: str = "auto"
    """Where to train: auto (the GPU if there is one, else the CPU), cpu or cuda."""
    epochs: float = 1.0
    """Passes over the comparisons, above 0."""
    batch_size: int = 32
    """Comparisons per update, at least 1."""
    learning_rate: float = 5e-4
    """Peak of the learning rate, above 0. Models of 100 M parameters and more need 1e-5 to 5e-5."""
    heads: int = 1
    """Reward heads on one trunk, at least 1. More than one make an ensemble."""
    max_tokens: int | None = None
    """Most tokens of a prompt with one candidate: at least 2, at most the model's context. None
    takes the model's context."""
    too_long: TooLong = "drop"
    """What to do with a comparison longer than that: drop it, or cut whole turns off the start of
    the dialogue until it fits (cut_turns)."""
    soft_temperature: float | None = None
    """Read `scores` as soft labels, softmax(scores / soft_temperature). Must be above 0. None uses
    only the order of the scores."""
    chat_template: Literal["own", "plain"] = "own"
    """Write chat messages with the tokenizer's own template, or as plain Human / Assistant turns
    (plain). The plain template is saved with the tokenizer."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is not a comparison: stop (error), or print the problem and leave
    out the row, or only its bad candidate (skip)."""
    held_out: float = 0.1
    """Share of the comparisons held out to measure accuracy, between 0 and 1. The split is by
    prompt."""
    validation: float = 0.1
    """Share of the remaining comparisons used for early stopping, between 0 and 1. Only used with
    --patience."""
    unfinished: float = UNFINISHED
    """Share of the training answers to read without their end, from 0 to 1, so that a response that
    its budget cut is judged by its text. Only answers that are text; sampled ones say how they
    ended."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a lower validation loss, at least 1, and
    keep the best weights. There are four evaluations per epoch. None never stops early."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    microbatch_tokens: int | None = None
    """Most tokens, padding included, in one forward and backward pass, at least 1. It bounds memory
    and changes no gradient. None takes 4,096 on a CPU and 32,768 on a GPU."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); the weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more work."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank, at least 1, and the head; the adapters are merged into the
    weights at the end. Needs the package peft. None trains all weights."""


def main(config: Config) -> dict[str, Any]:
    """Read the comparisons, train, print the held-out accuracy, and return the figures."""
    options = training_options(config)
    check_same_run(config.run_dir, asdict(config), resume=True)
    figures_file = config.run_dir / "reward_model.json"
    if figures_file.exists():
        print(f"{figures_file} already exists: nothing to do; another --run-dir starts a new run")
        return {}
    comparisons, rows = load_comparisons(
        config.data,
        format=config.format,
        columns=config.columns,
        on_bad_row=config.on_bad_row,
        tokenizer=config.tokenizer,
        split=config.data_split,
        revision=config.data_revision,
    )
    _, figures = fit_reward_model(
        comparisons,
        untrained(config),
        options,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        soft_temperature=config.soft_temperature,
        held_out=config.held_out,
        validation=config.validation,
        unfinished=config.unfinished,
        run_dir=config.run_dir,
        config=asdict(config),
        rows=rows,
        resume=True,
    )
    print(accuracy_line(figures))
    return figures


def training_options(config: Config) -> RewardTraining:
    """Collect and check the options of the training itself."""
    shared = {f.name for f in dataclasses.fields(RewardTraining)} & asdict(config).keys()
    return RewardTraining(**{name: getattr(config, name) for name in shared})


def untrained(config: Config) -> RewardModel:
    """Load the backbone and put a new head on it."""
    torch.manual_seed(config.seed)
    model = RewardModel.from_backbone(
        config.backbone,
        revision=config.revision,
        device=device(config.device),
        heads=config.heads,
        tokenizer=config.backbone_tokenizer,
    )
    if config.chat_template == "plain":
        model.tokenizer.chat_template = PLAIN_TEMPLATE
    return model


def next_steps(config: Config) -> str:
    """Return the lines that say where the results are and which commands use them."""
    model = config.run_dir / "reward_model"
    # Pass on all options that decide how comparisons are read and split, so that the evaluation
    # holds out the same comparisons as the training did.
    names = (
        "format columns data_split tokenizer on_bad_row too_long max_tokens chat_template".split()
    )
    default = {field.name: field.default for field in dataclasses.fields(Config)}
    same = [
        word
        for name in names
        if (value := getattr(config, name)) != default[name]
        for word in (
            f"--{name.replace('_', '-')}",
            *(value if isinstance(value, tuple) else [value]),
        )
    ]
    format = config.format or recognised_format(config)
    keywords = {
        "reference": config.backbone,
        "reference_revision": config.revision,
        "tokenizer": config.backbone_tokenizer,
        "reward_model": str(model),
        "prompts": config.data,
        "prompts_revision": config.data_revision,
        "prompt_split": None if config.data_split == default["data_split"] else config.data_split,
        "prompt_format": format,
        "prompt_columns": json.dumps(ColumnMap.parse(config.columns).as_dict())
        if config.columns
        else None,
        # With a format or a map, an environment leaves out all rows that are no comparisons.
        "on_bad_row": None
        if format or config.columns or config.on_bad_row == default["on_bad_row"]
        else config.on_bad_row,
    }
    words = [word for k, v in keywords.items() if v is not None for word in (k, v)]
    return results_and_next(
        f"{model} (the reward model), {config.run_dir / 'reward_model.json'} (the figures)",
        command_line(
            "evaluate-reward-model",
            *("--reward-model", model, "--data", config.data, "--held-out", config.held_out),
            *same,
        ),
        command_line("policy", "--env", "rlhf_gym/Text-v0", "--env-kwargs", *words),
    )


def recognised_format(config: Config) -> str | None:
    """The format that all rows were found to have; None if there is no such one."""
    file = config.run_dir / "reward_model.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("rows", {}).get("format")
    return found if isinstance(found, str) else None


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog, then=next_steps)
