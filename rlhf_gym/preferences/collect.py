"""Comparisons among a model's own samples, chosen by a simulated human."""

from collections.abc import Callable

import numpy as np
import torch

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.rewards.functions import TextReward, judged_by
from rlhf_gym.rewards.human import choose
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tokens import PAD, continuations, pad_rows

ROWS_PER_PASS = 512


def collect_comparisons(
    lm: CausalLM,
    prompts: PromptDataset,
    human: TextReward,
    n: int,
    *,
    k: int = 4,
    temperature: float = 0.25,
    max_new_tokens: int,
    stop_at_eos: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Comparison]:
    """Draw n prompts and k responses to each; the human chooses one, Boltzmann-rationally.

    Args:
        lm: The model that writes the candidates, usually the reference.
        prompts: The prompts to draw from, with replacement.
        human: Utility of each response, as (prompts, responses) -> numbers.
        n: Number of comparisons.
        k: Number of candidates of each, K.
        temperature: P(choice) ∝ exp(utility / temperature).
        max_new_tokens: Token budget of a response.
        stop_at_eos: Whether an EOS ends a response.
        seed: Seed of prompts, responses and choices.
        progress: Called after each batch with the number of new comparisons.

    Returns:
        Comparisons with the sampled ids, so that nothing is re-tokenised.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator(lm.device).manual_seed(seed)
    comparisons: list[Comparison] = []
    per_pass = max(1, ROWS_PER_PASS // k)
    while len(comparisons) < n:
        some = [prompts.draw(rng) for _ in range(min(per_pass, n - len(comparisons)))]
        rows = torch.from_numpy(pad_rows([p for p in some for _ in range(k)])).to(lm.device)
        replies = sample_responses(
            lm, rows, max_new_tokens, stop_at_eos=stop_at_eos, generator=generator
        )
        responses = Responses(
            lm, continuations(rows, replies), stop_at_eos=stop_at_eos, chats=prompts.chats
        )
        utilities = judged_by(human, responses).reshape(-1, k)
        chosen = choose(utilities, temperature, rng)
        ids = [tuple(row[row != PAD].tolist()) for row in replies.cpu()]
        reasons = responses.finish_reasons
        for i, prompt in enumerate(some):
            group = slice(i * k, (i + 1) * k)
            comparisons.append(
                Comparison(
                    prompt=responses.asked[i * k],
                    candidates=tuple(responses.texts[group]),
                    best=int(chosen[i]),
                    ids=(prompt, tuple(ids[group])),
                    finish_reasons=tuple(reasons[group]),
                )
            )
        if progress is not None:
            progress(len(some))
    return comparisons
