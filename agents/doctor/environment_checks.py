"""Checks that the environment ends, scores and pays responses as the objective defines."""

import numpy as np
import numpy.typing as npt
import torch

from agents.doctor.subject import TOLERANCE, Problem, Subject
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.envs.checked_actions import whole_responses
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import trunk
from rlhf_gym.lm.loading import same_tokens
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD, row_lengths


def ends(subject: Subject) -> Problem | None:
    """Check that each response ends at its first EOS or at the token budget.

    Raises:
        InputError: The environment cannot score the responses.
    """
    env, actions = subject.env, subject.responses.cpu().numpy()
    reference = subject.objective.reference
    eos = np.array(reference.eos_ids if env.stop_at_eos else [], dtype=np.int64)
    try:
        whole_responses(actions, env.num_envs, env.max_new_tokens, reference.vocab_size, eos)
    except InputError as error:
        return Problem(
            "ends",
            f"the environment rejects the policy's responses: {error}",
            "stop sampling at the first token in the reference's eos_ids, keep that token in the "
            "response, and pad with -1 after it",
        )
    # Whatever else is refused, such as a reward function that fails, has its own message.
    env.reset(seed=0)
    env.play(actions, np.zeros(actions.shape, dtype=np.float32))
    return None


def score(subject: Subject) -> Problem | None:
    """Check that the reward model reads the response's last token, not the padding after it."""
    reward = subject.objective.reward
    if not isinstance(reward, RewardModel) or not reward.causal or reward.probability:
        return None
    if not same_tokens(reward.tokenizer, subject.objective.reference.tokenizer):
        return None
    rows = subject.padded.tokens.to(reward.device)
    found = reward.scores(rows)
    plain = []
    for row in rows[:4]:
        kept = row[row != PAD][None]
        with torch.no_grad():
            hidden = trunk(reward.model)(input_ids=kept, use_cache=False).last_hidden_state
            logits = reward.head(hidden[0, -1]) + reward.scale.biases.to(reward.device)
        logits = logits.float()
        plain.append(logits.mean() if reward.column is None else logits[reward.column])
    gap = float((torch.stack(plain) - found[: len(plain)]).abs().max())
    if gap <= TOLERANCE * max(1.0, float(found.abs().max())):
        return None
    return Problem(
        "score",
        f"padding changes the scores of the reward model by {gap:.2g}",
        "use the length of each row to read the hidden state at its last real token",
    )


def rewards(subject: Subject) -> Problem | None:
    """Check that `play` pays what `step` pays, and that rewards sum to score − β Σ k."""
    env, actions = subject.env, subject.responses.cpu().numpy()
    lengths = row_lengths(actions)
    log_probs = np.zeros(actions.shape, dtype=np.float32)
    mask = actions != PAD
    log_probs[mask] = subject.log_probs.cpu().numpy()
    env.reset(seed=0)
    played, infos, _ = env.play(actions, log_probs)
    promised = infos["score"] - subject.objective.kl_coef * np.where(mask, infos["kl"], 0).sum(1)
    gap = float(np.abs(played.sum(1) - promised).max())
    late = float(np.abs(np.where(mask, 0.0, played)).max())
    first = _first_steps(env, actions, log_probs)
    step_gap = float(np.abs(first - played[:, 0])[lengths > 1].max(initial=0.0))
    if max(gap, late, step_gap) <= TOLERANCE:
        return None
    return Problem(
        "rewards",
        f"rewards differ from score − β Σ k by {gap:.2g}; play and step differ by "
        f"{step_gap:.2g}; {late:.2g} is paid after the end of a response",
        "compute all rewards with rlhf_gym.objective.Objective, with the k1 estimator: only then "
        "is the expected return equal to J",
    )


def _first_steps(
    env: TokenVectorEnv, actions: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return what `step` pays for each row's first token, given the policy's log-probs (N, T)."""

    # The environment asks its actor for log-probs. This one answers with those given.
    class Told:
        def log_prob(
            self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
        ) -> npt.NDArray[np.float32]:
            return log_probs[:, 0]

    actor, before = Told(), env.actor
    env.bind_actor(actor, named=False)
    try:
        env.reset(seed=0)
        return env.step(actions[:, 0])[1]
    finally:
        env.bind_actor(before, named=False)
