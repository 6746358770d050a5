"""Supervised fine-tuning, from examples to a saved policy and its figures."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.training.sft import train_sft
from rlhf_gym.training.sft_counts import losses_line
from rlhf_gym.training.sft_data import SFTExample, prepare
from rlhf_gym.utils.files import last_checkpoint, write_json
from rlhf_gym.utils.progress import transformers_quiet
from rlhf_gym.utils.same_data import check_same_data, digest

logger = logging.getLogger(__name__)


def fine_tune(
    lm: CausalLM,
    examples: Sequence[SFTExample],
    *,
    max_tokens: int = 512,
    eos_token_id: int | None = None,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    batch_tokens: int = 8192,
    packing: bool = True,
    seed: int = 0,
    run_dir: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    bad_rows: Mapping[str, int] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune a causal LM on the responses of some examples, and measure the held-out loss.

    Args:
        lm: The model, trained in place.
        examples: Examples from `load_examples`.
        max_tokens: Most tokens of an example, prompt included. A longer response is cut; an example
            whose prompt leaves no room for a response is dropped.
        eos_token_id: Id that ends a response. None takes the EOS id with the highest probability
            under the model (see `prepare`).
        epochs: Passes over the examples, above 0.
        learning_rate: Peak of the learning rate, above 0. It is reached after 5 % of the updates.
        batch_tokens: Approximate tokens per update, prompts included, at least 1.
        packing: Whether to put several examples into one row of `max_tokens`.
        seed: Seed of the order of the examples.
        run_dir: Folder for policy/, sft.json (the figures) and, until the training is done,
            checkpoints. None writes nothing.
        config: Content of config.json in `run_dir`. It is written after the examples have passed
            all checks. None writes no such file.
        bad_rows: Number of rows that were left out of the examples, by reason; recorded with the
            figures.
        resume: Whether to continue from the last checkpoint in `run_dir`. If False, checkpoints
            there are deleted.
        progress: Whether to print counts and show progress.

    Returns:
        The figures (see `train_sft`), and `bad_rows`.

    Raises:
        InputError: An option is out of range, or no example is left to train on.
    """
    check_positive(epochs=epochs, learning_rate=learning_rate, batch_tokens=batch_tokens)
    with transformers_quiet():
        data = prepare(lm, examples, max_tokens, eos_token_id)
        if progress:
            print(f"{len(data.train)} examples to train on, {len(data.held_out)} held out")
        if line := losses_line(data):
            logger.warning("%s", line)
        folder = None if run_dir is None else Path(run_dir)
        if folder is not None:
            checkpoint = last_checkpoint(folder / "checkpoints_sft") if resume else None
            ids = digest(example.ids for example in (*data.train, *data.held_out))
            check_same_data(folder, goes_on=checkpoint is not None, examples=ids)
        if folder is not None and config is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", config)
        figures = train_sft(
            lm,
            data,
            folder,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_tokens=batch_tokens,
            packing=packing,
            seed=seed,
            resume=resume,
            progress=progress,
        )
    figures["bad_rows"] = dict(bad_rows or {})
    if folder is not None:
        # Write the figures last: if they exist, everything else is complete.
        write_json(folder / "sft.json", figures)
        shutil.rmtree(folder / "checkpoints_sft", ignore_errors=True)
    return figures


def check_positive(**options: float) -> None:
    """Raise an InputError if an option is not above 0."""
    for name, value in options.items():
        if not value > 0:
            raise InputError(f"{name} must be positive, not {value}")


def loss_line(figures: Mapping[str, Any]) -> str | None:
    """Format the held-out loss before and after in one line; None if nothing was held out."""
    before, after = figures["held_out_loss_before"], figures["held_out_loss_after"]
    if not before or not after:
        return None
    return (
        f"held-out loss {before['value']:.4f} -> {after['value']:.4f} nats per token "
        f"(± {after['se']:.4f}, {after['n']} examples), perplexity "
        f"{figures['perplexity_before']:.2f} -> {figures['perplexity_after']:.2f}"
    )
