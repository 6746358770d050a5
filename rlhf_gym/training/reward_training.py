"""Train a reward model on comparisons with transformers.Trainer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import recompute_activations
from rlhf_gym.lm.lora import add_adapters
from rlhf_gym.preferences.encoded import EncodedComparison
from rlhf_gym.preferences.likelihood import ChoiceSets, choice_loss
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import pad_rows
from rlhf_gym.training.trainer_progress import RichProgress
from rlhf_gym.utils.files import last_checkpoint

# Default for the tokens, padding included, of one forward and backward pass: what fits a CPU's
# cache, and what keeps a GPU busy.
TOKENS_PER_PASS = {"cpu": 1 << 12, "cuda": 1 << 15}


@dataclass(frozen=True)
class RewardTraining:
    """Options of `train_reward_model`.

    Attributes:
        epochs: Passes over the comparisons, above 0.
        batch_size: Comparisons per optimiser step, at least 1.
        learning_rate: Peak of the learning rate, above 0: a linear warm-up over 5 % of the steps,
            then linear decay to 0. Models of 100 M parameters and more need 1e-5 to 5e-5.
        weight_decay: Weight decay of AdamW.
        microbatch_tokens: Most tokens, padding included, in one forward and backward pass, at least
            1. A longer comparison has a pass alone. The gradient does not depend on it. None takes
            `TOKENS_PER_PASS`.
        bf16: Compute in bfloat16 (autocast); the weights stay float32.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
            Each candidate's pass then repeats the prompt.
        lora_rank: Rank of LoRA adapters on every linear layer, at least 1. Only they and the head
            are trained, and they are merged into the weights at the end. None trains all weights.
        share_prompts: Compute a prompt once for all its candidates, if the model allows it.
        patience: Stop after this many evaluations in a row without a lower validation loss, at
            least 1, and restore the best weights. There are four evaluations per epoch. None never
            stops early.
        seed: Seed of the order of the comparisons.
    """

    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    microbatch_tokens: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    share_prompts: bool = True
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges now. Later, a bad value would fail obscurely or be ignored silently.

        Raises:
            InputError: An option is out of range.
        """
        for name in ("epochs", "learning_rate", "batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("microbatch_tokens", "lora_rank", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be None or at least 1, not {value}")


class _Choices(nn.Module):
    """The module that the Trainer trains: candidates of a micro-batch in, their logits out."""

    def __init__(self, reward_model: RewardModel, share_prompts: bool) -> None:
        super().__init__()
        self.reward_model = reward_model
        self.share_prompts = share_prompts

    def forward(self, prompts: Tensor, candidates: Tensor, sizes: Tensor) -> Tensor:
        return self.reward_model.compare(prompts, candidates, sizes, share=self.share_prompts)


class _Trainer(Trainer):
    """A Trainer whose step accumulates gradients over micro-batches of whole comparisons."""

    validation: Sequence[EncodedComparison] = ()
    max_tokens: int

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        model.train()
        prepared: dict[str, Any] = self._prepare_inputs(inputs)
        total = torch.zeros((), device=self.args.device)
        for part in prepared["parts"]:
            with self.compute_loss_context_manager():
                # Divide by the number of comparisons in the whole step, so that the gradient does
                # not depend on the micro-batches.
                loss = _losses(model, part).sum() / len(prepared["labels"])
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the mean negative log-likelihood of the validation comparisons."""
        model = self.model
        assert model is not None
        model.eval()
        losses = []
        for part in microbatches(self.validation, self.max_tokens):
            with self.compute_loss_context_manager():
                losses.append(_losses(model, self._prepare_inputs(part)).sum())
        metrics = {"eval_loss": float(torch.stack(losses).sum()) / len(self.validation)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _losses(model: nn.Module, part: dict[str, Any]) -> Tensor:
    """Return each comparison's loss, a mean over the heads: (N,)."""
    logits = model(part["prompts"], part["candidates"], part["sizes"])
    sets = ChoiceSets(*part["sets"])
    return torch.stack([choice_loss(head.float(), sets) for head in logits.unbind(1)], 1).mean(1)


