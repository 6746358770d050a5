"""Supervised fine-tuning from examples to a saved policy and its figures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.training.sft import train_sft
from rlhf_gym.training.sft_data import SFTExample, prepare
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.progress import transformers_quiet


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
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Teach a causal LM the responses of some examples, and measure the held-out loss.

    Args:
        lm: The model, trained in place.
        examples: What `load_examples` gave.
        max_tokens: Longest example, prompt included: longer responses are cut, longer prompts
            dropped.
        eos_token_id: Id that closes a response; None takes the model's likeliest (see `prepare`).
        epochs: Passes over the examples.
        learning_rate: Peak, after 5 % of the updates.
        batch_tokens: Tokens of an update, prompts included, about.
        packing: Whether several examples may share a row of `max_tokens`.
        seed: Seed of the examples' order.
        run_dir: Gets policy/, sft.json (the figures) and checkpoints until it is done. None writes
            nothing.
        config: What config.json in `run_dir` says, written once the examples are found good; None
            writes none.
        resume: Go on from the last checkpoint in `run_dir`; else checkpoints there are removed.
        progress: Whether to print counts and show progress.

    Returns:
        The figures (see `train_sft`).

    Raises:
        InputError: An option is out of range, or no example is left to train on.
    """
    check_positive(epochs=epochs, learning_rate=learning_rate, batch_tokens=batch_tokens)
    with transformers_quiet():
        data = prepare(lm, examples, max_tokens, eos_token_id)
        if progress:
            print(
                f"{len(data.train)} examples to learn, {len(data.held_out)} held out; {data.cut} "
                f"responses cut at {data.max_tokens} tokens, {data.dropped} prompts too long and "
                "dropped"
            )
        folder = None if run_dir is None else Path(run_dir)
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
    if folder is not None:
        # The figures come last: where they are, all the rest is whole.
        write_json(folder / "sft.json", figures)
        shutil.rmtree(folder / "checkpoints_sft", ignore_errors=True)
    return figures


def check_positive(**options: float) -> None:
    """Raise an InputError if an option is not above 0."""
    for name, value in options.items():
        if not value > 0:
            raise InputError(f"{name} must be positive, not {value}")


def loss_line(figures: Mapping[str, Any]) -> str | None:
    """One line: held-out loss before and after; None where nothing was held out."""
    before, after = figures["held_out_loss_before"], figures["held_out_loss_after"]
    if not before or not after:
        return None
    return (
        f"held-out loss {before['value']:.4f} -> {after['value']:.4f} nats a token "
        f"(± {after['se']:.4f}, {after['n']} examples), perplexity "
        f"{figures['perplexity_before']:.2f} -> {figures['perplexity_after']:.2f}"
    )
