"""`python scripts/assets/exact.py --output DIR` rebuilds the models and prompts of Exact-v0.

A Markov chain over eight letters → strings → reference (SFT from scratch) → for each variant,
comparisons chosen by its labeller → reward model. At the end the script prints the exact optimum of
each variant.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.cli.command import run
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.data.prompt_rows import load_texts
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.preferences.collect import collect_comparisons
from rlhf_gym.preferences.encoded import candidate_rows, encode_comparisons
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tasks.exact import LETTERS, VARIANTS, defaults
from rlhf_gym.tasks.text import load_parts
from rlhf_gym.tokens import continuations
from rlhf_gym.training.reward_training import RewardTraining, train_reward_model
from rlhf_gym.training.sft import train_sft
from rlhf_gym.training.sft_data import SFTExample, prepare
from rlhf_gym.utils.files import whole_folder, write_json
from rlhf_gym.utils.progress import progress_bar

LONGEST = 12


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    output: Path
    """Folder to write reference/, reward_<variant>/ and prompts.json to."""
    strings: int = 20_000
    """Strings to train the reference on."""
    comparisons: int = 12_000
    """Comparisons to train each reward model on."""
    seed: int = 0
    """Seed of everything."""
    threads: int = 1
    """Threads; other numbers give other weights."""


def main(config: Config) -> None:
    """Make the missing parts one after another, and print the optima."""
    torch.set_num_threads(config.threads)
    work = config.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "prompts.json", list(LETTERS))
    if not (config.output / "reference").exists():
        make_reference(config, work)
    for variant in VARIANTS:
        if not (config.output / f"reward_{variant}").exists():
            make_reward_model(config, work, variant)
    shutil.rmtree(work)
    for variant in VARIANTS:
        print(variant, *optimum(config, variant))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per letter and the EOS; spaces separate the letters."""
    ids = {token: i for i, token in enumerate([*LETTERS, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def make_reference(config: Config, work: Path) -> None:
    """Train the reference, a Llama of 25,000 parameters, on strings of a Markov chain."""
    rng = np.random.default_rng(config.seed)
    chain = rng.dirichlet(np.full(len(LETTERS), 0.8), size=len(LETTERS))
    tokenizer = make_tokenizer()
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    lm = CausalLM.wrap(model, tokenizer)
    examples = []
    for i in range(config.strings):
        letters = [int(rng.integers(len(LETTERS)))]
        # After each letter, a string ends with probability 1 / 6.
        while len(letters) < LONGEST and rng.random() > 1 / 6:
            letters.append(int(rng.choice(len(LETTERS), p=chain[letters[-1]])))
        examples.append(SFTExample((letters[0],), tuple(letters[1:]), held_out=i % 20 == 0))
    train_sft(
        lm,
        prepare(lm, examples, max_tokens=LONGEST + 1, eos_token_id=tokenizer.eos_token_id),
        work,
        learning_rate=3e-3,
        batch_tokens=1024,
        packing=False,
        seed=config.seed,
    )
    (work / "policy").rename(config.output / "reference")


def make_reward_model(config: Config, work: Path, variant: str) -> None:
    """Train a variant's reward model from the reference, and normalise its scores."""
    reference = str(config.output / "reference")
    lm = CausalLM.load(reference)
    prompts = PromptDataset.from_texts(
        load_texts(str(config.output / "prompts.json")), lm.tokenizer, lm.eos_ids, 1
    )
    budget = defaults(variant)["max_new_tokens"]
    with progress_bar(f"{variant}: comparisons", config.comparisons) as advance:
        comparisons = collect_comparisons(
            # A higher temperature, so that rare responses are labelled too.
            dataclasses.replace(lm, temperature=1.5),
            prompts,
            VARIANTS[variant],
            config.comparisons,
            max_new_tokens=budget,
            seed=config.seed,
            progress=advance,
        )
    torch.manual_seed(config.seed)
    model = RewardModel.from_backbone(reference)
    encoded, _ = encode_comparisons(comparisons, model, None)
    model.start_at(candidate_rows(encoded, 1024))
    options = RewardTraining(epochs=2.0, batch_size=32, learning_rate=2e-3, seed=config.seed)
    train_reward_model(model, encoded, options, checkpoint_dir=work / variant)
    asked = torch.tensor(prompts.ids).repeat(512, 1)
    generator = torch.Generator().manual_seed(config.seed)
    replies = sample_responses(lm, asked, budget, generator=generator)
    model.normalise(continuations(asked, replies).tokens)
    with whole_folder(config.output / f"reward_{variant}") as partial:
        model.save_pretrained(partial)


def optimum(config: Config, variant: str) -> list[str]:
    """Return the optimum of a variant and its reference points, as printable texts."""
    keywords = defaults(variant) | {
        "reference": str(config.output / "reference"),
        "reward_model": str(config.output / f"reward_{variant}"),
        "prompts": str(config.output / "prompts.json"),
    }
    parts = load_parts(**keywords, split="all", device="cpu")
    task = Enumeration(
        parts["objective"], parts["prompts"].ids, max_new_tokens=parts["max_new_tokens"]
    )
    best = task.value(task.optimum)
    return [
        f"J_ref {task.value(task.reference).objective.mean():.4f}",
        f"J* {best.objective.mean():.4f}",
        f"KL(π*‖π_ref) {best.kl.mean():.3f} nats",
        f"best-of-16 {task.optimality(task.best_of_n(16).objective):.3f}",
        f"best deterministic {task.optimality(task.best_deterministic.objective):.3f}",
    ]


if __name__ == "__main__":
    run(main, Config, __doc__)
