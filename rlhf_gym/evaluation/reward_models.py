"""Evaluation of a reward model on comparisons that it was not trained on.

Notation: N comparisons, B candidates in all, P implied pairs in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import EncodedComparison, candidate_rows
from rlhf_gym.preferences.likelihood import Choice, ChoiceSets, choice_loss
from rlhf_gym.preferences.splits import prompt_groups
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.statistics import Figure

Scorer = Callable[[Comparison], Sequence[float]]
"""A baseline: a number for each candidate of a comparison."""

RESAMPLES = 1000
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Predictions:
    """What a model or a baseline predicts of N comparisons.

    Attributes:
        comparisons: The comparisons.
        logits: For each, a number for each candidate; softmax of them is its choice.
        choices: What each label consists of, if not what it consists of by itself (soft labels).
    """

    comparisons: Sequence[Comparison]
    logits: Sequence[Floats]
    choices: Sequence[Sequence[Choice]] | None = None

    @cached_property
    def top1(self) -> Floats:
        """(N,) whether the highest logit is on top; shared among equals, NaN where none is top."""
        return np.array(
            [_top_share(c, x) for c, x in zip(self.comparisons, self.logits, strict=True)]
        )

    @cached_property
    def pairwise(self) -> Floats:
        """(N,) share of the implied pairs in the right order, equal logits as half; NaN if none."""
        out = []
        for comparison, x in zip(self.comparisons, self.logits, strict=True):
            gaps = np.array([x[w] - x[v] for w, v in comparison.preferred])
            out.append(float(((gaps > 0) + 0.5 * (gaps == 0)).mean()) if len(gaps) else np.nan)
        return np.array(out)

    @cached_property
    def nll(self) -> Floats:
        """(N,) negative log-likelihood of each label, nats."""
        sizes = [len(x) for x in self.logits]
        sets = ChoiceSets.of(self.choices or [c.choices() for c in self.comparisons], sizes)
        return choice_loss(torch.from_numpy(np.concatenate(self.logits)), sets).numpy()

    @cached_property
    def claims(self) -> tuple[Floats, Floats]:
        """P(best) of every compared candidate, and whether (or how often) it was best, (B',)."""
        said: list[float] = []
        was: list[float] = []
        for comparison, x in zip(self.comparisons, self.logits, strict=True):
            if comparison.votes is not None:
                # What the likelihood fits: shares of votes, not which candidate has most of them.
                ((_, shares),) = comparison.choices()
                said += probabilities(x).tolist()
                was += shares
            elif comparison.tops:
                rivals = list(comparison.compared)
                said += probabilities(x[rivals]).tolist()
                share = 1 / len(comparison.tops)
                was += [share * (i in comparison.tops) for i in rivals]
        return np.array(said), np.array(was)


def probabilities(logits: Floats) -> Floats:
    """P(best) of each candidate of a comparison, the softmax of its logits: (K,) -> (K,)."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()  # type: ignore[no-any-return]


def _top_share(comparison: Comparison, x: Floats) -> float:
    if not comparison.tops:
        return float("nan")
    # One that nobody compared is neither right nor wrong.
    rivals = np.array(comparison.compared)
    highest = rivals[x[rivals] == x[rivals].max()]
    return sum(int(i) in comparison.tops for i in highest) / len(highest)


def predictions(model: RewardModel, comparisons: Sequence[EncodedComparison]) -> Predictions:
    """What a reward model predicts: its logits.

    A model that pays a label's probability gives log-probabilities instead: they order candidates
    as the probabilities do, and their softmax gives each its share of their sum.
    """
    rows = candidate_rows(comparisons).to(model.device)
    if model.probability:
        paid = model.scores(rows)
        said = paid.clamp(min=torch.finfo(paid.dtype).tiny).log()
    else:
        said = model.logits(rows)
    logits = said.double().cpu().numpy()
    ends = np.cumsum([len(c.candidates) for c in comparisons])
    return Predictions(
        [c.comparison for c in comparisons],
        np.split(logits, ends[:-1]),
        [c.choices for c in comparisons],
    )


def baseline(scorer: Scorer, comparisons: Sequence[Comparison]) -> Predictions:
    """What a plain rule predicts."""
    return Predictions(comparisons, [np.asarray(scorer(c), dtype=np.float64) for c in comparisons])


def longest(comparison: Comparison) -> list[float]:
    """The rule "the longest answer is the best": characters of each candidate."""
    return [float(len(text)) for text in comparison.candidates]


def uniform(comparison: Comparison) -> list[float]:
    """The rule that knows nothing: one logit for all candidates, so each has P = 1/K."""
    return [0.0] * len(comparison.candidates)


MIN_PAIRS_TO_CHOOSE = 50
"""With fewer pairs, the bag of words takes a fixed penalty."""


def bag_of_words(train: Sequence[Comparison]) -> Scorer:
    """A Bradley–Terry model on counts of hashed words, fitted to all implied pairs.

    Plain counts, so that length is in them; the penalty is chosen by cross-validation.

    Args:
        train: The training comparisons.

    Returns:
        The fitted rule.

    Raises:
        InputError: They imply fewer than two pairs.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, KFold

    words = HashingVectorizer(n_features=1 << 16, alternate_sign=False, norm=None)
    won = [c.candidates[w] for c in train for w, _ in c.preferred]
    lost = [c.candidates[v] for c in train for _, v in c.preferred]
    if len(won) < 2:
        raise InputError(f"a bag of words needs at least two preferred pairs, not {len(won)}")
    gaps = words.transform(won) - words.transform(lost)
    # Every second pair is turned round: two classes are needed, and no intercept is fitted.
    signs = np.where(np.arange(len(won)) % 2, -1.0, 1.0)
    model = LogisticRegression(solver="liblinear", fit_intercept=False, C=1e-2)
    turned = gaps.multiply(signs[:, None]).tocsr()
    if len(won) >= MIN_PAIRS_TO_CHOOSE:
        # Contiguous folds: pairs of one comparison stay together, but for those at the borders.
        search = GridSearchCV(model, {"C": [1e-3, 1e-2, 1e-1, 1.0]}, cv=KFold(5))
        model = search.fit(turned, signs).best_estimator_
    else:
        model.fit(turned, signs)
    weights = model.coef_[0]

    def score(comparison: Comparison) -> list[float]:
        return list(words.transform(comparison.candidates) @ weights)

    return score


def clustered(values: Floats, prompts: npt.NDArray[np.int64], seed: int = 0) -> Figure:
    """Mean over comparisons, with standard error and 95 % interval by bootstrap over prompts.

    Args:
        values: (N,); NaN where a comparison says nothing.
        prompts: (N,) number of each one's prompt; comparisons on one prompt are not independent.
        seed: Seed of the resampling.

    Returns:
        value, se, low, high, n (comparisons that say something).
    """
    known = ~np.isnan(values)
    values, prompts = values[known], prompts[known]
    value = float(values.mean()) if len(values) else float("nan")
    _, cluster = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(cluster, values), np.bincount(cluster)
    unknown = float("nan")
    if len(sums) < 2:  # one prompt says nothing about others
        return {"value": value, "se": unknown, "low": unknown, "high": unknown, "n": len(values)}
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "value": value,
        "se": float(means.std(ddof=1)),
        "low": float(low),
        "high": float(high),
        "n": len(values),
    }


