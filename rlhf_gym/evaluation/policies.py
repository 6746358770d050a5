"""Evaluate a policy on held-out prompts, compared with its reference and the optimum.

Notation: P prompts, n responses to each. Every figure is a mean over prompts with its standard
error over prompts, because the responses to one prompt are not independent of each other.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.drawing import Drawn, draw_responses
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.enumeration import Enumeration, listable
from rlhf_gym.objective.objective import Objective
from rlhf_gym.objective.optimum import best_of_n, best_value, optimality
from rlhf_gym.rewards.functions import TextReward
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.statistics import measured

MIN_ESS = 20.0
"""J* is not reported if the mean effective sample size is below this: its bias would be large."""


def win_rate(ours: Floats, theirs: Floats) -> Floats:
    """Return each prompt's share of pairs (ours, theirs) that ours wins; a tie counts one half.

    Args:
        ours: (P, n) scores.
        theirs: (P, m) scores.

    Returns:
        (P,) win rates.
    """
    margin = ours[:, :, None] - theirs[:, None, :]
    rate: Floats = ((margin > 0) + 0.5 * (margin == 0)).mean((1, 2))
    return rate


def summarise(policy: Drawn, reference: Drawn, kl_coef: float) -> dict[str, Any]:
    """Compute all figures of a policy and its reference, each {"value", "se", "n"}.

    `optimality` and `objective_optimum` are None if the mean effective sample size is below
    `MIN_ESS`. `optimum` has the effective sample size, and how many samples would be needed.
    """
    objective = (policy.scores - kl_coef * policy.kl).mean(1)
    objective_ref = reference.scores.mean(1)
    pooled = np.concatenate([reference.scores, policy.scores], 1)
    ratios = np.concatenate([reference.log_ratio, policy.log_ratio], 1)
    share = policy.scores.shape[1] / pooled.shape[1]
    figures: dict[str, Any] = {
        "objective_before": measured(objective_ref),
        "objective_after": measured(objective),
        "objective_optimum": None,
        "optimality": None,
        "kl": measured(policy.kl.mean(1)),
        "kl_per_token": measured(policy.kl.sum(1) / policy.lengths.sum(1)),
        "win_rate_score": measured(win_rate(policy.scores, reference.scores)),
        **_both("score", policy.scores, reference.scores),
        **_both("length", policy.lengths, reference.lengths),
        **_both("stopped", policy.stopped, reference.stopped),
        "gold_before": None,
        "gold_after": None,
        "win_rate_gold": None,
    }
    for name, drawn in (("before", reference), ("after", policy)):
        nats = -drawn.ref_log_prob.sum(1) / drawn.lengths.sum(1)
        figures[f"ref_nll_per_token_{name}"] = measured(nats)
        mean = measured(nats)
        value = math.exp(mean["value"])
        # Delta method: the standard error of exp(x) is exp(x) times that of x.
        figures[f"ref_perplexity_{name}"] = {
            "value": value,
            "se": value * mean["se"],
            "n": mean["n"],
        }
        for k in (1, 2):
            figures[f"distinct_{k}_{name}"] = measured(drawn.distinct[:, k - 1])
    if policy.gold is not None and reference.gold is not None:
        figures.update(_both("gold", policy.gold, reference.gold))
        figures["win_rate_gold"] = measured(win_rate(policy.gold, reference.gold))
    if kl_coef > 0:
        best = best_value(pooled, kl_coef, ratios, share)
        figures["optimum"] = {
            "ess": measured(best.ess),
            "kl": measured(best.kl),
            "score": measured(best.score),
            "samples": pooled.shape[1],
            # Approximate number of samples per prompt with which J* could be reported.
            "samples_needed": best.samples_needed(pooled.shape[1], MIN_ESS),
        }
        # If J* does not exceed J_ref (a constant reward), optimality would divide by 0.
        if best.ess.mean() >= MIN_ESS and (best.value - objective_ref).mean() > 0:
            figures["objective_optimum"] = measured(best.value)
            figures["optimality"] = optimality(objective, objective_ref, best.value)
            figures["best_of_n_optimality"] = {
                str(k): optimality(
                    best_of_n(reference.scores, k, kl_coef), objective_ref, best.value
                )
                for k in (4, 16)
                if reference.scores.shape[1] >= k
            }
    return figures


def _both(name: str, after: Floats, before: Floats) -> dict[str, dict[str, float]]:
    return {
        f"{name}_before": measured(before.mean(1)),
        f"{name}_after": measured(after.mean(1)),
    }


def evaluate(
    policy: CausalLM,
    objective: Objective,
    prompts: PromptDataset,
    *,
    max_new_tokens: int,
    stop_at_eos: bool = True,
    n_prompts: int = 48,
    n_policy: int = 64,
    n_reference: int = 128,
    gold: TextReward | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], Drawn, Drawn]:
    """Evaluate a policy on (held-out) prompts.

    If all responses can be listed, the figures that depend on them are exact instead of estimates.

    Args:
        policy: The policy. It must have the reference's vocabulary.
        objective: Reward, reference and β.
        prompts: The prompts to choose from. The choice depends on `seed` alone, so every policy is
            evaluated on the same prompts.
        max_new_tokens: Token budget of a response.
        stop_at_eos: Whether an EOS ends a response.
        n_prompts: P, the number of prompts to evaluate on.
        n_policy: Responses of the policy to each prompt.
        n_reference: Responses of the reference to each prompt; J* is estimated mainly from them.
        gold: Gold scorer; None for no gold scores.
        seed: Seed of the choice of prompts and of the responses.
        progress: Called after each batch with its number of responses.

    Returns:
        The figures (see `summarise`), the policy's responses and the reference's.

    Raises:
        InputError: The policy's vocabulary is not the reference's.
    """
    reference = objective.reference
    if policy.vocab_size != reference.vocab_size:
        raise InputError(
            f"the policy has {policy.vocab_size} usable tokens, the reference "
            f"{reference.vocab_size}; evaluate it on the environment it was trained on"
        )
    # Use the environment's temperature, EOS ids and mask, not those in the policy's files.
    policy = policy.following(reference)
    order = np.random.default_rng(seed).permutation(len(prompts))[:n_prompts]
    ids = [prompts.ids[i] for i in order]
    generator = torch.Generator(reference.device).manual_seed(seed)

    def drawn(sampler: CausalLM, n: int) -> Drawn:
        return draw_responses(
            sampler,
            policy,
            objective,
            ids,
            n,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            gold=gold,
            generator=generator,
            progress=progress,
        )

    from_reference = drawn(reference, n_reference)
    from_policy = drawn(policy, n_policy)
    figures = summarise(from_policy, from_reference, objective.kl_coef)
    if listable(objective, len(ids), max_new_tokens, stop_at_eos):
        task = Enumeration(objective, ids, max_new_tokens=max_new_tokens, stop_at_eos=stop_at_eos)
        figures["optimum"] = {**figures["optimum"], **exact_optimum(task)}
        figures.update(exact_figures(task, policy))
    return figures, from_policy, from_reference


def exact_optimum(task: Enumeration) -> dict[str, Any]:
    """Return π*'s exact score and KL, and J of the best deterministic policy."""
    best = task.value(task.optimum)
    return {
        "kl": _exact(best.kl),
        "score": _exact(best.score),
        "best_deterministic": _exact(task.best_deterministic.objective),
    }


def _exact(values: Floats) -> dict[str, float]:
    return {"value": float(values.mean()), "se": 0.0, "n": len(values)}


def exact_figures(task: Enumeration, policy: CausalLM) -> dict[str, Any]:
    """Return the figures that enumeration computes exactly, to replace their estimates."""
    before, after = task.value(task.reference), task.value(task.log_probs(policy))

    def share(objective: Floats) -> dict[str, float]:
        value = task.optimality(objective)
        return {"value": value, "se": 0.0, "low": value, "high": value, "n": len(objective)}

    return {
        "exact": True,
        "objective_before": _exact(before.objective),
        "objective_after": _exact(after.objective),
        "objective_optimum": _exact(task.best_value),
        "score_before": _exact(before.score),
        "score_after": _exact(after.score),
        "kl": _exact(after.kl),
        "optimality": share(after.objective),
        "best_of_n_optimality": {str(k): share(task.best_of_n(k).objective) for k in (4, 16)},
        "best_deterministic_optimality": share(task.best_deterministic.objective),
    }
