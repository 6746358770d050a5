"""A pre-flight over an environment and a policy: seconds long, before hours are spent.

Each check asks one thing that must hold (DESIGN of the objective: ratio 1, KL 0, one log-prob, one
reward) and says, where it does not, what is wrong and how to mend it. Notation: N rows, T tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.sb3.policy import CausalLMPolicy
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.masks import NO_MASK, Mask
from rlhf_gym.models import same_tokens, trunk
from rlhf_gym.reward_model import RewardModel
from rlhf_gym.sampling import draw
from rlhf_gym.tokens import PAD, Sequences, append, continuations, row_lengths, row_sums

TOLERANCE = 1e-3
"""Nats by which two computations of one log-prob may differ (float32, in another order)."""

ROUNDED = 0.5
"""The same for a policy in bfloat16, whose logits have 8 bits, against float32 or another order."""

REPEATED = 5e-2
"""The same for two computations in bfloat16 by one function; their mean to `TOLERANCE`."""

UNLIKELY = 6.0
"""Standard errors that a sample's surprise may lie from the entropy."""


@dataclass(frozen=True)
class Problem:
    """Something that does not hold.

    Attributes:
        check: The check's name.
        what: What is wrong.
        mend: How to mend it.
    """

    check: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}\n  mend: {self.mend}"


class Patient:
    """An environment and a policy, with one wave of the policy's own responses.

    Args:
        env: The environment. A small one with its objective and prompts is examined in its place,
            so that its rows stay where they are.
        policy: The policy.
        fresh: Whether the policy has not learned yet, so that it must be the reference.
        rows: Responses to examine.
    """

    def __init__(
        self, env: TokenVectorEnv, policy: CausalLMPolicy, *, fresh: bool = True, rows: int = 16
    ) -> None:
        env = TokenVectorEnv(
            env.objective,
            env.prompts,
            num_envs=rows,
            max_new_tokens=env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
        )
        self.env, self.policy, self.fresh = env, policy, fresh
        self.objective = env.objective
        policy.set_training_mode(False)
        observations, _ = env.reset(seed=0)
        self.prompts = torch.from_numpy(observations[:, : env.prompts.max_tokens])
        self.prompts = self.prompts.to(policy.device)
        with _own_chance():
            self.sampled = policy.sample_with_log_probs(
                self.prompts, env.max_new_tokens, env.stop_at_eos
            )
        self.responses = self.sampled.responses
        self.sequences = continuations(self.prompts, self.responses)

    @property
    def tolerance(self) -> float:
        """Nats by which two computations of one of the policy's log-probs may differ."""
        return TOLERANCE if self.policy.precision == "fp32" else ROUNDED

    def agrees(self, log_probs: Tensor) -> bool:
        """Whether log-probs (M,) that the score pass's function computed anew are the same."""
        gap = (log_probs - self.log_probs).abs()
        most = TOLERANCE if self.policy.precision == "fp32" else REPEATED
        return float(gap.max()) <= most and float(gap.mean()) <= TOLERANCE

    @cached_property
    def log_probs(self) -> Tensor:
        """(M,) by the policy's score pass."""
        return self.policy.score(self.sequences)[1]


def padding(patient: Patient, responses: Tensor) -> Sequences:
    """The same sequences with more padding on the right."""
    tokens = continuations(patient.prompts, responses)
    wide = torch.nn.functional.pad(tokens.tokens, (0, 3), value=PAD)
    return Sequences(wide, tokens.starts, tokens.lengths)


def vocabulary(patient: Patient) -> Problem | None:
    """The policy may choose exactly the tokens that the environment's tokenizer can name."""
    wide = patient.policy.action_space.n  # type: ignore[attr-defined]
    named = patient.objective.reference.vocab_size
    ours = patient.policy.core.vocab_size
    largest = int(patient.responses.max())
    if ours == wide == named and largest < named:
        return None
    return Problem(
        "vocabulary",
        f"the policy chooses among {ours} tokens, the environment takes {wide}, its tokenizer "
        f"names {named}; the largest id drawn was {largest}",
        "start the policy from the environment's reference; logits beyond the tokenizer's names "
        "are padding and must be dropped before the softmax (CausalLM.vocab_size)",
    )


def temperature(patient: Patient) -> Problem | None:
    """Policy and reference divide their logits by the same temperature."""
    ours, theirs = patient.policy.core.temperature, patient.objective.reference.temperature
    if ours == theirs:
        return None
    return Problem(
        "temperature",
        f"the policy's temperature is {ours}, the environment's {theirs}",
        "pass the environment's temperature to the policy (agents.sb3.vec_env.policy_kwargs does)",
    )


