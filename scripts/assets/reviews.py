"""`python scripts/assets/reviews.py --output DIR` rebuilds the models and prompts of Reviews-v0.

Grammar → reviews → reference (SFT from scratch) → comparisons among its own samples, chosen by the
simulated human → reward model. At the end the script prints hashes of the weights. They are
reproducible with the same versions, thread count and kind of CPU.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.cli.command import run
from agents.cli.train_reward_model import Config as RewardConfig
from agents.cli.train_reward_model import main as train_reward
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.data.prompt_rows import load_texts
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.preferences.collect import collect_comparisons
from rlhf_gym.preferences.comparison import write_comparisons
from rlhf_gym.rewards import human
from rlhf_gym.tasks.grammar import sample_review, vocabulary
from rlhf_gym.tasks.reviews import DEFAULTS
from rlhf_gym.training.sft import train_sft
from rlhf_gym.training.sft_data import SFTExample, prepare
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.progress import progress_bar

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
MARKS = [".", ",", "!"]


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    output: Path
    """Folder to write reference/, reward_model/ and prompts.json to."""
    reviews: int = 60_000
    """Reviews to train the reference on."""
    comparisons: int = 20_000
    """Comparisons to train the reward model on."""
    seed: int = 0
    """Seed of everything."""
    threads: int = 2
    """Threads; other numbers give other hashes."""


def main(config: Config) -> None:
    """Make the missing parts one after another, and print the hashes."""
    torch.set_num_threads(config.threads)
    work = config.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    make_prompts(config.output / "prompts.json", rng)
    if not (config.output / "reference").exists():
        make_reference(config, work, rng)
    if not (config.output / "reward_model").exists():
        make_reward_model(config, work)
    shutil.rmtree(work)
    for file in sorted(config.output.rglob("*.safetensors")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"{digest}  {file.relative_to(config.output)}")


def make_prompts(file: Path, rng: np.random.Generator) -> None:
    """Write the openings of 2,000 reviews: their first 4 to 8 words."""
    openings = [
        " ".join(sample_review(rng).split()[: int(rng.integers(4, 9))]) for _ in range(2000)
    ]
    write_json(file, openings)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of the grammar, including the space before it."""
    words = ["▁" + word for word in vocabulary() if word not in MARKS]
    ids = {token: i for i, token in enumerate([*SPECIAL, *MARKS, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("[.,!]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_reference(config: Config, work: Path, rng: np.random.Generator) -> None:
    """Train the reference, a Llama of 0.85 M parameters, on reviews from scratch."""
    tokenizer = make_tokenizer()
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=336,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    lm = CausalLM.wrap(model, tokenizer)
    print(f"reference: {sum(p.numel() for p in model.parameters()):,} parameters")
    bos = (tokenizer.bos_token_id,)
    examples = []
    for i in range(config.reviews):
        ids = tokenizer(sample_review(rng), add_special_tokens=False)["input_ids"]
        examples.append(SFTExample(bos, tuple(ids), held_out=i % 50 == 0))
    figures = train_sft(
        lm,
        prepare(lm, examples, max_tokens=64, eos_token_id=tokenizer.eos_token_id),
        work,
        learning_rate=2e-3,
        batch_tokens=2200,
        packing=False,
        seed=config.seed,
    )
    print(f"reference: {_shown(figures['held_out_loss_after'])} nats per token on held-out reviews")
    (work / "policy").rename(config.output / "reference")


def make_reward_model(config: Config, work: Path) -> None:
    """Train the reward model from the reference, on simulated human choices."""
    reference = str(config.output / "reference")
    lm = CausalLM.load(reference)
    prompts = PromptDataset.from_texts(
        load_texts(str(config.output / "prompts.json")),
        lm.tokenizer,
        lm.eos_ids,
        DEFAULTS["max_prompt_tokens"],
    )
    file = work / "comparisons.jsonl"
    if not file.exists():
        with progress_bar("comparisons", config.comparisons) as advance:
            comparisons = collect_comparisons(
                lm,
                prompts,
                human.compound,
                config.comparisons,
                max_new_tokens=DEFAULTS["max_new_tokens"],
                seed=config.seed,
                progress=advance,
            )
        write_comparisons(file, comparisons)
    train_reward(
        RewardConfig(
            data=str(file), backbone=reference, run_dir=work, epochs=2.0, learning_rate=1e-3, seed=0
        )
    )
    (work / "reward_model").rename(config.output / "reward_model")


def _shown(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.3f} ± {figure['se']:.3f}"


if __name__ == "__main__":
    run(main, Config, __doc__)
