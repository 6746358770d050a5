"""Label a model's samples with a simulated human, and check a reward model against the labels."""

from collections.abc import Sequence
from typing import Any

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.evaluation.reward_models import (
    clustered,
    evaluate_reward_model,
    prompt_numbers,
)
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.preferences.collect import collect_comparisons
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import candidate_rows, encode_comparisons
from rlhf_gym.rewards.functions import TextReward, load_reward, scores_of
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.progress import progress_bar

SIMULATED_HUMAN = "rlhf_gym.rewards.human:compound"


def label_samples(
    env: TokenVectorEnv,
    n: int,
    *,
    model: CausalLM | None = None,
    human: TextReward | str = SIMULATED_HUMAN,
    candidates: int = 4,
    temperature: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> list[Comparison]:
    """Let a simulated human choose among a model's responses to an environment's prompts.

    Args:
        env: The environment of the prompts, the token budget and the reference. Its reward is not
            used.
        n: Number of comparisons.
        model: The model that responds; None takes the environment's reference.
        human: Utility of each response, a function (prompts, responses) -> numbers, or the name of
            such a function, "package.module:function".
        candidates: K, the responses to each prompt that the human chooses among.
        temperature: P(choice) ∝ exp(utility / temperature).
        seed: Seed of prompts, responses and choices.
        progress: Whether to show progress on stderr.
    """
    reference = env.objective.reference
    with progress_bar("comparisons", n, shown=progress) as advance:
        return collect_comparisons(
            reference if model is None else model.following(reference),
            env.prompts,
            utility(human),
            n,
            k=candidates,
            temperature=temperature,
            max_new_tokens=env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
            seed=seed,
            progress=advance,
        )


def hindsight(
    model: RewardModel, comparisons: Sequence[Comparison], human: TextReward | str
) -> dict[str, Any]:
    """Measure a reward model on choices among samples of the policy that was trained against it.

    This shows reward hacking: the score is high, the gold score has not risen with it, and the
    reward model no longer predicts the choices among the policy's samples.

    Args:
        model: The reward model.
        comparisons: Choices among the policy's samples, with their token ids.
        human: The simulated human that chose.

    Returns:
        The samples' mean `score` and `gold`, and the model's `accuracy_on_own_samples`, each a
        figure with its interval over prompts.
    """
    encoded, _ = encode_comparisons(comparisons, model, None)
    texts = [text for c in comparisons for text in c.candidates]
    said = [c.prompt for c in comparisons for _ in c.candidates]
    gold = scores_of(utility(human), said, texts)
    scores = model.scores(candidate_rows(encoded).to(model.device)).double().cpu().numpy()
    prompts = prompt_numbers([c for c in comparisons for _ in c.candidates])
    return {
        "score": clustered(scores, prompts),
        "gold": clustered(gold, prompts),
        "accuracy_on_own_samples": evaluate_reward_model(model, encoded)["accuracy"],
    }


def utility(human: TextReward | str) -> TextReward:
    """Return the simulated human as a function; a name is imported."""
    return load_reward(human) if isinstance(human, str) else human
