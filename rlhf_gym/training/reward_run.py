"""From comparisons to a reward model: split, encode, train, measure on held-out data, save."""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_gym.data.encoding import check_known
from rlhf_gym.data.row_problems import RowReport
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.reward_models import evaluate_reward_model
from rlhf_gym.lm.architecture import context_length
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import (
    EncodedComparison,
    Fit,
    TooLong,
    candidate_rows,
    encode_comparisons,
)
from rlhf_gym.preferences.splits import split_comparisons
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.reward_training import RewardTraining, train_reward_model
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.files import folder_or_temporary, last_checkpoint, whole_folder, write_json
from rlhf_gym.utils.progress import transformers_quiet
from rlhf_gym.utils.same_data import check_same_data, digest

NORMALISED_ON = 1024
"""Approximate number of candidates on which gain and bias are measured."""
UNFINISHED = 0.4
"""Share of the answers that a reward model reads without their end while it is trained."""


class FittedRewardModel(NamedTuple):
    """A trained reward model and its figures.

    Attributes:
        reward_model: The model. Its scores have mean 0 and variance 1 on held-out candidates.
        figures: The number of comparisons, accuracies and likelihood on the held-out ones (see
            `evaluate_reward_model`), gain and bias, and accuracy and mean score of answers without
            their end.
    """

    reward_model: RewardModel
    figures: dict[str, Any]


class RewardData(NamedTuple):
    """Encoded comparisons, split by use.

    Attributes:
        train: Comparisons to train on.
        validation: Comparisons for early stopping; may be empty.
        test: Held-out comparisons to measure on.
        fit: How many of all comparisons fitted into `max_tokens`.
        max_tokens: Most tokens of a prompt with one candidate; None for no limit.
    """

    train: list[EncodedComparison]
    validation: list[EncodedComparison]
    test: list[EncodedComparison]
    fit: Fit
    max_tokens: int | None

    @property
    def rows(self) -> list[EncodedComparison]:
        """All of them."""
        return [*self.train, *self.validation, *self.test]

    def __str__(self) -> str:
        return (
            f"{len(self.train)} comparisons to train on, {len(self.validation)} for early "
            f"stopping, {len(self.test)} held out; of all, {self.fit} ({self.max_tokens} tokens)"
        )


def fit_reward_model(
    comparisons: Sequence[Comparison],
    backbone: str | CausalLM | RewardModel,
    options: RewardTraining | None = None,
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "drop",
    soft_temperature: float | None = None,
    held_out: float = 0.1,
    validation: float = 0.1,
    unfinished: float = UNFINISHED,
    device: str = "auto",
    run_dir: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    rows: RowReport | None = None,
    resume: bool = False,
    progress: bool = True,
) -> FittedRewardModel:
    """Train a reward model on comparisons and measure it on held-out ones.

    Training is listwise: P(y_i | x) is the softmax over the K candidates of a comparison, and the
    loss is the negative log-likelihood of the choice. Unless `backbone` is a `RewardModel`, torch's
    global generator is seeded with ``options.seed``.

    Args:
        comparisons: Human choices. K may differ from one to the next.
        backbone: Causal LM or classifier to start from, by hub name or local path; or a `CausalLM`,
            which is copied; or `RewardModel.from_backbone(…)`, which is trained in place.
        options: Options of the training; None takes `RewardTraining()`.
        max_tokens: Most tokens of a prompt with one candidate: at least 2, at most the model's
            context; None takes that.
        too_long: What to do with a longer comparison: drop it, or cut whole turns off the start of
            the dialogue.
        soft_temperature: Read `scores` as soft labels, softmax(scores / soft_temperature). None
            uses only their order.
        held_out: Share of the comparisons that is held out, split by prompt.
        validation: Share of the remaining comparisons used for early stopping (only with
            ``options.patience``).
        unfinished: Share of the training answers that are text to read without their end. So the
            model learns that a response that its budget cut is judged by its text like any other.
            Sampled candidates say by themselves how they ended.
        device: Where to train if `backbone` is a name: "auto", "cpu", "cuda" …
        run_dir: Folder for reward_model/ (for transformers' `from_pretrained`, and for the keyword
            `reward_model` of an environment), reward_model.json (the figures) and, until the
            training is done, checkpoints. None writes nothing.
        config: Content of config.json in `run_dir`. It is written after the comparisons have passed
            all checks. None writes no such file.
        rows: What was left out and repaired while the comparisons were read, for the figures.
        resume: Whether to continue from the last checkpoint in `run_dir`, which must have the same
            comparisons and options. If False, checkpoints there are deleted.
        progress: Whether to print counts and show progress.

    Returns:
        The model and its figures.

    Raises:
        InputError: The comparisons cannot be split or are all too long, the backbone cannot be
            used, or its context is shorter than `max_tokens`.
    """
    options = options or RewardTraining()
    if not 0 <= unfinished <= 1:
        raise InputError(f"unfinished must be from 0 to 1, not {unfinished}")
    rows = rows or RowReport()
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens must be at least 2, not {max_tokens}")
    with transformers_quiet():
        model = _untrained(backbone, options.seed, device)
        data = _encode(
            model,
            comparisons,
            max_tokens,
            too_long=too_long,
            soft_temperature=soft_temperature,
            unfinished=unfinished,
            shares=(held_out, 0.0 if options.patience is None else validation),
        )
        if progress:
            print(data)
        with folder_or_temporary(run_dir) as folder:
            if run_dir is not None and config is not None:
                write_json(folder / "config.json", config)
            checkpoints = folder / "checkpoints_reward"
            if not resume:
                shutil.rmtree(checkpoints, ignore_errors=True)
            if run_dir is not None:
                goes_on = last_checkpoint(checkpoints) is not None
                rows_of = digest([row.rows, row.choices] for row in data.rows)
                check_same_data(folder, goes_on=goes_on, comparisons=rows_of)
            # Scale the initial logits to variance 1, so that one learning rate suits all backbones.
            model.start_at(candidate_rows(data.train, NORMALISED_ON).to(model.device))
            before = evaluate_reward_model(model, data.test)
            train_reward_model(
                model,
                data.train,
                options,
                validation=data.validation,
                checkpoint_dir=checkpoints,
                resume=resume,
                checkpoints=run_dir is not None,
                progress=progress,
            )
            figures: dict[str, Any] = {
                "comparisons": len(data.train),
                "held_out": len(data.test),
                "skipped": len(rows.skipped),
                "rows": rows.figures(),
                **asdict(data.fit),
                "accuracy_untrained": before["accuracy"],
                **evaluate_reward_model(model, data.test),
            }
            # Use held-out candidates: after overfitting, logits vary more on the training ones.
            model.normalise(candidate_rows(data.test, NORMALISED_ON).to(model.device))
            figures |= {"gain": model.scale.gain, "bias": model.scale.bias}
            model.prompt_forms = {
                "texts" if isinstance(c.prompt, str) else "chats" for c in comparisons
            }
            figures |= _unfinished_figures(model, data.test)
            if run_dir is not None:
                _save(model, figures, folder)
    return FittedRewardModel(model, figures)


