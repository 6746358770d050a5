"""`python scripts/train_reward_model.py --data FILE --backbone MODEL` trains a reward model.

Listwise: P(y_i | x) is the softmax over the K candidates of a comparison, and the loss the
negative log-likelihood of the human's choice. Writes reward_model/ (model and tokenizer, for
transformers' from_pretrained), reward_model.json (held-out accuracy and baselines) and
config.json into the run folder. Stopped midway, the same command goes on from the last checkpoint.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import begin_run, check_same_run, device, run

from rlhf_gym.files import whole_folder, write_json
from rlhf_gym.preferences import read_comparisons
from rlhf_gym.reward_model import RewardModel
from rlhf_gym.tokens import pad_rows
from rlhf_gym.training.reward import (
    encode_comparisons,
    judge_reward_model,
    split_comparisons,
    train_reward_model,
)


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    data: Path
    """Comparisons: JSON Lines with prompt, candidates and best, or with chosen and rejected."""
    backbone: str
    """Causal LM or classifier to start from: a hub name or a local path."""
    run_dir: Path = Path("runs/reward_model")
    """Folder to write to."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    seed: int = 0
    """Seed of the head's start and of the data's order."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda."""
    epochs: float = 1.0
    """Passes over the comparisons."""
    batch_size: int = 32
    """Comparisons an update."""
    learning_rate: float = 5e-4
    """Peak of the learning rate. Models of 100 M parameters and more want 1e-5 to 5e-5."""
    max_tokens: int | None = None
    """Longest prompt + candidate; comparisons with a longer one are dropped and counted. By
    default the model's context."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is no comparison: stop, or leave it out and say so."""
    held_out: float = 0.1
    """Share of the comparisons that is held out, split by prompt."""


def main(config: Config) -> dict[str, Any]:
    """Read, train, judge, normalise, save; the figures."""
    check_same_run(config.run_dir, asdict(config), resume=True)
    figures_file = config.run_dir / "reward_model.json"
    if figures_file.exists():
        print(f"{figures_file} is there already: nothing to do; another --run-dir starts a new run")
        return {}
    skipped: list[str] = []
    comparisons = read_comparisons(config.data, skipped if config.on_bad_row == "skip" else None)
    for problem in skipped:
        print(f"skipped: {problem}")
    train, test = split_comparisons(comparisons, config.held_out)
    torch.manual_seed(config.seed)
    model = RewardModel.from_backbone(
        config.backbone, revision=config.revision, device=device(config.device)
    )
    context = getattr(model.model.config, "max_position_embeddings", None)
    longest = config.max_tokens or context
    encoded, dropped = encode_comparisons(train, model, longest)
    held_out, dropped_test = encode_comparisons(test, model, longest)
    print(
        f"{len(encoded)} comparisons to learn, {len(held_out)} held out; "
        f"{dropped + dropped_test} dropped as longer than {longest} tokens"
    )
    begin_run(config.run_dir, asdict(config))
    before = judge_reward_model(model, held_out)
    train_reward_model(
        model,
        encoded,
        checkpoint_dir=config.run_dir / "checkpoints_reward",
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        resume=True,
    )
    figures: dict[str, Any] = {
        "comparisons": len(encoded),
        "held_out": len(held_out),
        "dropped": dropped + dropped_test,
        "skipped": len(skipped),
        "accuracy_untrained": before["accuracy"],
        **judge_reward_model(model, held_out),
    }
    # Held-out candidates: on the training ones an overfitted logit would spread more.
    rows = [row for comparison in held_out for row in comparison.rows]
    model.normalise(torch.from_numpy(pad_rows(rows)).to(model.device))
    figures |= {"gain": model.gain, "bias": model.bias}
    with whole_folder(config.run_dir / "reward_model") as folder:
        model.save_pretrained(folder)
    write_json(figures_file, figures)
    shutil.rmtree(config.run_dir / "checkpoints_reward", ignore_errors=True)
    print(summary(figures))
    return figures


def summary(figures: dict[str, Any]) -> str:
    """One line: accuracy beside its baselines."""
    accuracy, longest = figures["accuracy"], figures["accuracy_longest"]
    return (
        f"held-out accuracy {accuracy['value']:.3f} ± {accuracy['se']:.3f} "
        f"({accuracy['n']} comparisons); always the longest {longest['value']:.3f}, chance "
        f"{figures['accuracy_chance']['value']:.3f}; NLL {figures['nll']['value']:.3f} nats"
    )


if __name__ == "__main__":
    run(main, Config, __doc__)
