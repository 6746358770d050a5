"""`python scripts/studies/labeller.py` measures how well a reward model recovers a known labeller.

In Reviews-v0 the labeller is known: P(choice) = softmax(VADER compound / temperature). So the best
possible accuracy, the Bayes rate, is known too. The script trains a reward model, or several
(--members), for each seed, number of comparisons and loss (listwise over K = 4, or the three pairs
that contain the chosen candidate). It evaluates them on held-out comparisons: mean
KL(P_labeller ‖ P_model) and expected top-1 accuracy. It writes pool.jsonl, results.csv (one row per
model; a second run skips finished rows), labeller.json and labeller.png into the run folder.
"""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from encoder import make_encoder

from agents.cli.command import device, run
from agents.runs.experiments import read_rows
from agents.runs.setup import begin_run, check_same_run, make_env
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.reward_models import predictions
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.preferences.collect import collect_comparisons
from rlhf_gym.preferences.comparison import Comparison, write_comparisons
from rlhf_gym.preferences.encoded import candidate_rows, encode_comparisons
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.rewards import human
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tasks.reviews import DEFAULTS
from rlhf_gym.training.reward_training import RewardTraining, train_reward_model
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.progress import progress_bar
from rlhf_gym.utils.statistics import interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOSSES = ("listwise", "pairs")
COLUMNS = ("seed", "loss", "comparisons", "kl", "top1", "bayes", "seconds")


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    sizes: tuple[int, ...] = (2500, 10000, 20000)
    """Numbers of training comparisons to study."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the labeller's choices, the head and the order of training."""
    losses: tuple[str, ...] = LOSSES
    """Losses to study: listwise, pairs."""
    held_out: int = 2000
    """Comparisons for the evaluation."""
    candidates: int = 4
    """K, the candidates per comparison."""
    max_new_tokens: int = 16
    """Token budget of a candidate."""
    temperature: float = 0.33
    """Temperature of the labeller's choices."""
    backbone: str | None = None
    """Path or hub name of the model that the reward models start from. If None, a small encoder
    that this script pretrains on the texts of the pool, without labels."""
    layers: int = 3
    """Layers of that encoder."""
    with_prompt: bool = False
    """Let the models read the prompt too. The labeller sees only the responses."""
    pretraining_epochs: float = 9.0
    """Passes over the texts in the pretraining."""
    epochs: float = 3.0
    """Passes over the comparisons."""
    batch_size: int = 32
    """Comparisons per update."""
    learning_rate: float = 1.5e-3
    """Peak learning rate."""
    weight_decay: float = 0.5
    """Weight decay of AdamW."""
    members: int = 1
    """Reward models per ensemble. They train on the same choices with different initial heads and
    orders; the evaluation uses their mean logits."""
    run_dir: Path = Path("runs/labeller")
    """Folder to write to."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Sample the pool once, then train and evaluate a model for each seed, size and loss."""
    plain = dataclasses.asdict(config)
    if config.members < 1:
        raise InputError("--members must be at least 1")
    if config.layers < 1:
        raise InputError("--layers must be at least 1")
    # These may differ between runs, so that more of them can be added to a study later.
    fixed = {k: v for k, v in plain.items() if k not in ("seeds", "sizes", "losses")}
    for name, once in (
        ("members", 1),
        ("layers", 3),
    ):  # older run folders have no entry for these options
        if fixed[name] == once:
            del fixed[name]
    check_same_run(config.run_dir, fixed, resume=True)
    begin_run(config.run_dir, fixed)
    file = config.run_dir / "results.csv"
    if not file.exists():
        file.write_text(",".join(COLUMNS) + "\n")
    pool = sampled(config)
    backbone = config.backbone or pretrained(config, pool)
    done = {(r["seed"], r["loss"], r["comparisons"]) for r in read_rows(file)}
    for size in sorted(config.sizes):
        for seed in config.seeds:
            for loss in config.losses:
                if (str(seed), loss, str(size)) in done:
                    continue
                figures = study(config, pool, backbone, seed, loss, size)
                line = [seed, loss, size, *(f"{figures[name]:.6g}" for name in COLUMNS[3:])]
                with file.open("a") as out:
                    out.write(",".join(map(str, line)) + "\n")
                print(dict(zip(COLUMNS, line, strict=True)))
    summarise(config, read_rows(file))


def sampled(config: Config) -> list[Comparison]:
    """Return the pool of comparisons, sampled on the first call; `scores` are the utilities."""
    file = config.run_dir / "pool.jsonl"
    total = max(config.sizes) + config.held_out
    if not file.exists():
        env = make_env("rlhf_gym/Reviews-v0", 1, {"split": "all"})
        with progress_bar("candidates", total) as advance:
            drawn = collect_comparisons(
                env.objective.reference,
                env.prompts,
                human.compound,
                total,
                k=config.candidates,
                max_new_tokens=config.max_new_tokens,
                seed=0,
                progress=advance,
            )
        pool = [
            dataclasses.replace(c, best=None, scores=tuple(human.compound([], c.candidates)))
            for c in drawn
        ]
        partial = file.with_name(".pool.partial.jsonl")
        write_comparisons(partial, pool)
        partial.rename(file)
    pool = read_comparisons(file)
    if len(pool) < total:
        raise InputError(
            f"{file} has {len(pool)} comparisons, but {total} are needed; delete it, or choose "
            "another --run-dir"
        )
    return pool


