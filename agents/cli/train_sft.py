"""`python scripts/train_sft.py --model MODEL --data FILE --run-dir DIR` fine-tunes a causal LM.

Supervised: it learns to give the responses of a data set. Writes policy/ (model and tokenizer, for
transformers' from_pretrained), sft.json (the figures) and config.json into the run folder. Stopped
midway, the same command goes on from the last checkpoint.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

from agents.cli.command import command_line, device, results_and_next, run
from agents.runs.setup import check_same_run, listed, other_options
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.training.sft_data import load_examples
from rlhf_gym.training.sft_run import check_positive, fine_tune, loss_line


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    model: str
    """The causal LM to start from: a folder that save_pretrained wrote, or a hub name."""
    data: str
    """What to learn: a .json, .jsonl, .jsonl.gz or text file, or the name of a dataset. Rows have
    prompt and response (or completion), or are plain texts or lists of chat messages."""
    run_dir: Path
    """Folder to write to."""
    column: str | None = None
    """Column of the plain texts or of the messages; by default prompt and response, else text."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    seed: int = 0
    """Seed of the data's order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    epochs: float = 1.0
    """Passes over the data."""
    learning_rate: float = 1e-4
    """Peak of the learning rate, after 5 % of the updates."""
    batch_tokens: int = 8192
    """Tokens of an update, prompts included, about."""
    max_tokens: int = 512
    """Longest example, prompt included: longer responses are cut, longer prompts dropped."""
    packing: bool = True
    """Whether several examples may share a row of max_tokens, without seeing one another."""
    eos_token_id: int | None = None
    """Id that closes a response; by default the model's EOS, and of several the one that the model
    finds likeliest after the responses."""
    held_out: float = 0.1
    """Share of the data that is kept from training, to measure on before and after."""
    resume: bool = True
    """Whether to go on from a stopped run's last checkpoint; else the run starts from scratch."""


def main(config: Config) -> None:
    """Load model and data, train, and print the held-out loss."""
    figures_file = config.run_dir / "sft.json"
    if figures_file.exists():
        check_same_run(config.run_dir, asdict(config), resume=True)
        print(f"{figures_file} is there already: nothing to do; another --run-dir starts a new run")
        return
    _check(config)
    lm = CausalLM.load(config.model, revision=config.revision, device=device(config.device))
    examples = load_examples(
        config.data, lm.tokenizer, lm.eos_ids, column=config.column, held_out=config.held_out
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
        resume=config.resume,
    )
    if line := loss_line(figures):
        print(line)
    print(f"policy: {config.run_dir / 'policy'} ({figures['seconds']:.0f} s)")


def _check(config: Config) -> None:
    """Refuse options out of range, and going on with a run of other settings."""
    # Before a model is loaded; `fine_tune` asks again.
    check_positive(
        epochs=config.epochs, learning_rate=config.learning_rate, batch_tokens=config.batch_tokens
    )
    file = config.run_dir / "config.json"
    if config.resume and (config.run_dir / "checkpoints_sft").exists() and file.exists():
        other = other_options(file, asdict(config))
        if other:
            raise InputError(
                f"{config.run_dir} holds a stopped run with {listed(other)}; give the same options "
                "to go on, or --no-resume to start from scratch, or another --run-dir"
            )


def next_steps(config: Config) -> str:
    """Where the results are, and the trainings that start from them."""
    policy = config.run_dir / "policy"
    return results_and_next(
        f"{policy} (the policy), {config.run_dir / 'sft.json'} (the figures)",
        command_line(
            "policy",
            *("--env", "rlhf_gym/Text-v0", "--env-kwargs", "reference", policy),
            *("prompts", config.data, "reward_model", "REWARD_MODEL"),
        ),
        command_line("reward-model", "--data", "COMPARISONS", "--backbone", policy),
    )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog, then=next_steps)
