"""`python scripts/studies/preferences.py --data NAME FILE …` asks how well models predict people.

It uses cross-validation over prompts. For every data set and backbone it trains k models and
evaluates each on the fold that it was not trained on. Two baselines are evaluated on the same fold:
a bag of words fitted to the same training folds, and the rule "the longest is the best". The script
writes results.jsonl (one line per model; a second run skips finished lines), preferences.json and
the table preferences.md into the run folder. The backbone `fresh` is a small Llama without any
pretraining, whose tokenizer is trained on the training folds.
"""

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from agents.cli.command import device, run
from agents.runs.setup import begin_run, check_same_run
from rlhf_gym.data.prompts import PLAIN_TEMPLATE
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.reward_models import (
    bag_of_words,
    baseline,
    clustered,
    longest,
    predictions,
    prompt_numbers,
)
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import TooLong, candidate_rows, encode_comparisons
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.preferences.splits import folds
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.reward_training import RewardTraining, train_reward_model
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.files import whole_lines, write_json

FRESH = "fresh"


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    data: dict[str, str]
    """Data sets, NAME FILE …, in any format of rlhf_gym/preferences/known_formats.py."""
    backbones: dict[str, str] = field(default_factory=dict)
    """Backbones, NAME MODEL …; by default the model `fresh`, which this script makes."""
    k_folds: int = 5
    """Folds of the cross-validation."""
    epochs: float = 1.0
    """Passes over the training folds."""
    batch_size: int = 16
    """Comparisons per update."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    max_tokens: int = 512
    """Maximum length of prompt + candidate, in tokens."""
    too_long: TooLong = "cut_turns"
    """Treatment of longer comparisons. The baselines leave out the same ones."""
    on_bad_row: Literal["error", "skip"] = "skip"
    """Treatment of a row that is not a comparison: stop, or skip and print it."""
    run_dir: Path = Path("runs/preferences")
    """Folder to write to."""
    seed: int = 0
    """Seed of heads, fresh models and the order of training."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Cross-validate every backbone on every data set."""
    plain = dataclasses.asdict(config)
    # These may differ between runs, so that more of them can be added later under new names.
    fixed = {k: v for k, v in plain.items() if k not in ("data", "backbones")}
    check_same_run(config.run_dir, fixed, resume=True)
    begin_run(config.run_dir, fixed)
    file = config.run_dir / "results.jsonl"
    lines = map(json.loads, whole_lines(file))
    done = {(r["data"], r["backbone"], r["fold"]): r for r in lines}
    table = []
    for name, source in config.data.items():
        skipped: list[str] = []
        comparisons = read_comparisons(
            source, skipped=skipped if config.on_bad_row == "skip" else None
        )
        for problem in skipped:
            print(f"skipped: {problem}")
        fold = folds(comparisons, config.k_folds)
        for label, backbone in (config.backbones or {FRESH: FRESH}).items():
            results = []
            for i in range(config.k_folds):
                key = (name, label, i)
                if key in done and (done[key]["source"], done[key]["model_name"]) != (
                    source,
                    backbone,
                ):
                    raise InputError(
                        f"{file} has results for {name} and {label} from another file or model; "
                        "choose another name, or another --run-dir"
                    )
                if key not in done:
                    train = [c for c, f in zip(comparisons, fold, strict=True) if f != i]
                    test = [c for c, f in zip(comparisons, fold, strict=True) if f == i]
                    done[key] = dict(zip(("data", "backbone", "fold"), key, strict=True))
                    done[key] |= {"source": source, "model_name": backbone}
                    done[key] |= cross(config, backbone, train, test)
                    with file.open("a") as out:
                        out.write(json.dumps(done[key]) + "\n")
                results.append(done[key])
                print({k: v for k, v in done[key].items() if not isinstance(v, list)})
            table.append({"data": name, "backbone": label, "skipped": len(skipped)})
            table[-1] |= pooled(results)
    write_json(config.run_dir / "preferences.json", {"config": plain, "rows": table})
    (config.run_dir / "preferences.md").write_text(markdown(table))
    print(markdown(table))


