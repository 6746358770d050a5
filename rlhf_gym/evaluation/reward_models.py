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
from rlhf_gym.utils.statistics import Figure, wilson

Scorer = Callable[[Comparison], Sequence[float]]
"""A baseline: returns a number for each candidate of a comparison."""

RESAMPLES = 1000
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model or a baseline for N comparisons.

    Attributes:
        comparisons: The comparisons.
        logits: For each comparison, a logit for each candidate. Their softmax is P(best).
        choices: For each comparison, the choices that its label stands for. None takes
            `Comparison.choices()`; soft labels need others.
    """

    comparisons: Sequence[Comparison]
    logits: Sequence[Floats]
    choices: Sequence[Sequence[Choice]] | None = None

    @cached_property
    def top1(self) -> Floats:
        """Top-1 accuracy of each comparison, (N,): 1 if the highest logit is a preferred candidate.

        Candidates that tie for the highest logit share it equally. NaN without a preference.
        """
        return np.array(
            [_top_share(c, x) for c, x in zip(self.comparisons, self.logits, strict=True)]
        )

    @cached_property
    def pairwise(self) -> Floats:
        """Share of the implied pairs in the right order, (N,); equal logits count one half.

        NaN for a comparison that implies no pair.
        """
        out = []
        for comparison, x in zip(self.comparisons, self.logits, strict=True):
            gaps = np.array([x[w] - x[v] for w, v in comparison.preferred])
            out.append(float(((gaps > 0) + 0.5 * (gaps == 0)).mean()) if len(gaps) else np.nan)
        return np.array(out)

    @cached_property
    def nll(self) -> Floats:
        """Negative log-likelihood of each label in nats, (N,)."""
        sizes = [len(x) for x in self.logits]
        sets = ChoiceSets.of(self.choices or [c.choices() for c in self.comparisons], sizes)
        return choice_loss(torch.from_numpy(np.concatenate(self.logits)), sets).numpy()

    @cached_property
    def claims(self) -> tuple[Floats, Floats]:
        """P(best) of each compared candidate, and the share of votes for it as best; both (B',).

        Without votes the share is 1 for the preferred candidate, or divided among several.
        """
        said: list[float] = []
        was: list[float] = []
        for comparison, x in zip(self.comparisons, self.logits, strict=True):
            if comparison.votes is not None:
                # The likelihood fits the shares of the votes, so calibration compares with them.
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
    """Return P(best) of each candidate, the softmax of a comparison's logits: (K,) -> (K,)."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()  # type: ignore[no-any-return]


def _top_share(comparison: Comparison, x: Floats) -> float:
    if not comparison.tops:
        return float("nan")
    # A candidate that nobody compared is neither right nor wrong.
    rivals = np.array(comparison.compared)
    highest = rivals[x[rivals] == x[rivals].max()]
    return sum(int(i) in comparison.tops for i in highest) / len(highest)


def predictions(model: RewardModel, comparisons: Sequence[EncodedComparison]) -> Predictions:
    """Return a reward model's predictions: its logits.

    For a model whose score is a label's probability, the log-probabilities take the place of the
    logits: they order the candidates like the probabilities, and their softmax is each
    probability's share of the sum.
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
    """Return the predictions of a simple rule."""
    return Predictions(comparisons, [np.asarray(scorer(c), dtype=np.float64) for c in comparisons])


def longest(comparison: Comparison) -> list[float]:
    """Score by length, the rule "the longest answer is best": characters of each candidate."""
    return [float(len(text)) for text in comparison.candidates]


def uniform(comparison: Comparison) -> list[float]:
    """Score by chance: the same logit for all K candidates, so each has P = 1/K."""
    return [0.0] * len(comparison.candidates)


MIN_PAIRS_TO_CHOOSE = 50
"""With fewer pairs, the bag of words uses a fixed penalty instead of one by cross-validation."""


def bag_of_words(train: Sequence[Comparison]) -> Scorer:
    """Fit a Bradley–Terry model on counts of hashed words to all implied pairs.

    The counts are not normalised, so the rule can also learn to prefer long answers. The penalty is
    chosen by cross-validation.

    Args:
        train: The training comparisons.

    Returns:
        The fitted rule.

    Raises:
        InputError: The comparisons imply fewer than two pairs.
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
    # Swap winner and loser in every second pair, because the classifier needs both classes. This
    # changes nothing else, as no intercept is fitted.
    signs = np.where(np.arange(len(won)) % 2, -1.0, 1.0)
    model = LogisticRegression(solver="liblinear", fit_intercept=False, C=1e-2)
    turned = gaps.multiply(signs[:, None]).tocsr()
    if len(won) >= MIN_PAIRS_TO_CHOOSE:
        # KFold takes contiguous folds, so the pairs of one comparison stay in one fold, except at
        # the borders.
        search = GridSearchCV(model, {"C": [1e-3, 1e-2, 1e-1, 1.0]}, cv=KFold(5))
        model = search.fit(turned, signs).best_estimator_
    else:
        model.fit(turned, signs)
    weights = model.coef_[0]

    def score(comparison: Comparison) -> list[float]:
        return list(words.transform(comparison.candidates) @ weights)

    return score


def clustered(values: Floats, prompts: npt.NDArray[np.int64], seed: int = 0) -> Figure:
    """Compute the mean over comparisons, with bootstrap standard error and 95 % interval.

    The bootstrap resamples prompts, because comparisons on one prompt are not independent.

    Args:
        values: (N,) values; NaN leaves a comparison out.
        prompts: (N,) number of each comparison's prompt.
        seed: Seed of the bootstrap.

    Returns:
        value, se, low, high and n, the number of comparisons that are not NaN. With fewer than two
        prompts, se, low and high are NaN.
    """
    known = ~np.isnan(values)
    values, prompts = values[known], prompts[known]
    value = float(values.mean()) if len(values) else float("nan")
    _, cluster = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(cluster, values), np.bincount(cluster)
    unknown = float("nan")
    if len(sums) < 2:  # one prompt shows no variation between prompts
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


def proportion(values: Floats, prompts: npt.NDArray[np.int64], seed: int = 0) -> Figure:
    """Compute a share as `clustered` does, but with Wilson's interval (see `wilson`).

    Args:
        values: (N,) values in 0 … 1; NaN leaves a comparison out.
        prompts: (N,) number of each comparison's prompt.
        seed: Seed of the bootstrap behind the standard error.
    """
    found = clustered(values, prompts, seed)
    groups = len(np.unique(prompts[~np.isnan(values)]))
    low, high = wilson(found["value"], found["se"], int(found["n"]), groups)
    return {**found, "low": low, "high": high}


def figures(said: Predictions, prompts: npt.NDArray[np.int64]) -> dict[str, Figure]:
    """Return the top-1 accuracy (`accuracy`) and the pairwise accuracy, with intervals."""
    return {
        "accuracy": proportion(said.top1, prompts),
        "accuracy_pairwise": proportion(said.pairwise, prompts),
    }


def calibration(said: Floats, was: Floats) -> tuple[float, list[dict[str, float]]]:
    """Compute the expected calibration error and the reliability curve.

    Args:
        said: (B,) predicted probabilities.
        was: (B,) observed outcomes or frequencies, 0 to 1.

    Returns:
        ECE = Σ_bins share · |mean prediction − mean outcome| over bins of equal width (Guo et al.
        2017), and for each bin that is not empty the mean prediction (`said`), the mean outcome
        (`was`) and the number of candidates (`n`).
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
    """Return the probability that two annotators of a comparison agree: (N,).

    NaN for a comparison with fewer than two annotators.
    """
    out = []
    for comparison in comparisons:
        counts = np.array([*(comparison.votes or ()), comparison.ties], dtype=np.float64)
        n = counts.sum()
        out.append(float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else np.nan)
    return np.array(out)


def prompt_numbers(comparisons: Sequence[Comparison]) -> npt.NDArray[np.int64]:
    """Return a number for each comparison's prompt, the same for nearly equal prompts: (N,)."""
    keys = prompt_groups([c.prompt for c in comparisons])
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def evaluate_reward_model(
    model: RewardModel, comparisons: Sequence[EncodedComparison]
) -> dict[str, Any]:
    """Compute a reward model's accuracies, NLL and calibration error, and two baselines.

    Args:
        model: The reward model.
        comparisons: The comparisons to measure on. The model should not have been trained on them.

    Returns:
        `accuracy`, `accuracy_pairwise`, `nll` (nats), `accuracy_longest` (the longest answer is
        best), `accuracy_chance`, each a figure with its interval over prompts (of accuracies
        Wilson's, see `proportion`), and the number `ece`.
    """
    said = predictions(model, comparisons)
    plain = said.comparisons
    prompts = prompt_numbers(plain)
    return {
        **figures(said, prompts),
        "nll": clustered(said.nll, prompts),
        "ece": calibration(*said.claims)[0],
        "accuracy_longest": proportion(baseline(longest, plain).top1, prompts),
        "accuracy_chance": clustered(baseline(uniform, plain).top1, prompts),
    }
