"""`python scripts/train_reward_model.py --data FILE --backbone MODEL` trains a reward model.

Listwise: P(y_i | x) is the softmax over the K candidates of a comparison, and the loss the
negative log-likelihood of the human's choice. Writes reward_model/ (model and tokenizer, for
transformers' from_pretrained), reward_model.json (held-out accuracy and baselines) and
config.json into the run folder. Stopped midway, the same command goes on from the last checkpoint.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from agents.cli.command import command_line, device, results_and_next, run
from agents.runs.comparison_files import load_comparisons
from agents.runs.setup import check_same_run
from rlhf_gym.data.prompts import PLAIN_TEMPLATE
from rlhf_gym.preferences.encoded import TooLong
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.reward_run import accuracy_line, fit_reward_model
from rlhf_gym.training.reward_training import RewardTraining


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    data: str
    """Comparisons: a file, or a dataset of the `datasets` library, in any format that
    rlhf_gym/preferences/formats.py reads."""
    backbone: str
    """Causal LM or classifier to start from: a hub name or a local path."""
    backbone_tokenizer: str | None = None
    """Where the backbone's tokenizer lies, if not with it."""
    run_dir: Path = Path("runs/reward_model")
    """Folder to write to."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    format: str | None = None
    """Format of the comparisons; found from each row's keys if not given."""
    data_revision: str | None = None
    """Commit or tag of a hub dataset."""
    data_split: str = "train"
    """Split of a `datasets` dataset."""
    tokenizer: str | None = None
    """What token ids are decoded with, in files that hold no text: a hub name or a local path."""
    seed: int = 0
    """Seed of the head's start and of the data's order."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda."""
    epochs: float = 1.0
    """Passes over the comparisons."""
    batch_size: int = 32
    """Comparisons an update."""
    learning_rate: float = 5e-4
    """Peak of the learning rate. Models of 100 M parameters and more want 1e-5 to 5e-5."""
    heads: int = 1
    """Heads on one trunk; several are an ensemble."""
    max_tokens: int | None = None
    """Longest prompt + candidate; by default the model's context."""
    too_long: TooLong = "drop"
    """What to do with longer ones: drop them, or cut whole turns off the dialogue's front."""
    soft_temperature: float | None = None
    """Read `scores` as soft labels, softmax(scores / this), instead of as an order."""
    chat_template: Literal["own", "plain"] = "own"
    """Chat messages are written by the tokenizer's own template, or as plain Human / Assistant
    turns, which are then the saved tokenizer's template."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is no comparison: stop, or leave it out and say so."""
    held_out: float = 0.1
    """Share of the comparisons that is held out, split by prompt."""
    validation: float = 0.1
    """Share of the others that early stopping looks at (with --patience only)."""
    patience: int | None = None
    """Stop after so many evaluations without a lower validation loss; there are four an epoch."""
    weight_decay: float = 0.01
    """Of AdamW."""
    microbatch_tokens: int | None = None
    """Most tokens in one forward and backward pass; bounds memory, changes nothing."""
    bf16: bool = False
    """Autocast to bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them."""
    lora_rank: int | None = None
    """Train low-rank adapters only (package peft), merged at the end."""


def main(config: Config) -> dict[str, Any]:
    """Read the comparisons, train, and print the held-out accuracy; the figures."""
    options = training_options(config)
    check_same_run(config.run_dir, asdict(config), resume=True)
    figures_file = config.run_dir / "reward_model.json"
    if figures_file.exists():
        print(f"{figures_file} is there already: nothing to do; another --run-dir starts a new run")
        return {}
    comparisons, skipped = load_comparisons(
        config.data,
        format=config.format,
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
        run_dir=config.run_dir,
        config=asdict(config),
        skipped=skipped,
        resume=True,
    )
    print(accuracy_line(figures))
    return figures


def training_options(config: Config) -> RewardTraining:
    """The options of the training itself, checked."""
    shared = {f.name for f in dataclasses.fields(RewardTraining)} & asdict(config).keys()
    return RewardTraining(**{name: getattr(config, name) for name in shared})


def untrained(config: Config) -> RewardModel:
    """A fresh head on the backbone."""
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
    """Where the results are, and the commands that use them."""
    model = config.run_dir / "reward_model"
    # The same comparisons as in training, read alike, of which the same share is held out.
    names = "format data_split tokenizer on_bad_row too_long max_tokens chat_template".split()
    default = {field.name: field.default for field in dataclasses.fields(Config)}
    same = [
        word
        for name in names
        if (value := getattr(config, name)) != default[name]
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    keywords = {
        "reference": config.backbone,
        "reference_revision": config.revision,
        "tokenizer": config.backbone_tokenizer,
        "reward_model": str(model),
        "prompts": config.data,
        "prompts_revision": config.data_revision,
        "prompt_format": config.format,
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


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog, then=next_steps)