def microbatches(
    comparisons: Sequence[EncodedComparison], max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield micro-batches of comparisons of similar length.

    Each has at most `max_tokens` tokens, padding included, or is one longer comparison.
    """
    order = sorted(comparisons, key=lambda c: c.width)
    group: list[EncodedComparison] = []
    rows = 0
    for comparison in order:
        rows += len(comparison.candidates)
        if group and rows * comparison.width > max_tokens:
            yield _tensors(group)
            group, rows = [], len(comparison.candidates)
        group.append(comparison)
    if group:
        yield _tensors(group)


def _tensors(group: Sequence[EncodedComparison]) -> dict[str, Any]:
    sizes = [len(c.candidates) for c in group]
    sets = ChoiceSets.of([c.choices for c in group], sizes)
    return {
        "prompts": torch.from_numpy(pad_rows([c.prompt for c in group])),
        "candidates": torch.from_numpy(pad_rows([row for c in group for row in c.candidates])),
        "sizes": torch.tensor(sizes),
        "sets": tuple(sets),
    }


def _tokens_per_pass(device: torch.device, asked: int | None) -> int:
    return asked or TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS["cpu"])


def train_reward_model(
    model: RewardModel,
    comparisons: Sequence[EncodedComparison],
    options: RewardTraining,
    *,
    checkpoint_dir: str | Path,
    validation: Sequence[EncodedComparison] = (),
    resume: bool = False,
    checkpoints: bool = True,
    progress: bool = True,
) -> None:
    """Train a reward model in place to maximise the likelihood of the choices.

    Args:
        model: A model from `RewardModel.from_backbone`, or a trained one.
        comparisons: Training comparisons. K may differ from one to the next.
        options: Options of the training.
        checkpoint_dir: Folder for the Trainer's checkpoints.
        validation: Comparisons for early stopping.
        resume: Whether to continue from the last checkpoint.
        checkpoints: Whether to write checkpoints. Early stopping writes them in any case, because
            it restores the best one.
        progress: Whether to show progress on stderr.

    Raises:
        InputError: `patience` is given without validation comparisons, or the model has an encoder
            and a decoder.
    """
    if model.model.config.is_encoder_decoder:
        raise InputError(
            f"{model.model.name_or_path!r} has an encoder and a decoder, and such models cannot be "
            "trained here; use a causal model or an encoder"
        )
    if options.patience is not None and not validation:
        raise InputError(
            "early stopping (patience) needs validation comparisons; set validation above 0"
        )
    tuner = _adapters(model, options.lora_rank) if options.lora_rank else None
    max_tokens = _tokens_per_pass(model.device, options.microbatch_tokens)

    def collate(batch: list[EncodedComparison]) -> dict[str, Any]:
        # The Trainer reads the batch size from `labels`. `training_step` computes the parts.
        return {"labels": torch.zeros(len(batch)), "parts": list(microbatches(batch, max_tokens))}

    if options.gradient_checkpointing:
        recompute_activations(model.model, True)
    model.train()
    with RichProgress("reward model", shown=progress) as bar:
        callbacks: list[TrainerCallback] = [bar]
        if options.patience is not None:
            callbacks.append(EarlyStoppingCallback(options.patience))
        trainer = _Trainer(
            model=_Choices(model, options.share_prompts),
            args=_arguments(options, checkpoint_dir, len(comparisons), model.device, checkpoints),
            train_dataset=list(comparisons),
            eval_dataset=list(validation) or None,
            data_collator=collate,
            callbacks=callbacks,
        )
        trainer.validation, trainer.max_tokens = validation, max_tokens
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_checkpoint(Path(checkpoint_dir)) if resume else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if options.gradient_checkpointing:
        recompute_activations(model.model, False)
    if tuner is not None:
        tuner.merge_and_unload()
        model.requires_grad_(True)
    model.eval()


def _arguments(
    options: RewardTraining,
    folder: str | Path,
    n: int,
    device: torch.device,
    checkpoints: bool,
) -> TrainingArguments:
    steps = max(1, int(np.ceil(n / options.batch_size) * options.epochs))
    every = max(1, steps // max(4, round(4 * options.epochs)))
    stopping: dict[str, Any] = {}
    if options.patience is not None:
        stopping = {
            "eval_strategy": "steps",
            "eval_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": False,
            # A resumed run must keep its count of evaluations without improvement.
            "restore_callback_states_from_checkpoint": True,
        }
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 20,
        weight_decay=options.weight_decay,
        max_grad_norm=1.0,
        bf16=options.bf16,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=max(1, steps // 50),
        # Early stopping restores the best checkpoint, so it needs checkpoints in any case.
        save_strategy="steps" if checkpoints or stopping else "no",
        save_steps=every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        **stopping,
    )
    # Use one GPU even if there are more: torch's DataParallel would split comparisons.
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1
    return arguments


def _adapters(model: RewardModel, rank: int) -> Any:
    """Add LoRA adapters to the trunk's linear layers. Only they and the head are trained."""
    head = model.head
    tuner = add_adapters(model.model, rank, task_type="SEQ_CLS")
    head.requires_grad_(True)  # adding adapters has frozen the head too
    return tuner