def cross(
    config: Config, backbone: str, train: list[Comparison], test: list[Comparison]
) -> dict[str, Any]:
    """Train on some folds and evaluate on another; return the score per comparison and judge."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(config.seed)
        if backbone == FRESH:
            backbone = make_fresh(train, Path(folder) / "fresh", config)
        model = RewardModel.from_backbone(backbone, device=device(config.device))
        if not model.tokenizer.chat_template:
            model.tokenizer.chat_template = PLAIN_TEMPLATE
        sides = [
            encode_comparisons(part, model, config.max_tokens, too_long=config.too_long)
            for part in (train, test)
        ]
        (learned, _), (judged, fit_test) = sides
        model.start_at(candidate_rows(learned, 1024).to(model.device))
        options = RewardTraining(
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=config.seed,
        )
        train_reward_model(model, learned, options, checkpoint_dir=Path(folder) / "checkpoints")
    said = predictions(model, judged)
    seen = [c.comparison for c in learned]
    plain = said.comparisons
    words, length = baseline(bag_of_words(seen), plain), baseline(longest, plain)
    return {
        "train": len(learned),
        "whole": fit_test.whole,
        "cut": fit_test.cut,
        "dropped": fit_test.dropped,
        "seconds": time.perf_counter() - begun,
        "prompts": prompt_numbers(plain).tolist(),
        "model": said.pairwise.tolist(),
        "top1": said.top1.tolist(),
        "bag_of_words": words.pairwise.tolist(),
        "longest": length.pairwise.tolist(),
        "bag_of_words_top1": words.top1.tolist(),
        "longest_top1": length.top1.tolist(),
    }


def pooled(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Pool the folds: one figure per judge, with a bootstrap interval over prompts."""
    prompts = np.concatenate(
        # Numbers are unique only within a fold. Near-duplicate prompts are always in one fold.
        [np.array(r["prompts"]) + 1_000_000 * r["fold"] for r in results]
    )

    def all_of(name: str) -> Floats:
        return np.concatenate([np.array(r[name], dtype=np.float64) for r in results])

    row: dict[str, Any] = {
        name: sum(r[name] for r in results) for name in ("whole", "cut", "dropped", "seconds")
    }
    for name in ("model", "bag_of_words", "longest", "top1", "bag_of_words_top1", "longest_top1"):
        row[name] = clustered(all_of(name), prompts)
    for other in ("bag_of_words", "longest"):
        row[f"model_minus_{other}"] = clustered(all_of("model") - all_of(other), prompts)
    return row


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    head = (
        "| data | backbone | comparisons | cut | dropped | bad rows | model | bag of words | "
        "longest | model − bag of words |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def cell(figure: dict[str, float]) -> str:
        return (
            f"{figure['value']:.3f} ± {figure['se']:.3f} [{figure['low']:.3f}, "
            f"{figure['high']:.3f}]"
        )

    return head + "".join(
        f"| {r['data']} | {r['backbone']} | {r['whole'] + r['cut']} | {r['cut']} | "
        f"{r['dropped']} | {r['skipped']} | {cell(r['model'])} | {cell(r['bag_of_words'])} | "
        f"{cell(r['longest'])} | {cell(r['model_minus_bag_of_words'])} |\n"
        for r in table
    )


def make_fresh(train: list[Comparison], folder: Path, config: Config) -> str:
    """Write an untrained Llama (2 layers, width 128) and a byte-level BPE of 4,096 tokens."""
    texts = [text for c in train for text in c.candidates]
    if not texts:
        raise InputError("the backbone `fresh` needs training comparisons for its tokenizer")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=336,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=config.max_tokens,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    run(main, Config, __doc__)
