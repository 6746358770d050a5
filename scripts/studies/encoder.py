"""Pretrain a small bidirectional encoder on texts by masked language modelling."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from rlhf_gym.training.trainer_progress import RichProgress
from rlhf_gym.utils.files import whole_folder

LONGEST = 64


def make_encoder(
    rows: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    layers: int,
    epochs: float,
    seed: int = 0,
) -> None:
    """Pretrain and save a ModernBERT of width 64 with mean pooling.

    Args:
        rows: Token ids of texts, at most 64 per text.
        tokenizer: Tokenizer of the texts. Its <unk>, which no text has, becomes the mask token.
        folder: Folder to save model and tokenizer to, atomically.
        layers: Number of layers. Every third layer, starting with the first, attends to all tokens;
            the others attend to the 8 tokens on each side.
        epochs: Passes over the rows.
        seed: Seed of weights, order of the texts and masks.
    """
    tokenizer.mask_token = tokenizer.unk_token
    torch.manual_seed(seed)
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            local_attention=16,
            global_attn_every_n_layers=3,
            max_position_embeddings=LONGEST,
            initializer_range=0.05,
            classifier_pooling="mean",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            cls_token_id=tokenizer.bos_token_id,
            sep_token_id=tokenizer.eos_token_id,
        )
    )
    with tempfile.TemporaryDirectory() as work, RichProgress("encoder") as progress:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=work,
                num_train_epochs=epochs,
                per_device_train_batch_size=256,
                learning_rate=2e-3,
                lr_scheduler_type="linear",
                warmup_steps=100,
                adam_beta2=0.98,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=[{"input_ids": list(row)} for row in rows],
            data_collator=DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=0.2, seed=seed
            ),
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