def figures(said: Predictions, prompts: npt.NDArray[np.int64]) -> dict[str, Figure]:
    """Top-1 accuracy (`accuracy`) and pairwise accuracy."""
    return {
        "accuracy": clustered(said.top1, prompts),
        "accuracy_pairwise": clustered(said.pairwise, prompts),
    }


def calibration(said: Floats, was: Floats) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error, and the reliability curve it sums up.

    Args:
        said: Probabilities (B,).
        was: What happened, 0 to 1 (B,).

    Returns:
        ECE = Σ_bins share · |mean said − mean happened| over equal-width bins (Guo et al. 2017),
        and for each bin that is not empty its `said`, `was` and `n`.
    """
    if not len(said):
        return float("nan"), []
    bins = np.minimum((said * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    curve = [
        {
            "said": float(said[bins == b].mean()),
            "was": float(was[bins == b].mean()),
            "n": int((bins == b).sum()),
        }
        for b in np.unique(bins)
    ]
    ece = sum(row["n"] * abs(row["said"] - row["was"]) for row in curve) / len(said)
    return ece, curve


def agreement(comparisons: Sequence[Comparison]) -> Floats:
    """(N,) chance that two annotators of a comparison say the same; NaN with fewer than two."""
    out = []
    for comparison in comparisons:
        counts = np.array([*(comparison.votes or ()), comparison.ties], dtype=np.float64)
        n = counts.sum()
        out.append(float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else np.nan)
    return np.array(out)


def prompt_numbers(comparisons: Sequence[Comparison]) -> npt.NDArray[np.int64]:
    """A number for each comparison's prompt, the same for nearly equal prompts."""
    keys = prompt_groups([c.prompt for c in comparisons])
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def evaluate_reward_model(
    model: RewardModel, comparisons: Sequence[EncodedComparison]
) -> dict[str, Any]:
    """Accuracies, NLL and calibration error, next to "the longest is the best" and chance.

    Args:
        model: The reward model.
        comparisons: What it is measured on; best none that it learnt from.

    Returns:
        `accuracy`, `accuracy_pairwise`, `nll` (nats), `accuracy_longest`, `accuracy_chance`, each a
        figure with its interval over prompts, and the number `ece`.
    """
    said = predictions(model, comparisons)
    plain = said.comparisons
    prompts = prompt_numbers(plain)
    return {
        **figures(said, prompts),
        "nll": clustered(said.nll, prompts),
        "ece": calibration(*said.claims)[0],
        "accuracy_longest": clustered(baseline(longest, plain).top1, prompts),
        "accuracy_chance": clustered(baseline(uniform, plain).top1, prompts),
    }
