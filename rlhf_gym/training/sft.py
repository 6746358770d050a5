"""Supervised fine-tuning (SFT): train a causal LM to give the responses of a dataset.

The loss of an update is the mean of -log p(token | state) over all its response tokens, EOS
included. Prompt tokens and padding have no loss.
"""

import inspect
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.tokens import row_sums
from rlhf_gym.training.sft_data import (
    IGNORED,
    SFTData,
    SFTExample,
    as_sequences,
    collate,
    collate_alone,
    pack,
)
from rlhf_gym.training.trainer_progress import RichProgress
from rlhf_gym.utils.files import folder_or_temporary, last_checkpoint, whole_folder

logger = logging.getLogger(__name__)

# Limits of a micro-batch. This many logits take 2 GiB with their gradient.
MAX_TOKENS = 1 << 14
MAX_LOGITS = 1 << 27


def response_loss(
    lm: CausalLM, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the sum of -log p over the labelled tokens, divided by their number in the update.

    The Trainer passes that number, `num_items_in_batch`, so that the gradient of an update does not
    depend on its micro-batches. None divides by the number in this micro-batch.
    """
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    logits = outputs.logits[:, :-1][learnt][:, : lm.vocab_size].float() / lm.temperature
    total = F.cross_entropy(logits, targets[learnt], reduction="sum")
    return total / (learnt.sum() if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def can_pack(lm: CausalLM, examples: Sequence[SFTExample], tolerance: float = 1e-4) -> bool:
    """Return whether the model keeps the examples of a packed row apart.

    Model families differ in this and do not declare it, so this compares the loss of two examples
    in one row with their loss in separate rows. `tolerance` is in nats per token.
    """
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return False
    pair = [e._replace(prompt_ids=(), response_ids=e.ids[:16]) for e in (*examples, *examples)[:2]]
    inputs = {name: value.to(lm.device) for name, value in collate([pair]).items()}
    labels = inputs.pop("labels")
    packed = response_loss(lm, lm.model(**inputs, use_cache=False), labels)
    alone = -lm.log_probs(as_sequences(pair).to(lm.device)).mean()
    return abs(float(packed - alone)) < tolerance


def response_nll(lm: CausalLM, examples: Sequence[SFTExample]) -> dict[str, float] | None:
    """Compute the mean -log p of a response token in nats; None without examples.

    Every token has the same weight. The standard error is that of a ratio of sums over independent
    examples.

    Returns:
        value, se and n, the number of examples.
    """
    if not examples:
        return None
    sequences = as_sequences(sorted(examples, key=lambda e: len(e.ids))).to(lm.device)
    sums = -row_sums(lm.log_probs(sequences), sequences.lengths)
    value = float(sums.sum() / sequences.lengths.sum())
    residuals = sums - value * sequences.lengths
    error = float(residuals.square().sum().sqrt() / sequences.lengths.sum())
    return {"value": value, "se": error, "n": len(examples)}


def train_sft(
    lm: CausalLM,
    data: SFTData,
    run_dir: str | Path | None,
    *,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    batch_tokens: int = 8192,
    packing: bool = True,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune `lm.model` in place and save it with its tokenizer in ``run_dir/policy``.

    The optimiser is AdamW without weight decay, and gradients are clipped to norm 1. The learning
    rate rises over the first 5 % of the updates (not at all with fewer than 20) and then falls to 0
    along a cosine. Checkpoints go to ``run_dir/checkpoints_sft``.

    Args:
        lm: The model, on the device to train on.
        data: The data that `prepare` made for this model.
        run_dir: Folder of the run; None writes neither checkpoints nor policy.
        epochs: Passes over the data.
        learning_rate: Peak of the learning rate.
        batch_tokens: Approximate tokens per update, prompts included.
        packing: Whether to put several examples into one row (if the model can keep them apart).
        seed: Seed of the order of the data.
        resume: Whether to continue from the last checkpoint. If False, checkpoints are deleted.
        progress: Whether to show progress on stderr.

    Returns:
        The figures. Losses are in nats per response token, `response_nll` of the held-out
        examples.
    """
    packed = packing and can_pack(lm, data.train)
    if packing and not packed:
        logger.warning(
            "%s does not keep packed examples apart; training with one example per row instead",
            type(lm.model).__name__,
        )
    rows = pack(data.train, data.max_tokens) if packed else [[e] for e in data.train]
    before = response_nll(lm, data.held_out)
    with folder_or_temporary(run_dir) as folder:
        checkpoints = folder / "checkpoints_sft"
        if not resume:
            shutil.rmtree(checkpoints, ignore_errors=True)
        arguments = _arguments(
            lm,
            rows,
            batch_tokens,
            epochs,
            output_dir=str(checkpoints),
            save_strategy="no" if run_dir is None else "steps",
            learning_rate=learning_rate,
            seed=seed,
        )
        collator = collate if packed else collate_alone
        now, updates, seconds = _fit(lm, rows, collator, arguments, progress)
    after = response_nll(lm, data.held_out)
    if run_dir is not None:
        save(lm, Path(run_dir) / "policy")
    tokens = sum(len(e.ids) for e in data.train)
    return {
        "examples": len(data.train),
        "held_out_examples": len(data.held_out),
        "cut": data.cut,
        "dropped": data.dropped,
        "eos_token_id": data.eos_token_id,
        "packed": packed,
        "rows": len(rows),
        "tokens": tokens,
        "response_tokens": sum(len(e.ids) - e.start for e in data.train),
        "updates": updates,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "perplexity_before": before and math.exp(before["value"]),
        "perplexity_after": after and math.exp(after["value"]),
        "seconds": seconds,
        "tokens_per_second": now / updates * epochs * tokens / seconds,
    }


def _arguments(
    lm: CausalLM,
    rows: Sequence[Sequence[SFTExample]],
    batch_tokens: int,
    epochs: float,
    **options: Any,
) -> TrainingArguments:
    lengths = [sum(len(example.ids) for example in row) for row in rows]
    wanted = min(max(round(batch_tokens * len(rows) / sum(lengths)), 1), len(rows))
    fitting = max(min(MAX_TOKENS, MAX_LOGITS // lm.vocab_size) // max(lengths), 1)
    accumulate = math.ceil(wanted / fitting)
    batch = math.ceil(wanted / accumulate)
    per_epoch = math.ceil(math.ceil(len(rows) / batch) / accumulate)
    on_cpu = lm.device.type == "cpu"
    arguments = TrainingArguments(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type="cosine",
        # Rounded down: the first update of a warm-up has the rate 0, and it may be the only one.
        warmup_steps=math.ceil(epochs * per_epoch) // 20,
        num_train_epochs=epochs,
        max_grad_norm=1.0,
        logging_steps=0.01,
        save_steps=0.1,
        save_total_limit=1,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise the Trainer wraps the model in nn.DataParallel
    return arguments


def _fit(
    lm: CausalLM,
    rows: list[list[SFTExample]],
    collator: Callable[[Sequence[Sequence[SFTExample]]], dict[str, Tensor]],
    arguments: TrainingArguments,
    shown: bool,
) -> tuple[int, int, float]:
    """Train. Return the updates of this call, the updates in all, and the seconds of this call."""
    checkpoint = last_checkpoint(Path(str(arguments.output_dir)))
    use_cache = lm.model.config.use_cache
    _check_saveable(lm)
    began = time.monotonic()
    with RichProgress("fine-tuning", shown=shown) as bar:
        trainer = Trainer(
            model=lm.model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            compute_loss_func=partial(response_loss, lm),
            callbacks=[bar],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # The Trainer switches the cache off, and this would be saved with the model.
    lm.model.config.use_cache = use_cache
    lm.model.eval()
    first = int(checkpoint.name.split("-")[-1]) if checkpoint else 0
    updates = trainer.state.global_step
    return updates - first, updates, time.monotonic() - began


def _check_saveable(lm: CausalLM) -> None:
    """Set `do_sample` if the generation config has sampling options without it.

    `save_pretrained` refuses such a config, which would be at the end of the training.
    """
    generation = lm.model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def save(lm: CausalLM, folder: Path) -> None:
    """Save model and tokenizer. `folder` appears only when it is complete."""
    with whole_folder(folder) as partial:
        lm.save_pretrained(partial)
