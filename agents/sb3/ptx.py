"""Texts whose likelihood is mixed into the update: PPO-ptx (Ouyang et al. 2022, section 3.5)."""

import logging
from dataclasses import replace

import numpy as np
import torch

from agents.sb3.options import PolicyGradientOptions
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.masks import NO_MASK
from rlhf_gym.tokens import Sequences
from rlhf_gym.training.sft_counts import losses_line
from rlhf_gym.training.sft_data import as_sequences, load_examples, prepare
from rlhf_gym.utils.once import warn_once

logger = logging.getLogger(__name__)


class PretrainingMix:
    """Adds `coef` · mean log-likelihood of a text's tokens to what an update maximises.

    This keeps a policy near the language of the texts, at a cost in J: the penalty against the
    reference counts as before.

    Args:
        texts: The texts; their chosen tokens are learnt.
        coef: γ of the paper, here a weight of a mean per token like every other term.
    """

    def __init__(self, texts: Sequences, coef: float) -> None:
        self.texts, self.coef = texts, coef

    def draw(self, n_tokens: int) -> Sequences:
        """Random texts with about `n_tokens` learnt tokens, at least one text."""
        order = np.random.permutation(len(self.texts.tokens))
        running = np.cumsum(self.texts.lengths.numpy()[order])
        some = self.texts.rows(torch.from_numpy(order[: 1 + np.searchsorted(running, n_tokens)]))
        return some._replace(tokens=some.tokens[:, : some.width])

    def backward(self, lm: CausalLM, n_tokens: int, max_tokens: int) -> float:
        """Accumulate the gradient of fresh texts with about `n_tokens` learnt tokens.

        Args:
            lm: The policy's language model.
            n_tokens: Tokens to learn.
            max_tokens: Most tokens, padding included, in one pass.

        Returns:
            Their mean negative log-likelihood, nats per token.
        """
        lm = replace(lm, mask=NO_MASK, guide=None)  # a text may hold what an agent may not choose
        texts = self.draw(n_tokens).to(lm.device)
        total = int(texts.lengths.sum())
        mean = 0.0
        for part, _ in passes(lm.model, texts, max_tokens):
            log_probs = lm.log_probs_of(lm.states(part), part.chosen())
            (-self.coef / total * log_probs.sum()).backward()
            mean -= float(log_probs.detach().sum()) / total
        return mean


def pretraining_mix(options: PolicyGradientOptions, env: TokenVectorEnv) -> PretrainingMix | None:
    """The texts that the options mix into the update; None if they mix none.

    Raises:
        InputError: The texts cannot be read, or none fits the environment.
    """
    if options.ptx_data is None:
        return None
    reference = env.objective.reference
    examples = load_examples(options.ptx_data, reference.tokenizer, reference.eos_ids, held_out=0.0)
    longest = env.prompts.max_tokens + env.max_new_tokens
    data = prepare(reference, examples, longest)
    if line := losses_line(data, "max_prompt_tokens + max_new_tokens"):
        warn_once(logger, f"ptx_data {options.ptx_data}: {line}")
    return PretrainingMix(as_sequences(data.train), options.ptx_coef)
