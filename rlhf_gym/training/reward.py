"""Training a reward model on comparisons with transformers.Trainer, and judging it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rlhf_gym.errors import InputError
from rlhf_gym.figures import Figure, measured
from rlhf_gym.files import last_checkpoint
from rlhf_gym.preferences import Comparison
from rlhf_gym.prompts import is_held_out
from rlhf_gym.reward_model import RewardModel, listwise_loss
from rlhf_gym.tokens import pad_rows
from rlhf_gym.training.progress import RichProgress


@dataclass(frozen=True)
class EncodedComparison:
    """A comparison as token ids.

    Attributes:
        rows: Ids of prompt + candidate, for each of K candidates.
        best: Index of the chosen one.
        lengths: Characters of each candidate.
    """

    rows: list[list[int]]
    best: int
    lengths: list[int]


def encode_comparisons(
    comparisons: Sequence[Comparison], model: RewardModel, max_tokens: int | None
) -> tuple[list[EncodedComparison], int]:
    """Tokenise comparisons; the ones with a row above `max_tokens` are dropped and counted.

    Returns:
        The encoded comparisons and the number dropped.

    Raises:
        InputError: None is left.
    """
    vocab = int(model.model.config.vocab_size)
    encoded = []
    for i, comparison in enumerate(comparisons, 1):
        rows = comparison.rows(model.tokenizer, max_tokens)
        if rows is None:
            continue
        if max(max(row) for row in rows) >= vocab:
            raise InputError(
                f"comparison {i} has token ids up to {max(max(row) for row in rows)}, but the "
                f"reward model embeds {vocab}; its ids come from another tokenizer: leave out `ids`"
            )
        encoded.append(
            EncodedComparison(rows, comparison.best, [len(c) for c in comparison.candidates])
        )
    if not encoded:
        raise InputError(
            f"all {len(comparisons)} comparisons exceed max_tokens = {max_tokens}; raise it"
        )
    return encoded, len(comparisons) - len(encoded)


def split_comparisons(
    comparisons: Sequence[Comparison], held_out: float
) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out comparisons; equal prompts are always on one side.

    Raises:
        InputError: One side is empty.
    """
    # A salt of its own: comparisons collected on an environment's training prompts must split too.
    sides = [is_held_out(c.prompt, held_out, salt="comparisons") for c in comparisons]
    train = [c for c, held in zip(comparisons, sides, strict=True) if not held]
    test = [c for c, held in zip(comparisons, sides, strict=True) if held]
    if not train or not test:
        raise InputError(
            f"{len(comparisons)} comparisons split by prompt into {len(train)} for training and "
            f"{len(test)} held out; both are needed: give more prompts, or another held-out share"
        )
    return train, test


class _Choices(nn.Module):
    """What the Trainer sees: all candidates of a batch in, their logits out."""

    def __init__(self, reward_model: RewardModel) -> None:
        super().__init__()
        self.reward_model = reward_model

    def forward(self, tokens: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        return {"logits": self.reward_model(tokens), "sizes": sizes}


def _collate(batch: list[EncodedComparison]) -> dict[str, Tensor]:
    rows = [row for comparison in batch for row in comparison.rows]
    return {
        "tokens": torch.from_numpy(pad_rows(rows)),
        "sizes": torch.tensor([len(comparison.rows) for comparison in batch]),
        "labels": torch.tensor([comparison.best for comparison in batch]),
    }


def _loss(
    outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    # Divided by the count over all accumulated batches: a mean of means would weigh them unevenly.
    losses = listwise_loss(outputs["logits"], outputs["sizes"], labels)
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / count


def train_reward_model(
    model: RewardModel,
    comparisons: Sequence[EncodedComparison],
    *,
    checkpoint_dir: str | Path,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    gradient_accumulation: int = 1,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Maximise the likelihood of the choices; the model is changed in place.

    Args:
        model: A model from `RewardModel.from_backbone`.
        comparisons: Training comparisons, K varying from row to row.
        checkpoint_dir: Where the Trainer keeps what `resume` needs.
        epochs: Passes over the comparisons.
        batch_size: Comparisons a forward pass.
        learning_rate: Peak of a linear schedule to 0 after a 5 % warm-up.
        gradient_accumulation: Forward passes a step.
        seed: Seed of the order.
        resume: Go on from the last checkpoint.
    """
    steps = max(1, int(len(comparisons) * epochs / batch_size / gradient_accumulation))
    arguments = TrainingArguments(
        output_dir=str(checkpoint_dir),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 20,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        logging_steps=max(1, steps // 50),
        save_strategy="steps",
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
    )
    model.train()
    with RichProgress("reward model") as progress:
        trainer = Trainer(
            model=_Choices(model),
            args=arguments,
            train_dataset=list(comparisons),
            data_collator=_collate,
            compute_loss_func=_loss,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_checkpoint(Path(checkpoint_dir)) if resume else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.eval()


def judge_reward_model(
    model: RewardModel, comparisons: Sequence[EncodedComparison]
) -> dict[str, Figure]:
    """Accuracy and NLL on comparisons, beside "the longest answer is the best" and chance.

    Returns:
        `accuracy`, `nll` (nats), `accuracy_longest`, `accuracy_chance`: each value, se, n.
    """
    rows = [row for comparison in comparisons for row in comparison.rows]
    logits = model.logits(torch.from_numpy(pad_rows(rows)).to(model.device)).cpu()
    sizes = torch.tensor([len(comparison.rows) for comparison in comparisons])
    best = torch.tensor([comparison.best for comparison in comparisons])
    losses = listwise_loss(logits.double(), sizes, best).numpy()
    parts = torch.split(logits, sizes.tolist())
    hits = [float(part.argmax() == b) for part, b in zip(parts, best, strict=True)]
    longest = [_longest_share(c) for c in comparisons]
    return {
        "accuracy": measured(np.array(hits)),
        "nll": measured(losses),
        "accuracy_longest": measured(np.array(longest)),
        "accuracy_chance": measured(1 / sizes.double().numpy()),
    }


def _longest_share(comparison: EncodedComparison) -> float:
    longest = [i for i, n in enumerate(comparison.lengths) if n == max(comparison.lengths)]
    return float(comparison.best in longest) / len(longest)