def dropout(patient: Patient) -> Problem | None:
    """Training mode computes what evaluation mode does."""
    patient.policy.set_training_mode(True)
    with torch.no_grad():
        trained = patient.policy.evaluate_actions(patient.sequences, patient.sequences.chosen())[1]
    patient.policy.set_training_mode(False)
    if patient.agrees(trained):
        return None
    gap = float((trained - patient.log_probs).abs().max())
    return Problem(
        "dropout",
        f"log-probs in training mode differ from those in evaluation mode by {gap:.2g} nats",
        "switch dropout off in the modules and the config (rlhf_gym.models.load_pretrained does)",
    )


def ratio(patient: Patient) -> Problem | None:
    """Before the first update, the update's log-probs are the rollout's: the ratio is 1."""
    with torch.enable_grad():
        now = patient.policy.evaluate_actions(patient.sequences, patient.sequences.chosen())[1]
    if patient.agrees(now.detach()):
        return None
    worst = float((now.detach() - patient.log_probs).exp().sub(1).abs().max())
    return Problem(
        "ratio",
        f"the first ratio π_θ/π_old is off by {worst:.2g}",
        "compute old and new log-probs by one function, in one precision, at one temperature",
    )


def recomputed(patient: Patient) -> Problem | None:
    """The score pass agrees with plain transformers, one unpadded row at a time."""
    core = patient.policy.core
    first = int(patient.sequences.lengths[0])
    row = patient.sequences.tokens[:1, : int(patient.sequences.starts[0]) + first]
    with torch.no_grad():
        logits = core.model(input_ids=row, use_cache=False).logits[0]
    logits = logits[-first - 1 : -1, : patient.objective.reference.vocab_size].float()
    logits = logits / patient.objective.reference.temperature
    limits = core.limits(patient.sequences.rows(slice(0, 1)))
    log_p = torch.log_softmax(core.mask.ban(logits, limits), -1)
    plain = log_p.gather(1, row[0, -first:, None])[:, 0]
    gap = float((plain - patient.log_probs[:first]).abs().max())
    if gap <= patient.tolerance:
        return None
    return Problem(
        "recomputed",
        f"the policy's log-probs are {gap:.2g} nats from those of a plain forward pass",
        "logits[t] score token t + 1; divide by the temperature; drop the padded vocabulary",
    )


def drawn_as_scored(patient: Patient) -> Problem | None:
    """Responses are drawn from the very distribution that the log-probs describe."""
    with torch.no_grad():
        core = patient.policy.core
        hidden, limits = core.states(patient.sequences), core.limits(patient.sequences)
        log_p = torch.log_softmax(core.logits(hidden, limits), -1)
    p = log_p.exp()
    surprise = -log_p.gather(1, patient.sequences.chosen()[:, None])[:, 0]
    entropy = -(p * log_p).sum(1)
    variance = (p * log_p**2).sum(1) - entropy**2
    gap = float((surprise - entropy).sum())
    spread = float(variance.clamp(min=0).sum().sqrt()) + 1e-6
    if abs(gap) <= UNLIKELY * spread:
        return None
    how = "likelier" if gap < 0 else "less likely"
    return Problem(
        "drawn as scored",
        f"the responses are {how} than chance allows under the policy's own log-probs "
        f"({abs(gap) / spread:.0f} standard errors)",
        "the sampler must not have a temperature, top-k, top-p or minimum length that the "
        "log-probs do not have",
    )


def cache(patient: Patient) -> Problem | None:
    """Cached decoding is a full forward, also right after the weights have changed."""
    # Two columns more, for the tokens that are added below.
    observations = np.pad(patient.env.reset(seed=0)[0], ((0, 0), (0, 2)), constant_values=PAD)
    policy = patient.policy
    weights = [p for p in policy.lm.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in weights]
    worst = 0.0
    with torch.no_grad(), _unmasked(policy):
        try:
            for change in (False, False, True):  # a prefill, a step, a step by other weights
                if change:
                    for p in weights:
                        p.mul_(1.1)
                rows = torch.from_numpy(observations).to(policy.device)
                cached = policy.get_distribution(rows).log_p
                full = torch.log_softmax(policy.core.logits(_full(policy, rows)), -1)
                worst = max(worst, float((cached - full).abs().max()))
                if not change:
                    observations = append(observations, draw(full).cpu().numpy())
        finally:
            for p, before in zip(weights, kept, strict=True):
                p.copy_(before)
    if worst <= patient.tolerance:
        return None
    return Problem(
        "cache",
        f"cached decoding is {worst:.2g} nats from a full forward pass",
        "drop keys and values whenever a parameter changes (rlhf_gym.decode.DecodeCache does), and "
        "write each row at its own position",
    )


