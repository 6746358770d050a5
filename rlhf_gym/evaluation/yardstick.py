"""Measure all policies of a study on the same prompts and against the same optimum."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.evaluation.drawing import draw_responses
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.enumeration import Enumeration, listable
from rlhf_gym.objective.optimum import best_of_n, best_value, optimality
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.progress import progress_bar

Row = dict[str, Any]


class Yardstick:
    """Measures policies on the same prompts against the same J_ref and J*.

    If all responses can be listed, J_ref, J* and each policy's J are exact. Otherwise the
    reference's responses are drawn once and their scores kept in a file, so that all policies of a
    study, also after a restart, are compared with the same estimates.

    Args:
        env: The environment of the prompts.
        file: The .npz file for the reference's scores.
        n_prompts: P, the number of prompts.
        n_reference: Responses of the reference to each prompt.
        n_policy: Responses of a policy to each prompt.
    """

    def __init__(
        self, env: TokenVectorEnv, file: Path, n_prompts: int, n_reference: int, n_policy: int
    ) -> None:
        self._objective, self._gold, self._n_policy = env.objective, env.gold, n_policy
        self._limits: dict[str, Any] = {
            "max_new_tokens": env.max_new_tokens,
            "stop_at_eos": env.stop_at_eos,
        }
        order = np.random.default_rng(0).permutation(len(env.prompts))[:n_prompts]
        self._ids = [env.prompts.ids[i] for i in order]
        self._task: Enumeration | None = None
        if listable(env.objective, len(self._ids), env.max_new_tokens, env.stop_at_eos):
            self._task = Enumeration(env.objective, self._ids, **self._limits)
            self.before = self._task.value(self._task.reference).objective
            self.best, self.ess = self._task.best_value, float("inf")
            return
        self._scores = self._reference_scores(file, n_reference)
        found = best_value(self._scores, env.objective.kl_coef)
        self.before, self.best = self._scores.mean(1), found.value
        self.ess = float(found.ess.mean())

    def measure(self, policy: CausalLM, seed: int) -> Row:
        """Measure a policy: optimality, objective, score, KL (nats per sequence) and gold score.

        `gold` is None if there is no gold scorer, or if the figures are exact.
        """
        gold = None
        policy = policy.following(self._objective.reference)
        if self._task is not None:
            exact = self._task.value(self._task.log_probs(policy))
            value, score, kl = exact.objective, exact.score, exact.kl
        else:
            drawn = draw_responses(
                policy,
                policy,
                self._objective,
                self._ids,
                self._n_policy,
                gold=self._gold,
                generator=torch.Generator(policy.device).manual_seed(seed),
                **self._limits,
            )
            gold = None if drawn.gold is None else float(drawn.gold.mean())
            score, kl = drawn.scores, drawn.kl
            value = (score - self._objective.kl_coef * kl).mean(1)
        return {
            "optimality": self.share(value),
            "objective": float(value.mean()),
            "score": float(score.mean()),
            "kl": float(kl.mean()),
            "gold": gold,
        }

    def share(self, value: Floats) -> float:
        """Return the optimality of a policy with these J (P,)."""
        return optimality(value, self.before, self.best, resamples=1)["value"]

    def best_of(self, n: int) -> float:
        """Return the optimality of best-of-n sampling from the reference."""
        if self._task is not None:
            return self.share(self._task.best_of_n(n).objective)
        return self.share(best_of_n(self._scores, n, self._objective.kl_coef))

    def best_deterministic(self) -> float | None:
        """Return the optimality of the best deterministic policy; None if it is unknown."""
        if self._task is None:
            return None
        return self.share(self._task.best_deterministic.objective)

    def _reference_scores(self, file: Path, n: int) -> Floats:
        if not file.exists():
            reference = self._objective.reference
            with progress_bar("reference samples", n * len(self._ids)) as advance:
                drawn = draw_responses(
                    reference,
                    reference,
                    self._objective,
                    self._ids,
                    n,
                    generator=torch.Generator(reference.device).manual_seed(0),
                    progress=advance,
                    **self._limits,
                )
            partial = file.with_name(f".{file.name}.partial.npz")
            np.savez(partial, scores=drawn.scores)
            partial.rename(file)
        scores: Floats = np.load(file)["scores"]
        return scores
