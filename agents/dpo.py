"""Offline DPO, the baseline that everybody asks for. ``--algorithm dpo``.

Rafailov et al. 2023. Without `data` the responses are the reference's, drawn afresh each update and
compared by the environment's score: the data that a collection of comparisons would be, at the same
price in tokens as the other algorithms. With `data` they are a file's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.online_dpo import Labels, check_beta, dpo_loss
from agents.sb3.groups import GroupLearner, Groups
from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import ResponseOptions
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from agents.sb3.rollout.collection import Wave
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import context_length, embedded
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.sampling import Sampled, sample_with_log_probs
from rlhf_gym.lm.masks import NEVER
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.tokens import PAD, continuations, join, pad_rows, unflatten
from rlhf_gym.training.sft_data import SFTExample, own_end


@dataclass(frozen=True)
class Config(ResponseOptions):
    """Options of offline DPO."""

    samples_per_prompt: int | None = 8
    """Responses to each prompt in a wave; None leaves the environment's rows_per_prompt. With
    `data` they are the two of a pair."""
    n_waves: int = 2
    beta: float | None = None
    """β of the loss; the environment's if None."""
    labels: Labels = "soft"
    """Without `data`. hard: the higher score is preferred. soft: with the probability σ(difference
    of scores), by which a Bradley–Terry labeller would prefer it."""
    data: str | None = None
    """Comparisons: a file in any of the formats that scripts/convert_preferences.py knows, or a
    dataset; every pair that a row implies counts once. None samples from the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)


class Pair(NamedTuple):
    """A prompt and two responses to it as token ids, the preferred one first."""

    prompt: Sequence[int]
    winner: Sequence[int]
    loser: Sequence[int]


class OfflineDPO(GroupLearner):
    """DPO on responses that the policy did not choose itself.

    Its log has no metrics of the policy's own responses, since it has none: evaluate the policy
    that it saves.
    """

    Options: ClassVar[type[ResponseOptions]] = Config
    options: Config

    pairs: Sequence[Pair] | None = None
    """What is drawn from; None draws responses of the reference."""

    def _adopt(self, env: TokenVectorEnv) -> None:
        if self.options.data is None:
            super()._adopt(env)
            return
        if env.num_envs % 2:
            raise InputError(f"pairs take two rows each: num_envs must be even, not {env.num_envs}")
        if self.pairs is None:
            self.pairs = load_pairs(self.options.data, env)
        env.group_rows(2)

    def _excluded_save_params(self) -> list[str]:
        # Stable-Baselines3 would save named tuples as lists; the file is read again instead.
        return [*super()._excluded_save_params(), "pairs"]

    def loss(self, groups: Groups) -> Tensor:
        """A mean over pairs; pairs of equal scores say nothing where labels are hard."""
        beta = self.env_kl_coef if self.options.beta is None else self.options.beta
        return dpo_loss(groups, beta, "hard" if self.options.data else self.options.labels)

    def _sample(self, prompts: Tensor, env: TokenVectorEnv) -> Sampled:
        return sample_with_log_probs(
            env.objective.reference, prompts, env.max_new_tokens, stop_at_eos=env.stop_at_eos
        )

    def _needs_scoring_pass(self) -> bool:
        return True  # sampling knows the reference's log-probs

    def _play_wave(self, env: TokenVectorEnv, buffer: SequenceRolloutBuffer) -> Wave:
        if self.pairs is None:
            return super()._play_wave(env, buffer)
        begun = time.perf_counter()
        drawn = [self.pairs[i] for i in np.random.randint(len(self.pairs), size=self.n_envs // 2)]
        prompts = pad_rows([pair.prompt for pair in drawn for _ in range(2)])
        responses = [r for pair in drawn for r in (pair.winner, pair.loser)]
        actions = pad_rows(responses, env.max_new_tokens)
        sequences = continuations(torch.from_numpy(prompts), torch.from_numpy(actions))
        sequences = sequences.to(self.device)
        _, log_probs = self.policy.score(sequences)
        ref_log_probs = env.objective.reference.log_probs(sequences)
        scores = np.zeros(actions.shape)
        scores[::2, 0] = 1.0  # every token gets the sum: the preferred one's is 1
        ours, theirs = (
            unflatten(flat, sequences.lengths, env.max_new_tokens).cpu().numpy()
            for flat in (log_probs, ref_log_probs)
        )
        buffer.add_responses(prompts, actions, scores, np.zeros(actions.shape), ours, theirs)
        env.episodes += self.n_envs
        seconds = {"score": time.perf_counter() - begun}
        infos = {"seconds": seconds, "kl_sum": (ours - theirs).sum(1)}
        before = join(prompts, np.full(actions.shape, PAD))
        return Wave(infos, before, actions, np.zeros(actions.shape), before)

    def _log_waves(self, waves: list[dict[str, Any]], env: TokenVectorEnv) -> None:
        if self.pairs is None:
            scores = np.concatenate([wave["score"] for wave in waves])
            self.logger.record("data/score", float(scores.mean()))
        for stage in waves[0]["seconds"]:
            self._log_stage(stage, sum(wave["seconds"][stage] for wave in waves))


def load_pairs(source: str, env: TokenVectorEnv) -> list[Pair]:
    """Every pair of a file of comparisons that fits the environment.

    Raises:
        InputError: It cannot be read, no pair fits, or one has tokens that the mask bars.
    """
    reference = env.objective.reference
    tokenizer = reference.tokenizer
    pairs, seen = [], 0
    vocab = embedded(reference.model)
    comparisons = [
        c.with_own_ids(tokenizer, vocab) for c in read_comparisons(source, tokenizer=tokenizer)
    ]
    closing = [_end(comparisons, reference)] if env.stop_at_eos else []
    for comparison in comparisons:
        prompt, candidates = comparison.encode(tokenizer, closing)
        for winner, loser in comparison.preferred:
            seen += 1
            longest = max(len(candidates[winner]), len(candidates[loser]))
            shortest = min(len(candidates[winner]), len(candidates[loser]))
            fits = 0 < len(prompt) <= env.prompts.max_tokens
            if fits and 0 < shortest and longest <= env.max_new_tokens:
                pairs.append(Pair(prompt, candidates[winner], candidates[loser]))
    if not pairs:
        raise InputError(
            f"none of the {seen} pairs in {source} fits into {env.prompts.max_tokens} tokens of "
            f"prompt and {env.max_new_tokens} of response; make the environment with a larger "
            "max_prompt_tokens or max_new_tokens"
        )
    if reference.mask:
        check_allowed(pairs, reference, source)
    if len(pairs) < seen:
        print(f"{len(pairs)} of {seen} pairs in {source} fit the environment; the others are left")
    return pairs


def _end(comparisons: Sequence[Comparison], reference: CausalLM) -> int:
    """The EOS id that ends answers that are text, as in fine-tuning."""
    some = [(c.encode(reference.tokenizer, []), c.prompt) for c in comparisons[:32]]
    examples = [
        SFTExample(tuple(prompt), tuple(ids), chat=not isinstance(asked, str))
        for (prompt, candidates), asked in some
        for ids in candidates
    ]
    longest = max(len(example.ids) for example in examples) + 1
    return own_end(reference, examples, min(longest, context_length(reference.model) or longest))


def check_allowed(pairs: Sequence[Pair], reference: CausalLM, source: str) -> None:
    """Raise an InputError if a response has a token that the environment's mask bars."""
    rows = [(p.prompt, response) for p in pairs for response in (p.winner, p.loser)]
    prompts, responses = (torch.from_numpy(pad_rows(part)) for part in zip(*rows, strict=True))
    sequences = continuations(prompts, responses).to(reference.device)
    barred = int((reference.log_probs(sequences) < NEVER / 2).sum())
    if barred:
        raise InputError(
            f"{barred} tokens of the responses in {source} may not be chosen under this "
            "environment's mask; make it without min_new_tokens, top_k, top_p or decodable_only"
        )


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(OfflineDPO, config, env)