def decoding(patient: Patient) -> Problem | None:
    """What decoding keeps of each token, and the rollout stores, is what the update computes."""
    if not patient.policy.decoding_scores:
        return None  # the rollout takes a score pass
    kept = patient.sampled.log_probs[patient.responses != PAD]
    gap = float((kept - patient.log_probs).abs().max())
    if gap <= TOLERANCE:
        return None
    return Problem(
        "decoding",
        f"the log-probs that decoding keeps are {gap:.2g} nats from those of whole sequences",
        "look at what the model's attention or positions take from a row's length: decoding must "
        "leave such a model to full forwards (rlhf_gym.decode.looks_plain)",
    )


def neighbours(patient: Patient) -> Problem | None:
    """A row's log-probs depend neither on the other rows nor on padding."""
    score = patient.policy.score
    whole = row_sums(patient.log_probs, patient.sequences.lengths)
    padded = row_sums(score(padding(patient, patient.responses))[1], patient.sequences.lengths)
    alone = torch.stack(
        [
            score(patient.sequences.rows(torch.tensor([i], device=whole.device)))[1].double().sum()
            for i in range(min(len(whole), 4))
        ]
    )
    gap = max(float((whole - padded).abs().max()), float((whole[: len(alone)] - alone).abs().max()))
    if gap <= patient.tolerance * patient.env.max_new_tokens:
        return None
    return Problem(
        "neighbours",
        f"a response's log-prob changes by {gap:.2g} nats with its padding or its neighbours",
        "pad on the right, mask by length and never by pad_token_id or eos_token_id",
    )


def start(patient: Patient) -> Problem | None:
    """Before it has learned, the policy is the reference: KL = 0."""
    if not patient.fresh:
        return None
    reference = patient.objective.ref_log_probs(patient.sequences)
    gap = float((patient.log_probs - reference).abs().max())
    if gap <= patient.tolerance:
        return None
    return Problem(
        "start",
        f"the policy has not learned yet, but is {gap:.2g} nats from its reference",
        "start the policy from the environment's reference, at its temperature and revision",
    )


def frozen(patient: Patient) -> Problem | None:
    """The reference does not learn, and shares no weight with the policy (below adapters, all)."""
    reference, policy = patient.objective.reference.model, patient.policy
    adapted = policy.lora_rank > 0
    ours = {p.data_ptr() for p in policy.parameters() if p.requires_grad or not adapted}
    shared = sum(p.data_ptr() in ours for p in reference.parameters())
    learning = sum(p.requires_grad for p in reference.parameters())
    if not shared and not learning:
        return None
    return Problem(
        "frozen",
        f"{shared} of the reference's tensors are the policy's own, {learning} would learn",
        "load the policy's weights a second time; call requires_grad_(False) on the reference",
    )


def mask(patient: Patient) -> Problem | None:
    """Policy and reference may choose the same tokens."""
    core, reference = patient.policy.core, patient.objective.reference
    guided = core.guide is not None and core.guide.model is reference.model
    if core.mask == reference.mask and (guided or not core.mask.follows_reference):
        return None
    return Problem(
        "mask",
        f"the policy's mask is {_said(core.mask)}, the environment's {_said(reference.mask)}",
        "call CausalLMPolicy.follow(env.objective.reference) (agents.sb3.vec_env.build does)",
    )


def _said(mask: Mask) -> str:
    rules = [f"{len(mask.never)} tokens banned"] if mask.never else []
    for name in ("min_new_tokens", "top_k", "top_p"):
        if getattr(mask, name):
            rules.append(f"{name} {getattr(mask, name)}")
    return ", ".join(rules) or "none"


def ends(patient: Patient) -> Problem | None:
    """A response ends at its first EOS, or at the budget."""
    try:
        patient.env.reset(seed=0)
        actions = patient.responses.cpu().numpy()
        patient.env.play(actions, np.zeros(actions.shape, dtype=np.float32))
    except ValueError as error:
        return Problem(
            "ends",
            f"the environment refuses the policy's responses: {error}",
            "stop sampling at the first of the reference's eos_ids, which belongs to the response, "
            "and pad with -1 behind it",
        )
    return None


