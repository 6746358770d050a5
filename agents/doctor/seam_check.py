"""Check that one policy has one J, whichever program evaluates it.

Three programs: Stable-Baselines3's `evaluate_policy`, which steps an environment to which nobody is
bound; a computation by hand for the same episodes, with plain forward passes; and the evaluation of
this project's commands (`rlhf_gym.evaluation`). Notation: E episodes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.evaluation import evaluate_policy

from agents.doctor.subject import Problem, Subject, changed_weights, plain_log_probs
from agents.sb3.vec_env import TokenSB3VecEnv
from rlhf_gym.evaluation.drawing import draw_responses
from rlhf_gym.kl import REWARD_ESTIMATORS
from rlhf_gym.rewards.responses import Responses, observation_sequences
from rlhf_gym.tokens import row_lengths
from rlhf_gym.utils.arrays import Floats, Ints

EPISODES_PER_ROW = 4
RESPONSES = 16
"""Of the commands' evaluation, to the prompt of each episode."""
UNLIKELY = 5.0
"""Most standard errors between two means of J."""


@dataclass(frozen=True)
class Seam:
    """J of one policy by three programs.

    Attributes:
        by_sb3: (E,) returns of the episodes of `evaluate_policy`.
        by_hand: (E,) score − β Σ (log π − log π_ref) of the same episodes.
        by_evaluation: (E,) J of the commands' evaluation at the prompts of these episodes.
    """

    by_sb3: Floats
    by_hand: Floats
    by_evaluation: Floats

    def __str__(self) -> str:
        names = ("SB3's evaluate_policy", "the same by hand", "rlhf-gym's evaluation")
        parts = (self.by_sb3, self.by_hand, self.by_evaluation)
        said = [
            f"{name} {part.mean():.4f} ± {_error(part):.4f}"
            for name, part in zip(names, parts, strict=True)
        ]
        return f"J (mean ± standard error, {len(self.by_sb3)} episodes): {', '.join(said)}"


def seam(subject: Subject) -> tuple[Seam | None, Problem | None]:
    """Evaluate the subject's policy in three ways; the figures, and what is wrong with them.

    A policy that has not learned is moved away from the reference for this, and put back.

    Returns:
        No figures where the policy cannot step without knowing where a prompt ends
        (`min_new_tokens`).
    """
    if subject.policy.core.mask.min_new_tokens:
        return None, None
    with changed_weights(subject.policy, 1.1 if subject.fresh else 1.0):
        found = _evaluated(subject)
    gap = float(np.abs(found.by_sb3 - found.by_hand).max())
    most = subject.tolerance * max(1.0, subject.objective.kl_coef * subject.env.max_new_tokens)
    difference = found.by_sb3 - found.by_evaluation
    far = abs(float(difference.mean())) > UNLIKELY * _error(difference) + most
    # Only k1's mean is J: the others have no evaluation to agree with.
    far = far and subject.objective.kl_estimator == "k1"
    if gap <= most and not far:
        return found, None
    return found, Problem(
        "seam",
        f"{found}; an episode's return differs by up to {gap:.2g} from the one by hand",
        "rewards must be settled with the log-probs of the policy that acts: look for a wrapper "
        "that changes observations or actions, or another actor bound to the environment",
    )


def _evaluated(subject: Subject) -> Seam:
    env, episodes = subject.env.resized(subject.env.num_envs), subject.env.num_envs
    episodes *= EPISODES_PER_ROW
    rows, lengths = [], []

    def keep(local: dict[str, Any], _: dict[str, Any]) -> None:
        if local["done"]:
            rows.append(local["info"]["terminal_observation"])
            lengths.append(int(local["current_lengths"][local["i"]]))

    vec_env = TokenSB3VecEnv(env)
    vec_env.seed(0)
    returns, _ = evaluate_policy(
        subject.policy,
        vec_env,
        n_eval_episodes=episodes,
        deterministic=False,
        callback=keep,
        return_episode_rewards=True,
        warn=False,
    )
    tokens: Ints = np.stack(rows)
    starts: Ints = row_lengths(tokens) - np.array(lengths)
    return Seam(
        np.array(returns, dtype=np.float64),
        _by_hand(subject, tokens, starts),
        _by_evaluation(subject, [row[:s].tolist() for row, s in zip(tokens, starts, strict=True)]),
    )


def _by_hand(subject: Subject, tokens: Ints, starts: Ints) -> Floats:
    objective, core = subject.objective, subject.policy.core
    sequences = observation_sequences(tokens, starts).to(objective.reference.device)
    responses = Responses(
        objective.reference, sequences, stop_at_eos=subject.env.stop_at_eos, chats=objective.chats
    )
    scores = objective.scores(responses).double().cpu().numpy()
    kl, estimate = [], REWARD_ESTIMATORS[objective.kl_estimator]
    for i in range(len(tokens)):
        row = sequences.rows(torch.tensor([i], device=sequences.tokens.device))
        terms = estimate(plain_log_probs(core, row), plain_log_probs(objective.reference, row))
        kl.append(float(terms.double().sum()))
    value: Floats = scores - objective.kl_coef * np.array(kl)
    return value


def _by_evaluation(subject: Subject, prompts: list[list[int]]) -> Floats:
    core, objective = subject.policy.core, subject.objective
    drawn = draw_responses(
        core,
        core,
        objective,
        prompts,
        RESPONSES,
        max_new_tokens=subject.env.max_new_tokens,
        stop_at_eos=subject.env.stop_at_eos,
        generator=torch.Generator(core.device).manual_seed(0),
    )
    value: Floats = (drawn.scores - objective.kl_coef * drawn.kl).mean(1)
    return value


def _error(samples: Floats) -> float:
    return float(samples.std() / np.sqrt(len(samples)))
