"""The published optimum of a real pretrained model is found again."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from rlhf_gym.evaluation.drawing import draw_responses
from rlhf_gym.objective.optimum import best_value

SHARED = Path(__file__).parents[2] / "shared"
MODEL, STORIES = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories-1000.json"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is not here")
def test_the_optimum_of_stories260k_is_the_published_one():
    """β = 0.1, 48 new tokens, VADER as reward, 32 prompts × 512 samples: J* = 0.754.

    How many words of a story make a prompt was not published; here it is the first eight words of
    the first 32 stories, and the interval is over prompts.
    """
    env = gymnasium.make(
        "rlhf_gym/Text-v0",
        reference=str(MODEL),
        reward_model="rlhf_gym.rewards.human:compound",
        prompts=str(STORIES),
        prompt_words=8,
        max_prompt_tokens=40,
        max_new_tokens=48,
        kl_coef=0.1,
        split="all",
        device="cpu",
    ).unwrapped
    reference = env.objective.reference
    drawn = draw_responses(
        reference,
        reference,
        env.objective,
        list(env.prompts.ids[:32]),
        512,
        max_new_tokens=48,
        generator=torch.Generator().manual_seed(0),
    )
    best = best_value(drawn.scores, 0.1)
    values = best.value
    se = values.std(ddof=1) / np.sqrt(len(values))  # prompts are a sample too
    print(
        f"reference {drawn.scores.mean():.3f}, J* {values.mean():.3f} ± {se:.3f}, score "
        f"{best.score.mean():.3f}, KL {best.kl.mean():.2f}, ESS {best.ess.mean():.0f}"
    )
    assert abs(values.mean() - 0.754) < 1.96 * se
    assert best.ess.mean() > 20