def score(patient: Patient) -> Problem | None:
    """The reward model reads the last token of the response, not the padding behind it."""
    reward = patient.objective.reward
    if not isinstance(reward, RewardModel) or not reward.causal or reward.probability:
        return None
    if not same_tokens(reward.tokenizer, patient.objective.reference.tokenizer):
        return None
    rows = padding(patient, patient.responses).tokens.to(reward.device)
    found = reward.scores(rows)
    plain = []
    for row in rows[:4]:
        kept = row[row != PAD][None]
        with torch.no_grad():
            hidden = trunk(reward.model)(input_ids=kept, use_cache=False).last_hidden_state
            logits = reward.head(hidden[0, -1]) + reward.biases.to(reward.device)
        logits = logits.float()
        plain.append(logits.mean() if reward.column is None else logits[reward.column])
    gap = float((torch.stack(plain) - found[: len(plain)]).abs().max())
    if gap <= TOLERANCE * max(1.0, float(found.abs().max())):
        return None
    return Problem(
        "score",
        f"scores of padded rows are {gap:.2g} from those of the same rows alone",
        "take the hidden state at each row's last real token, by its length",
    )


def rewards(patient: Patient) -> Problem | None:
    """`play` pays what `step` pays, and a response's rewards sum to score − β Σ k."""
    env, actions = patient.env, patient.responses.cpu().numpy()
    lengths = row_lengths(actions)
    log_probs = np.zeros(actions.shape, dtype=np.float32)
    mask = actions != PAD
    log_probs[mask] = patient.log_probs.cpu().numpy()
    env.reset(seed=0)
    played, infos, _ = env.play(actions, log_probs)
    promised = infos["score"] - patient.objective.kl_coef * np.where(mask, infos["kl"], 0).sum(1)
    gap = float(np.abs(played.sum(1) - promised).max())
    late = float(np.abs(np.where(mask, 0.0, played)).max())
    first = _first_steps(env, actions, log_probs)
    step_gap = float(np.abs(first - played[:, 0])[lengths > 1].max(initial=0.0))
    if max(gap, late, step_gap) <= TOLERANCE:
        return None
    return Problem(
        "rewards",
        f"rewards miss score − β Σ k by {gap:.2g}; play and step differ by {step_gap:.2g}; "
        f"{late:.2g} is paid behind the end",
        "settle rewards with rlhf_gym.objective.Objective alone, with k1 as the estimator: only "
        "then is the expected return J",
    )


CHECKS: tuple[Callable[[Patient], Problem | None], ...] = (
    vocabulary,
    mask,
    ends,
    temperature,
    frozen,
    dropout,
    recomputed,
    drawn_as_scored,
    ratio,
    decoding,
    neighbours,
    cache,
    start,
    score,
    rewards,
)
FATAL = (vocabulary, mask, ends)
"""Where one of these fails, the others have nothing to look at."""


def examine(patient: Patient) -> list[Problem]:
    """Run all checks; what does not hold."""
    found = []
    with _own_chance():
        for check in CHECKS:
            problem = check(patient)
            if problem is not None:
                found.append(problem)
                if check in FATAL:
                    break
    return found


@contextmanager
def _own_chance() -> Iterator[None]:
    # The global generators are left as they were: a run must not depend on having been examined.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def _unmasked(policy: CausalLMPolicy) -> Iterator[None]:
    # An observation does not say how long its response is, which a mask may ask.
    core, policy.core = policy.core, dataclasses.replace(policy.core, mask=NO_MASK)
    try:
        yield
    finally:
        policy.core = core


def _full(policy: CausalLMPolicy, rows: Tensor) -> Tensor:
    lengths = row_lengths(rows)
    hidden = policy.core.hidden_states(rows.clamp(min=0), use_cache=False)
    return hidden[torch.arange(len(rows), device=rows.device), lengths - 1]


def _first_steps(
    env: TokenVectorEnv, actions: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """What `step` pays for the first token of each row, an actor answering with these log-probs."""

    class Told:
        def log_prob(
            self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
        ) -> npt.NDArray[np.float32]:
            return log_probs[:, 0]

    actor, before = Told(), env.actor
    env.bind_actor(actor)
    try:
        env.reset(seed=0)
        return env.step(actions[:, 0])[1]
    finally:
        env.bind_actor(before)
