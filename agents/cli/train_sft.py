"""`python scripts/train_sft.py --model MODEL --data FILE --run-dir DIR` fine-tunes a causal LM.

This is supervised fine-tuning: the model learns to give the responses of a dataset. Writes policy/
(model and tokenizer, for transformers' from_pretrained), sft.json (the figures) and config.json
into the run folder. The same command continues a stopped run from its last checkpoint.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

from agents.cli.command import command_line, device, results_and_next, run
from agents.runs.setup import check_same_run, listed, other_options
from rlhf_gym.data.bad_rows import BadRows
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.training.sft_data import load_examples
from rlhf_gym.training.sft_run import check_positive, fine_tune, loss_line
from rlhf_gym.utils.files import check_folder


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    model: str
    """The causal LM to start from: a folder that save_pretrained wrote, or a hub name."""
    data: str
    """The examples: a file, a pattern of files, a folder, or the name of a dataset; docs/data.md
    lists all forms. Each row has a prompt and a response, or is one plain text or one list of chat
    messages."""
    run_dir: Path
    """Folder for the results."""
    column: str | None = None
    """Column with the plain text or the chat messages. None reads the first that there is of prompt
    and response (or completion), instruction (with input) and output, question and answer,
    messages, conversations, text."""
    data_split: str = "train"
    """Split to read from a folder or a dataset. A file has none."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is not an example: stop (error), or leave the row out and count it
    (skip)."""
    revision: str | None = None
    """Commit or tag of a hub model. None takes the newest."""
    seed: int = 0
    """Seed of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto (the GPU if there is one, else the CPU), cpu or cuda."""
    epochs: float = 1.0
    """Passes over the data, above 0."""
    learning_rate: float = 1e-4
    """Peak of the learning rate, above 0. It is reached after 5 % of the updates."""
    batch_tokens: int = 8192
    """Approximate tokens per update, prompts included, at least 1."""
    max_tokens: int = 512
    """Most tokens of an example, prompt included: at least 2, at most the model's context. A longer
    response is cut; an example whose prompt leaves no room for a response is dropped."""
    packing: bool = True
    """Put several examples into one row of max_tokens; they do not see each other. This saves
    padding. A model that cannot keep them apart gets one example per row."""
    eos_token_id: int | None = None
    """Token id that ends each response, one of the model's EOS ids. None takes the model's EOS; if
    there are several, the one to which the model gives the highest probability after the
    responses."""
    held_out: float = 0.1
    """Share of the data held out to measure the loss before and after training: at least 0, below
    1."""
    resume: bool = True
    """Continue from the last checkpoint of a stopped run. --no-resume starts from scratch."""


def main(config: Config) -> None:
    """Load model and data, train, and print the held-out loss."""
    check_folder(config.run_dir)
    figures_file = config.run_dir / "sft.json"
    if figures_file.exists():
        check_same_run(config.run_dir, asdict(config), resume=True)
        print(f"{figures_file} already exists: nothing to do; another --run-dir starts a new run")
        return
    _check(config)
    lm = CausalLM.load(config.model, revision=config.revision, device=device(config.device))
    bad_rows = BadRows()
    examples = load_examples(
        config.data,
        lm.tokenizer,
        lm.eos_ids,
        column=config.column,
        held_out=config.held_out,
        split=config.data_split,
        bad_rows=bad_rows if config.on_bad_row == "skip" else None,
    )
    figures = fine_tune(
        lm,
        examples,
        max_tokens=config.max_tokens,
        eos_token_id=config.eos_token_id,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        batch_tokens=config.batch_tokens,
        packing=config.packing,
        seed=config.seed,
        run_dir=config.run_dir,
        config=asdict(config),
        bad_rows=bad_rows.counts,
        resume=config.resume,
    )
    if line := loss_line(figures):
        print(line)
    print(f"policy: {config.run_dir / 'policy'} ({figures['seconds']:.0f} s)")


def _check(config: Config) -> None:
    """Raise an InputError if an option is out of range or a stopped run has other options."""
    # `fine_tune` checks this too, but only after the slow load of the model.
    check_positive(
        epochs=config.epochs, learning_rate=config.learning_rate, batch_tokens=config.batch_tokens
    )
    file = config.run_dir / "config.json"
    if config.resume and (config.run_dir / "checkpoints_sft").exists() and file.exists():
        other = other_options(file, asdict(config))
        if other:
            raise InputError(
                f"{config.run_dir} contains a stopped run with {listed(other)}; give the same "
                "options to continue it, or --no-resume to start from scratch, or another --run-dir"
            )


def next_steps(config: Config) -> str:
    """Return the lines that say where the results are and which trainings can start from them."""
    policy = config.run_dir / "policy"
    # Pass on how the rows are read, so that the training has the prompts of these examples.
    same = [
        word
        for name, value, default in (
            ("prompt_split", config.data_split, "train"),
            ("prompt_column", config.column, None),
            ("on_bad_row", config.on_bad_row, "error"),
        )
        if value is not None and value != default
        for word in (name, value)
    ]
    return results_and_next(
        f"{policy} (the policy), {config.run_dir / 'sft.json'} (the figures)",
        command_line(
            "policy",
            *("--env", "rlhf_gym/Text-v0", "--env-kwargs", "reference", policy),
            *("prompts", config.data, *same, "reward_model", "REWARD_MODEL"),
        ),
        command_line("reward-model", "--data", "COMPARISONS", "--backbone", policy),
    )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog, then=next_steps)
