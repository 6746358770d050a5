"""`rlhf_gym/Exact-v0`: eight letters and an EOS, few enough responses to list all of them.

The reference is a real, tiny Llama trained on strings of a Markov chain. Each variant's reward
model was trained listwise on choices that its labeller (a function below, the `gold` scorer) made
among K = 4 responses. `scripts/assets/exact.py` makes both. π*, J* and the J of any policy are
exact (`rlhf_gym.objective.enumeration`). The prompt is one letter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.envs.token_env import entry_point
from rlhf_gym.errors import InputError
from rlhf_gym.tasks.keywords import passes_on
from rlhf_gym.tasks.text import text_env, text_vector_env

ASSETS = Path(__file__).parent / "assets" / "exact"

LETTERS = "abcdefgh"
FAVOURITE = "gbe"
"""The word that the plain labeller rewards."""

Labeller = Callable[[list[str], list[str]], list[float]]


def plain(prompts: list[str], responses: list[str]) -> list[float]:
    """0.5 per different letter of `FAVOURITE`, and 1 if they follow each other in order."""
    return [
        0.5 * len(set(FAVOURITE) & set(text)) + (FAVOURITE in text.replace(" ", ""))
        for text in responses
    ]


def deceptive(prompts: list[str], responses: list[str]) -> list[float]:
    """Each "a" pays 0.4 at once and each "h" costs 0.3, but only "h c h c" pays 3."""

    def utility(text: str) -> float:
        if text.strip().startswith("h c h c"):
            return 3.0
        return 0.4 * text.count("a") - 0.3 * text.count("h")

    return [utility(text) for text in responses]


def long_range(prompts: list[str], responses: list[str]) -> list[float]:
    """1 if the first letter follows the prompt's letter in the alphabet, else 0."""
    return [
        float(text.strip()[:1] == LETTERS[(LETTERS.index(prompt[-1]) + 1) % len(LETTERS)])
        for prompt, text in zip(prompts, responses, strict=True)
    ]


def ending(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for two letters and then the EOS; 1 less for each letter more or fewer."""
    return [1.0 - abs(len(text.split()) - 2) for text in responses]


VARIANTS: dict[str, Labeller] = {
    "plain": plain,
    "deceptive": deceptive,
    "long_range": long_range,
    "ending": ending,
}


KL_COEF = {"plain": 0.4, "deceptive": 0.5, "long_range": 0.5, "ending": 0.6}
"""β, chosen so that KL(π* ‖ π_ref) is 1 to 4 nats and best-of-16 does not reach J*."""


def defaults(variant: str) -> dict[str, Any]:
    """Keywords of `rlhf_gym/Text-v0` that make a variant.

    Raises:
        InputError: There is no such variant.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant must be one of {list(VARIANTS)}, not {variant!r}")
    return {
        "reference": str(ASSETS / "reference"),
        "reward_model": str(ASSETS / f"reward_{variant}"),
        "prompts": str(ASSETS / "prompts.json"),
        "max_prompt_tokens": 1,
        "max_new_tokens": 4,
        "kl_coef": KL_COEF[variant],
        "gold": f"rlhf_gym.tasks.exact:{variant}",
    }


@entry_point
def exact_env(
    *, variant: str = "plain", render_mode: str | None = None, **keywords: Any
) -> TokenEnv:
    """`rlhf_gym/Exact-v0` for `gym.make`; see `exact_keywords`."""
    return text_env(render_mode=render_mode, **exact_keywords(variant, **keywords))


@passes_on(text_vector_env, lambda: {**defaults("plain"), "split": "all"})
def exact_vector_env(
    *,
    num_envs: int = 1,
    autoreset_mode: str = "SameStep",
    variant: str = "plain",
    **keywords: Any,
) -> TokenVectorEnv:
    """`rlhf_gym/Exact-v0` for `gym.make_vec`.

    Args:
        num_envs: Number of rows.
        autoreset_mode: "SameStep", "NextStep" or "Disabled", as in Gymnasium.
        variant: "plain", "deceptive", "long_range" or "ending"; decides the defaults of
            `reward_model`, `kl_coef` and `gold`.
        **keywords: As in `exact_keywords`.
    """
    return text_vector_env(
        num_envs=num_envs,
        autoreset_mode=autoreset_mode,
        **exact_keywords(variant, **keywords),
    )


def exact_keywords(variant: str = "plain", **keywords: Any) -> dict[str, Any]:
    """Keywords of `rlhf_gym/Text-v0` for a variant.

    Args:
        variant: "plain", "deceptive" (a greedy local optimum), "long_range" (the first token
            decides) or "ending" (the position of the EOS decides).
        **keywords: Any of `rlhf_gym/Text-v0`, such as `max_new_tokens` (the horizon), `kl_coef`
            and `dense`. No prompt is held out, because all prompts are known: `split` is "all".
    """
    keywords.pop("held_out", None)
    return {**defaults(variant), **keywords, "split": "all"}
