"""`python scripts/train_sft.py --model MODEL --data FILE --run-dir DIR` fine-tunes a causal LM.

Supervised: it learns to give the responses of a data set. Writes policy/ (model and tokenizer, for
transformers' from_pretrained), sft.json (the figures) and config.json into the run folder. Stopped
midway, the same command goes on from the last checkpoint.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from agents.cli.command import command_line, device, results_and_next, run
from agents.runs.setup import check_same_run, listed, other_options
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.training.sft import train_sft
from rlhf_gym.training.sft_data import load_examples, prepare
from rlhf_gym.utils.files import write_json


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
    """Whether to go on from a stopped run's last checkpoint; else the run starts anew."""


def main(config: Config) -> None:
    """Load, train, measure, save."""
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
    data = prepare(lm, examples, config.max_tokens, config.eos_token_id)
    print(
        f"{len(data.train)} examples to learn, {len(data.held_out)} held out; {data.cut} responses "
        f"cut at {data.max_tokens} tokens, {data.dropped} prompts too long and dropped"
    )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.run_dir / "config.json", asdict(config))
    figures = train_sft(
        lm,
        data,
        config.run_dir,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        batch_tokens=config.batch_tokens,
        packing=config.packing,
        seed=config.seed,
        resume=config.resume,
    )
    # The figures come last: where they are, all the rest is whole.
    write_json(figures_file, figures)
    shutil.rmtree(config.run_dir / "checkpoints_sft")
    _report(figures, config.run_dir)


def _check(config: Config) -> None:
    """Refuse options out of range, and going on with a run of other settings."""
    for name in ("epochs", "learning_rate", "batch_tokens"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} must be positive, not {getattr(config, name)}")
    if not 0 <= config.held_out < 1:
        raise InputError(f"held_out must be at least 0 and below 1, not {config.held_out}")
    file = config.run_dir / "config.json"
    if config.resume and (config.run_dir / "checkpoints_sft").exists() and file.exists():
        other = other_options(file, asdict(config))
        if other:
            raise InputError(
                f"{config.run_dir} holds a stopped run with {listed(other)}; give the same options "
                "to go on, or --no-resume to start anew, or another --run-dir"
            )


def _report(figures: dict[str, Any], run_dir: Path) -> None:
    before, after = figures["held_out_loss_before"], figures["held_out_loss_after"]
    if before and after:
        print(
            f"held-out loss {before['value']:.4f} -> {after['value']:.4f} nats a token "
            f"(± {after['se']:.4f}, {after['n']} examples), perplexity "
            f"{figures['perplexity_before']:.2f} -> {figures['perplexity_after']:.2f}"
        )
    print(f"policy: {run_dir / 'policy'} ({figures['seconds']:.0f} s)")


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