def pretrained(config: Config, pool: list[Comparison]) -> str:
    """Return the encoder's folder; pretrain it on the texts of the training comparisons first."""
    folder = config.run_dir / "encoder"
    if not folder.exists():
        rows = []
        for comparison in pool[config.held_out :]:
            assert comparison.ids is not None
            prompt, candidates = comparison.ids
            rows += [[*prompt, *ids] for ids in candidates]
        tokenizer = load_tokenizer(DEFAULTS["reference"])
        make_encoder(
            rows, tokenizer, folder, layers=config.layers, epochs=config.pretraining_epochs
        )
    return str(folder)


def study(
    config: Config, pool: list[Comparison], backbone: str, seed: int, loss: str, size: int
) -> dict[str, float]:
    """Train `members` models on `size` choices of the labeller, and evaluate their mean."""
    begun = time.perf_counter()
    utilities = np.array([c.scores for c in pool])
    best = human.choose(utilities, config.temperature, np.random.default_rng(seed))
    if not config.with_prompt:
        opening = (int(load_tokenizer(backbone).bos_token_id),)
        pool = [_alone(c, opening) for c in pool]
    labelled = [choice(c, int(b), loss) for c, b in zip(pool, best, strict=True)]
    labelled = labelled[: config.held_out + size]
    members = [
        judged(config, labelled, backbone, 1000 * member + seed) for member in range(config.members)
    ]
    return {
        **recovered(np.mean(members, 0), utilities[: config.held_out] / config.temperature),
        "seconds": time.perf_counter() - begun,
    }


def judged(config: Config, labelled: list[Comparison], backbone: str, seed: int) -> Floats:
    """Train a model; return its logits (N, K) on the `held_out` comparisons at the start."""
    torch.manual_seed(seed)
    model = RewardModel.from_backbone(backbone, device=device(config.device))
    encoded, _ = encode_comparisons(labelled, model, None)
    test, train = encoded[: config.held_out], encoded[config.held_out :]
    model.start_at(candidate_rows(train, 1024).to(model.device))
    options = RewardTraining(
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        train_reward_model(model, train, options, checkpoint_dir=folder)
    return np.array(predictions(model, test).logits)


def _alone(comparison: Comparison, opening: tuple[int, ...]) -> Comparison:
    """Return the comparison without its prompt."""
    assert comparison.ids is not None
    return dataclasses.replace(comparison, prompt="", ids=(opening, comparison.ids[1]))


def choice(comparison: Comparison, best: int, loss: str) -> Comparison:
    """Return the comparison with its label: one choice, or a pair for each rejected candidate."""
    if loss == "listwise":
        return dataclasses.replace(comparison, scores=None, best=best)
    others = [i for i in range(len(comparison.candidates)) if i != best]
    return dataclasses.replace(comparison, scores=None, pairs=tuple((best, i) for i in others))


def recovered(logits: Floats, labeller: Floats) -> dict[str, float]:
    """Measure how close a model is to the labeller, from the logits (N, K) of both.

    Returns:
        `kl`, the mean KL(P_labeller ‖ P_model) in nats; `top1`, the probability that the labeller
        chooses the model's favourite; `bayes`, the same for the labeller's own favourite.
    """
    log_p, log_q = (x - np.logaddexp.reduce(x, 1, keepdims=True) for x in (labeller, logits))
    p = np.exp(log_p)
    return {
        "kl": float((p * (log_p - log_q)).sum(1).mean()),
        "top1": float(np.take_along_axis(p, logits.argmax(1)[:, None], 1).mean()),
        "bayes": float(p.max(1).mean()),
    }


def summarise(config: Config, found: list[dict[str, str]]) -> None:
    """Write means with 95 % intervals over seeds, and the plot."""
    table: list[dict[str, Any]] = []
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for loss in config.losses:
        sizes = sorted({int(r["comparisons"]) for r in found if r["loss"] == loss})
        points = []
        for size in sizes:
            some = [r for r in found if r["loss"] == loss and int(r["comparisons"]) == size]
            row: dict[str, Any] = {"loss": loss, "comparisons": size, "seeds": len(some)}
            for name in ("kl", "top1", "bayes"):
                values = np.array([float(r[name]) for r in some])
                row[name], row[f"{name}_interval"] = float(values.mean()), interval(values)
            table.append(row)
            points.append(row)
        for axes, name in ((left, "kl"), (right, "top1")):
            means = [p[name] for p in points]
            spans = [p[f"{name}_interval"] for p in points]
            axes.errorbar(sizes, means, yerr=spans, marker="o", capsize=3, label=loss)
    left.axhline(0.02, ls=":", c="0.5")
    right.axhline(float(found[0]["bayes"]), ls=":", c="0.5", label="Bayes")
    left.set(xscale="log", yscale="log", xlabel="comparisons", ylabel="KL to the labeller, nats")
    right.set(xscale="log", xlabel="comparisons", ylabel="expected top-1 accuracy")
    for axes in (left, right):
        axes.set_xticks(sorted(config.sizes), [f"{size:,}" for size in sorted(config.sizes)])
        axes.minorticks_off()
    marks = [v for v in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if v <= 1.1 * max(r["kl"] for r in table)]
    left.set_yticks(marks, [str(v) for v in marks])
    right.legend()
    figure.tight_layout()
    figure.savefig(config.run_dir / "labeller.png", dpi=120)
    plt.close(figure)
    options = {k: v for k, v in dataclasses.asdict(config).items() if k != "run_dir"}
    write_json(config.run_dir / "labeller.json", {"config": options, "rows": table})
    for row in table:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    run(main, Config, __doc__)
