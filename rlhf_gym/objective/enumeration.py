"""A task whose responses can be listed: π*, V*, J* and the J of any policy, exactly.

A state at depth t is a prompt and t tokens that do not end the response. For each depth there is a
table over states and actions.

Notation: P prompts, H the token budget, V tokens, of which W continue (the others end the
response), n_t = Wᵗ states of a prompt at depth t. They are in order: the j-th continuing action
leads from state i to state i·W + j. All sums are float64.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from rlhf_gym.errors import InputError
from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tokens import Sequences, pad_rows
from rlhf_gym.utils.arrays import Floats, Ints

Table = list[Floats]
"""One array per depth t = 0 … H − 1, (P, n_t, V): a number for each action in each state."""

MAX_RESPONSES = 4_000_000
"""Most responses, over all prompts, that are listed."""

QUICKLY_LISTED = 400_000
"""Up to this many, evaluation lists all responses instead of sampling (seconds on one core)."""

ROWS_PER_PASS = 1 << 15


class Value(NamedTuple):
    """The value of a policy on each prompt.

    Attributes:
        objective: (P,) J = score − β · kl.
        score: (P,) expected R(x, y).
        kl: (P,) KL(π ‖ π_ref) in nats per sequence.
    """

    objective: Floats
    score: Floats
    kl: Floats


def response_count(vocab_size: int, ends: int, horizon: int) -> int:
    """Number of responses to a prompt: `ends` of V tokens end one, the budget ends the others."""
    going = vocab_size - ends
    return int(sum(going**t * ends for t in range(horizon)) + going**horizon)


def listable(
    objective: Objective, prompts: int, max_new_tokens: int, stop_at_eos: bool = True
) -> bool:
    """Whether there is a soft optimum (β > 0), and listing all responses beats sampling."""
    reference = objective.reference
    ends = sum(i < reference.vocab_size for i in reference.eos_ids) if stop_at_eos else 0
    # e^30 responses are far too many, and the powers below would get slow.
    if objective.kl_coef == 0 or max_new_tokens * math.log(reference.vocab_size) > 30:
        return False
    return prompts * response_count(reference.vocab_size, ends, max_new_tokens) <= QUICKLY_LISTED


class Enumeration:
    """Every response to some prompts, with its reward and its reference log-prob.

    Args:
        objective: Reward, reference and β > 0.
        prompts: P prompts as ids.
        max_new_tokens: H.
        stop_at_eos: Whether an EOS ends a response.

    Raises:
        InputError: β is 0, or there are more than `MAX_RESPONSES`.
    """

    def __init__(
        self,
        objective: Objective,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_at_eos: bool = True,
    ) -> None:
        self.objective = objective
        self.prompts = [tuple(p) for p in prompts]
        self.horizon = max_new_tokens
        reference = objective.reference
        if not objective.kl_coef > 0:
            raise InputError(
                "kl_coef is 0; without a penalty there is no soft optimum to solve for"
            )
        ends = np.zeros(reference.vocab_size, dtype=np.bool_)
        if stop_at_eos:
            ends[[i for i in reference.eos_ids if i < reference.vocab_size]] = True
        count = response_count(reference.vocab_size, int(ends.sum()), self.horizon)
        if count * len(self.prompts) > MAX_RESPONSES:
            raise InputError(
                f"{count:,} responses to each of {len(self.prompts)} prompts are too many to list "
                f"(at most {MAX_RESPONSES:,} in all); estimate from samples "
                "(rlhf_gym.objective.optimum), or lower max_new_tokens"
            )
        self.responses = count
        self._ends = ends
        self._going: Ints = np.flatnonzero(~ends)

    @cached_property
    def reference(self) -> Table:
        """Log π_ref of every action in every state."""
        return self.log_probs(self.objective.reference)

    def log_probs(self, lm: CausalLM) -> Table:
        """Log-prob of every action in every state under a model.

        Mask and temperature are the reference's, whatever the model's own.
        """
        return [self._log_probs_at(lm, depth) for depth in range(self.horizon)]

    @cached_property
    def scores(self) -> Table:
        """R(x, y) of every action that ends its response; 0 for the others."""
        return [self._scores_at(depth) for depth in range(self.horizon)]

    @cached_property
    def optimum(self) -> Table:
        """Log π* by soft value iteration, V*(s) = β log Σ_a π_ref(a|s) exp(Q*(s, a) / β).

        Source: Todorov 2009 (linearly solvable MDPs); Haarnoja et al. 2017 (arXiv 1702.08165).
        """
        return self._backward_optimum()[0]

    @cached_property
    def best_value(self) -> Floats:
        """(P,) J* by soft value iteration."""
        return self._backward_optimum()[1]

    @cached_property
    def best_value_by_sum(self) -> Floats:
        """(P,) J* = β log Σ_y π_ref(y) exp(R(y) / β), summed over all responses."""
        log_ref, scores = self.flat(self.reference), self.flat_scores
        value: Floats = self._beta * np.logaddexp.reduce(log_ref + scores / self._beta, axis=1)
        return value

    @cached_property
    def flat_scores(self) -> Floats:
        """(P, responses) R of every response, in the order of `flat`."""
        return np.concatenate(
            [s[:, :, last].reshape(len(s), -1) for s, last in self._leaves(self.scores)], axis=1
        )

    def flat(self, policy: Table) -> Floats:
        """(P, responses) log-prob of every whole response under a policy's table."""
        reached = np.zeros((len(self.prompts), 1))
        parts = []
        for depth, (table, last) in enumerate(self._leaves(policy)):
            joint = reached[:, :, None] + table
            parts.append(joint[:, :, last].reshape(len(table), -1))
            if depth < self.horizon - 1:
                reached = joint[:, :, self._going].reshape(len(table), -1)
        return np.concatenate(parts, axis=1)

    def value(self, policy: Table) -> Value:
        """J, expected score and KL of a policy, by backward induction over the states."""
        score = kl = np.zeros((len(self.prompts), 1))
        for depth in reversed(range(self.horizon)):
            log_p, p = policy[depth], np.exp(policy[depth])
            # An action of probability 0 costs nothing; its log-ratio may be infinite.
            cost = np.where(p > 0, log_p - self.reference[depth], 0.0)
            score = (p * self._ahead(depth, score, self.scores[depth])).sum(2)
            kl = (p * self._ahead(depth, kl, np.zeros_like(cost), cost)).sum(2)
        score, kl = score[:, 0], kl[:, 0]
        return Value(score - self._beta * kl, score, kl)

    def improved(self, policy: Table) -> Table:
        """One step of exact soft policy iteration, π′ ∝ π_ref · exp(Q^π / β)."""
        table: Table = []
        value = np.zeros((len(self.prompts), 1))
        for depth in reversed(range(self.horizon)):
            q = self._ahead(depth, value, self.scores[depth])
            log_p, p = policy[depth], np.exp(policy[depth])
            gain = q - self._beta * np.where(p > 0, log_p - self.reference[depth], 0.0)
            value = (p * gain).sum(2)
            table.insert(0, _normalised(self.reference[depth] + q / self._beta))
        return table

    @cached_property
    def best_deterministic(self) -> Value:
        """The value of the best deterministic policy: one response y per prompt.

        Its KL is −log π_ref(y|x), so it maximises R(x, y) + β · log π_ref(y|x).
        """
        log_ref, scores = self.flat(self.reference), self.flat_scores
        best = (scores + self._beta * log_ref).argmax(1)[:, None]
        score, kl = (np.take_along_axis(x, best, 1)[:, 0] for x in (scores, -log_ref))
        return Value(score - self._beta * kl, score, kl)

    def best_of_n(self, n: int) -> Value:
        """The value of best-of-n draws of the reference; ties are broken at random."""
        scores = self.flat_scores
        p = np.exp(self.flat(self.reference))
        p /= p.sum(1, keepdims=True)
        out = np.empty((3, len(p)))
        for row, (score, mass) in enumerate(zip(scores, p, strict=True)):
            _, group = np.unique(score, return_inverse=True)
            upto = np.cumsum(np.bincount(group, weights=mass)).clip(max=1.0)
            below = np.concatenate([[0.0], upto[:-1]])
            # P(the best is y) = π_ref(y) / π_ref(group) · (F(≤ R)ⁿ − F(< R)ⁿ).
            lift = ((upto**n - below**n) / np.maximum(upto - below, np.finfo(float).tiny))[group]
            q = mass * lift
            kl = (q * np.log(np.maximum(lift, np.finfo(float).tiny))).sum()
            out[:, row] = (q * score).sum() - self._beta * kl, (q * score).sum(), kl
        return Value(*out)

    def optimality(self, objective: Floats) -> float:
        """(J − J_ref) / (J* − J_ref), means over prompts, given a policy's J = `objective` (P,)."""
        before = self.value(self.reference).objective
        return float((objective - before).mean() / (self.best_value - before).mean())

    @property
    def _beta(self) -> float:
        return self.objective.kl_coef

    def _leaves(self, table: Table) -> list[tuple[Floats, npt.NDArray[np.bool_]]]:
        """The table of each depth, and which of its actions end a response."""
        everything = np.ones_like(self._ends)
        return [
            (t, everything if d == self.horizon - 1 else self._ends) for d, t in enumerate(table)
        ]

    def _ahead(
        self, depth: int, after: Floats, ending: Floats, now: Floats | float = 0.0
    ) -> Floats:
        """Value after each action: `ending` if it ends the response, else `after` of its state."""
        out = ending + now
        if depth < self.horizon - 1:
            out[:, :, self._going] += after.reshape(len(out), -1, len(self._going))
        return out

    def _backward_optimum(self) -> tuple[Table, Floats]:
        value = np.zeros((len(self.prompts), 1))
        table: Table = []
        for depth in reversed(range(self.horizon)):
            logs = (
                self.reference[depth] + self._ahead(depth, value, self.scores[depth]) / self._beta
            )
            value = self._beta * np.logaddexp.reduce(logs, axis=2)
            table.insert(0, _normalised(logs))
        return table, value[:, 0]

    def _states(self, depth: int) -> list[tuple[int, ...]]:
        """Rows of all states at a depth, prompt by prompt."""
        tails = list(itertools.product(self._going.tolist(), repeat=depth))
        return [(*prompt, *tail) for prompt in self.prompts for tail in tails]

    @torch.no_grad()
    def _log_probs_at(self, lm: CausalLM, depth: int) -> Floats:
        rows = self._states(depth)
        # `states` gives the state before a chosen token; which token is chosen does not matter.
        tokens = torch.from_numpy(pad_rows([[*row, 0] for row in rows]))
        starts = torch.tensor([len(row) for row in rows])
        sequences = Sequences(tokens, starts, torch.ones_like(starts)).to(lm.device)
        out = torch.empty(len(rows), lm.vocab_size, dtype=torch.float64)
        reference = self.objective.reference
        lm = lm.following(reference) if lm is not reference else lm
        for part, places in passes(lm.model, sequences):
            hidden = lm.states(part)
            guiding = hidden if lm.guide is None else lm.guide.states(part)
            limits = reference.next_limits(guiding, torch.full_like(part.starts, depth))
            logits = lm.logits(hidden, limits).double()
            out[places.cpu()] = F.log_softmax(logits, -1).cpu()
        return out.numpy().reshape(len(self.prompts), -1, lm.vocab_size)

    @torch.no_grad()
    def _scores_at(self, depth: int) -> Floats:
        reference = self.objective.reference
        last = depth == self.horizon - 1
        finals = np.arange(len(self._ends)) if last else np.flatnonzero(self._ends)
        rows = self._states(depth)
        out = np.zeros((len(rows), len(self._ends)))
        if not len(finals):
            return out.reshape(len(self.prompts), -1, len(self._ends))
        per_pass = max(1, ROWS_PER_PASS // len(finals))
        for at in range(0, len(rows), per_pass):
            some = rows[at : at + per_pass]
            whole = [(*row, a) for row in some for a in finals.tolist()]
            lengths = torch.full((len(whole),), depth + 1)
            starts = torch.tensor([len(row) for row in whole]) - lengths
            sequences = Sequences(torch.from_numpy(pad_rows(whole)), starts, lengths)
            scores = self.objective.scores(
                Responses(
                    reference,
                    sequences.to(reference.device),
                    stop_at_eos=bool(self._ends.any()),
                    chats=self.objective.chats,
                )
            )
            out[at : at + per_pass, finals] = scores.double().cpu().numpy().reshape(len(some), -1)
        return out.reshape(len(self.prompts), -1, len(self._ends))


def _normalised(logs: Floats) -> Floats:
    table: Floats = logs - np.logaddexp.reduce(logs, axis=2, keepdims=True)
    return table