def _untrained(backbone: str | CausalLM | RewardModel, seed: int, device: str) -> RewardModel:
    """Return the model before training. The initial weights of a new head depend on the seed."""
    if isinstance(backbone, RewardModel):
        return backbone
    torch.manual_seed(seed)
    if isinstance(backbone, str):
        return RewardModel.from_backbone(backbone, device=resolve_device(device))
    # Copy through a folder. Loading by name again would lose changes made to the weights since.
    with tempfile.TemporaryDirectory() as folder:
        backbone.save_pretrained(folder)
        model = RewardModel.from_backbone(folder, device=backbone.device)
    model.model.name_or_path = backbone.model.name_or_path
    model.tokenizer.name_or_path = backbone.tokenizer.name_or_path
    return model


def _encode(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    max_tokens: int | None,
    *,
    too_long: TooLong,
    soft_temperature: float | None,
    unfinished: float,
    shares: tuple[float, float],
) -> RewardData:
    """Split the comparisons and encode each part.

    `shares` are the share held out, and the share of the rest for early stopping.
    """
    train, test = split_comparisons(comparisons, shares[0])
    validation: list[Comparison] = []
    if shares[1]:
        train, validation = split_comparisons(train, shares[1], salt="validation")
    longest = max_tokens or context_length(model.model)
    total = Fit()

    def encoded(side: list[Comparison], unfinished: float = 0.0) -> list[EncodedComparison]:
        nonlocal total
        if not side:
            return []
        rows, fit = encode_comparisons(
            side,
            model,
            longest,
            too_long=too_long,
            soft_temperature=soft_temperature,
            unfinished=unfinished,
        )
        total += fit
        return rows

    sides = encoded(train, unfinished), encoded(validation), encoded(test)
    texts = [row for row in sides[0] if row.comparison.ids is None]
    known = (ids for row in texts for ids in row.candidates)
    check_known(known, model.tokenizer, "the comparisons' answers")
    return RewardData(*sides, total, longest)


def _unfinished_figures(model: RewardModel, test: list[EncodedComparison]) -> dict[str, Any]:
    """How held-out answers score without their end, which is how a budget cuts them.

    Returns:
        unfinished_accuracy: As `accuracy`, of answers without their end.
        unfinished_gap: Mean score without the end − mean score with it, in standard deviations of
            the scores. Empty if the model reads no end, or no answer is text.
    """
    texts = [row.comparison for row in test if row.comparison.ids is None]
    if not texts or not model.causal:
        return {}
    whole, _ = encode_comparisons(texts, model, None)
    cut, _ = encode_comparisons(texts, model, None, unfinished=1.0)
    means = [
        float(model.scores(candidate_rows(rows).to(model.device)).mean()) for rows in (whole, cut)
    ]
    return {
        "unfinished_accuracy": evaluate_reward_model(model, cut)["accuracy"],
        "unfinished_gap": means[1] - means[0],
    }


def _save(model: RewardModel, figures: dict[str, Any], folder: Path) -> None:
    with whole_folder(folder / "reward_model") as partial:
        model.save_pretrained(partial)
    # Write the figures last: if they exist, everything else is complete.
    write_json(folder / "reward_model.json", figures)
    shutil.rmtree(folder / "checkpoints_reward", ignore_errors=True)


def accuracy_line(figures: Mapping[str, Any]) -> str:
    """Format the held-out accuracy and its baselines in one line."""
    accuracy, longest = figures["accuracy"], figures["accuracy_longest"]
    low, high = accuracy["low"], accuracy["high"]
    between = "unknown" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
    return (
        f"held-out accuracy {accuracy['value']:.3f} (95 % interval {between}, "
        f"{accuracy['n']} comparisons); always the longest {longest['value']:.3f}, chance "
        f"{figures['accuracy_chance']['value']:.3f}; NLL {figures['nll']['value']:.3f} nats"
    )
