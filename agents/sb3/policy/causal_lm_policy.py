"""A causal LM with a value head as a Stable-Baselines3 actor-critic policy.

Wherever SB3 passes observations, a tensor has one row per state (SB3's contract), and `Sequences`
are whole sequences with one row of output per chosen token. Notation: N rows, L columns, M chosen
tokens, d the trunk's width, V usable tokens.
"""

import copy
import functools
import logging
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from agents.sb3.policy.critic import Critic, Observations, load_critic
from agents.sb3.policy.distribution import TokenDistribution
from agents.sb3.policy.observations import host_rows
from agents.sb3.policy.optimizer import build_optimizer
from agents.sb3.policy.shared_base import Lent, do_without_frozen, leave_out_frozen
from agents.sb3.policy.update_graphs import LearningStates
from rlhf_gym.envs.acts import announce, mark_as_copy, will_announce
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import (
    has_dynamic_rope,
    recompute_activations,
)
from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden
from rlhf_gym.lm.decoding.sampling import Sampled, sample_with_log_probs
from rlhf_gym.lm.lora import add_adapters, merged, twin
from rlhf_gym.lm.masks import NO_MASK, Limits, Mask
from rlhf_gym.lm.precision import Precision
from rlhf_gym.tokens import Sequences

logger = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """What one pass says of the M chosen tokens of whole sequences.

    Attributes:
        hidden: (M, d) the policy's last hidden states in which they were chosen.
        limits: What could be chosen there; None where the mask is the same everywhere.
        log_probs: (M,) log π.
        values: (M,) of those states; None where they were not asked for.
        entropies: (M,) nats; None where they were not asked for.
    """

    hidden: Tensor
    limits: Limits | None
    log_probs: Tensor
    values: Tensor | None
    entropies: Tensor | None


class CausalLMPolicy(ActorCriticPolicy):
    """The language model is the actor; a linear value head is the critic (`Critic`).

    Args:
        observation_space: The environment's `Box` of token ids.
        action_space: `Discrete(V)`.
        lr_schedule: Learning rate as a function of the remaining progress.
        model: Hub name or local path of the causal LM to start from; the policy loads its own.
        revision: Commit or tag on the hub.
        tokenizer: Where its tokenizer is, if not with the model.
        temperature: The environment's; it divides the logits everywhere.
        entropy: Whether `evaluate_actions` computes entropies. False saves the work where
            `ent_coef` is 0; algorithms then log an estimate.
        attn_implementation: "eager" for algorithms that need second derivatives (TRPO).
        value_lr_scale: Learning rate of the value head, relative to the policy's. Only algorithms
            that scale by parameter group (`ResponseAlgorithm`) use it; the others have one rate.
        critic: Hub name or local path of the model (a causal LM or a reward model with the same
            tokenizer) on whose trunk the value head is; None shares the policy's trunk.
        critic_lr_scale: Learning rate of the critic's own trunk, relative to the policy's.
        mask: The environment's. `follow` replaces it; saving the policy keeps it.
        precision: "bf16" multiplies matrices in bfloat16, in sampling, scoring and the update
            alike; weights, log-probs and the value head stay float32.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        lora_rank: Train adapters of this rank and the value head; 0 trains every weight.
        lora_alpha: Scale of the adapters, times `lora_rank`; twice the rank if None.
        base: A frozen model that the adapters are added to; the policy loads its own if None.
            `build` passes the environment's reference.
        **kwargs: As in `ActorCriticPolicy` (`optimizer_class`, `optimizer_kwargs`).
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        model: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        temperature: float = 1.0,
        entropy: bool = True,
        attn_implementation: str | None = None,
        value_lr_scale: float = 1.0,
        critic: str | None = None,
        critic_revision: str | None = None,
        critic_lr_scale: float = 1.0,
        mask: Mask = NO_MASK,
        precision: Precision = "fp32",
        gradient_checkpointing: bool = False,
        lora_rank: int = 0,
        lora_alpha: int | None = None,
        base: "Lent | None" = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            raise InputError(
                "CausalLMPolicy starts from a model: make the algorithm with agents.sb3.build, or "
                "pass policy_kwargs=agents.sb3.policy_kwargs(env)"
            )
        if precision not in get_args(Precision):
            raise InputError(f"precision must be one of {get_args(Precision)}, not {precision!r}")
        if lora_rank and critic is not None:
            raise InputError(
                "a separate critic is a second model to train; with lora_rank take critic=shared"
            )
        self.model_name, self.revision, self.tokenizer = model, revision, tokenizer
        self.temperature, self.entropy = temperature, entropy
        self.attn_implementation = attn_implementation
        self.value_lr_scale, self.critic_lr_scale = value_lr_scale, critic_lr_scale
        self.critic_name, self.critic_revision, self.mask = critic, critic_revision, mask
        self.precision, self.gradient_checkpointing = precision, gradient_checkpointing
        self.lora_rank, self.lora_alpha, self._base = lora_rank, lora_alpha, base
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        will_announce(self)

    def _build(self, lr_schedule: Schedule) -> None:
        self.core = replace(self._load_core(), mask=self.mask, precision=self.precision)
        self.lm = self.core.model
        self._has_dynamic_rope = has_dynamic_rope(self.lm)
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(f"CausalLMPolicy acts in Discrete(V), not in {self.action_space}")
        if not np.issubdtype(self.observation_space.dtype, np.integer):
            raise InputError(
                "the observations are not token ids any more: a wrapper such as "
                "VecNormalize(norm_obs=True) makes them real numbers; take it away"
            )
        if self.core.vocab_size != self.action_space.n:
            raise ValueError(
                f"{self.model_name!r} has {self.core.vocab_size} usable tokens, the environment "
                f"{self.action_space.n}; start the policy from the environment's reference"
            )
        trained = [p for p in self.lm.parameters() if p.requires_grad]
        groups = [{"params": trained, "lr_scale": 1.0}]
        self.critic = self._make_critic()
        if self.critic.trunk is not None:
            trunk_parameters = list(self.critic.trunk.parameters())
            groups.append({"params": trunk_parameters, "lr_scale": self.critic_lr_scale})
        if self.gradient_checkpointing:
            for model in filter(None, (self.lm, self.critic.trunk)):
                recompute_activations(model, True)
        self._cache = DecodeCache(self.core)
        self._guide_cache: DecodeCache | None = None  # of the model that a top-k mask asks
        self._learning_states = LearningStates()
        head = list(self.critic.head.parameters())
        self.optimizer = build_optimizer(
            self.optimizer_class,
            [*groups, {"params": head, "lr_scale": self.value_lr_scale}],
            lr_schedule(1),
            self.optimizer_kwargs,
        )

    def _load_core(self) -> CausalLM:
        lent = None if self._base is None else self._base.lm
        if lent is not None:
            core = replace(lent, model=twin(lent.model), guide=None)
        else:
            core = CausalLM.load(
                self.model_name,
                revision=self.revision,
                tokenizer=self.tokenizer,
                temperature=self.temperature,
                attn_implementation=self.attn_implementation,
            )
        if self.lora_rank:
            add_adapters(core.model, self.lora_rank, alpha=self.lora_alpha)
            self.register_state_dict_post_hook(leave_out_frozen)
            self.register_load_state_dict_post_hook(do_without_frozen)
        return core

    def _make_critic(self) -> Critic:
        if self.critic_name is None:
            return Critic(self.lm.get_output_embeddings().in_features)
        lm = load_critic(
            self.critic_name,
            self.core,
            revision=self.critic_revision,
            attn_implementation=self.attn_implementation,
        )
        return Critic(lm.model.config.get_text_config().hidden_size, lm)

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Act in each state: tokens (N,), values (N, 1), log-probs (N,)."""
        seen = host_rows(obs)
        hidden = self._last_hidden(obs)
        distribution = self._distribution(hidden, self._limits(obs, hidden))
        actions = distribution.get_actions(deterministic)
        log_probs = distribution.log_prob(actions)
        self._announce(seen, actions, log_probs, deterministic)
        return actions, self.critic(self.critic.states(obs, hidden)), log_probs

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        """Act in each state, without its value: tokens (N,)."""
        seen = host_rows(observation)
        distribution = self.get_distribution(observation)
        actions = distribution.get_actions(deterministic)
        self._announce(seen, actions, distribution.log_prob(actions), deterministic)
        return actions

    def _announce(
        self,
        seen: npt.NDArray[np.int64],
        actions: Tensor,
        log_probs: Tensor,
        deterministic: bool,
    ) -> None:
        """Tell the environment, whichever it is, who has chosen these tokens and how likely."""
        if deterministic:
            log_probs = torch.zeros_like(log_probs)  # the greedy policy chooses nothing else
            warn_of_greedy()
        announce(
            self, seen, actions.detach().cpu().numpy(), log_probs.detach().float().cpu().numpy()
        )

    def get_distribution(self, obs: Observations) -> TokenDistribution:  # type: ignore[override]
        """The next-token distribution in each state."""
        hidden = self._states(obs)
        return self._distribution(hidden, self._limits(obs, hidden))

    def predict_values(self, obs: Observations) -> Tensor:  # type: ignore[override]
        """Values of the states: (N, 1) or (M, 1)."""
        hidden = self._states(obs) if self.critic.shared else None
        values: Tensor = self.critic(self.critic.states(obs, hidden))
        return values

    def evaluate_actions(  # type: ignore[override]
        self, obs: Observations, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (M, 1), log-probs (M,) and entropies (M,) of tokens (M,) in their states."""
        if isinstance(obs, Sequences):
            found = self.evaluate_sequences(obs, entropies=self.entropy)
            assert found.values is not None
            return found.values[:, None], found.log_probs, found.entropies
        hidden = self._last_hidden(obs)
        values = self.critic(self.critic.states(obs, hidden))
        limits, tokens = self._limits(obs, hidden), actions.long().flatten()
        if not self.entropy:
            return values, self.core.log_probs_of(hidden, tokens, limits), None
        return values, *self.core.log_probs_and_entropies(hidden, tokens, limits)

    def evaluate_sequences(
        self,
        sequences: Sequences,
        *,
        values: bool = True,
        entropies: bool = False,
        learning: bool = False,
    ) -> Evaluation:
        """Log-probs of the chosen tokens of whole sequences, by one pass.

        Args:
            sequences: N rows with M chosen tokens.
            values: Whether the critic's values are needed too.
            entropies: Whether the entropies are.
            learning: Whether the backward pass of this call comes before the next call. On a GPU
                the pass may then be a CUDA graph, see `LearningStates`.
        """
        self._check_guide()

        def states(core: CausalLM) -> Tensor:
            return self._learning_states(sequences, core) if learning else core.states(sequences)

        hidden = states(self.core)
        limits = self.core.limits(sequences, hidden)
        chosen, value, entropy = sequences.chosen(), None, None
        if values:
            read = hidden if self.critic.lm is None else states(self.critic.lm)
            value = self.critic(read).flatten()
        if entropies:
            log_probs, entropy = self.core.log_probs_and_entropies(hidden, chosen, limits)
        else:
            log_probs = self.core.log_probs_of(hidden, chosen, limits)
        return Evaluation(hidden, limits, log_probs, value, entropy)

    @torch.no_grad()
    def sample(self, prompts: Tensor, max_new_tokens: int, *, stop_at_eos: bool = True) -> Tensor:
        """Whole responses: prompts (N, P) -> (N, T), PAD after each response's end."""
        return self.sample_with_log_probs(prompts, max_new_tokens, stop_at_eos).responses

    @torch.no_grad()
    def sample_with_log_probs(
        self,
        prompts: Tensor,
        max_new_tokens: int,
        stop_at_eos: bool = True,
        *,
        with_values: bool = True,
    ) -> Sampled:
        """`sample`, and each token's log-prob and (on a shared trunk) value, from decoding."""
        self._check_guide()
        valued = with_values and self.critic.shared
        return sample_with_log_probs(
            self.core,
            prompts,
            max_new_tokens,
            stop_at_eos=stop_at_eos,
            value_head=self.critic.head if valued else None,
        )

    @property
    def decoding_scores(self) -> bool:
        """Whether decoding's log-probs equal those of a pass over whole sequences to 1e-5.

        They do not in three cases: in bfloat16, which rounds differently in the update; with a
        reference's top-k or top-p, because rounding can change the set; and if a state depends on
        later tokens.
        """
        alike = self.precision == "fp32" and not self.core.mask.follows_reference
        return alike and not self._has_dynamic_rope

    @torch.no_grad()
    def values(self, sequences: Sequences) -> Tensor:
        """Values of the states that the chosen tokens were chosen in, (M,)."""
        values = torch.zeros(int(sequences.lengths.sum()), device=self.device)
        for part, places in passes(self.core.model, sequences):
            values[places] = self.predict_values(part).flatten().float()
        return values

    @torch.no_grad()
    def score(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Values and log-probs of the chosen tokens, (M,) each, by the code that trains."""
        self._check_guide()
        values = torch.zeros(int(sequences.lengths.sum()), device=self.device)
        log_probs = torch.zeros_like(values)
        for part, places in passes(self.core.model, sequences):
            found = self.evaluate_sequences(part)
            assert found.values is not None
            values[places] = found.values.float()
            log_probs[places] = found.log_probs.float()
        return values, log_probs

    @torch.no_grad()
    def log_prob(
        self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Log π of actions, by one pass; the environment knows those that the policy announced."""
        tokens = torch.from_numpy(observations).to(self.device)
        chosen = torch.from_numpy(actions).to(self.device)
        hidden = last_hidden(self.core, tokens)
        log_probs = self.core.log_probs_of(hidden, chosen, self._limits(tokens, hidden, chosen))
        found: npt.NDArray[np.float32] = log_probs.float().cpu().numpy()
        return found

    def snapshot(self) -> CausalLM:
        """A copy of the language model as it is now; frozen weights are shared, not copied."""
        frozen = {id(p): p for p in self.lm.parameters() if not p.requires_grad}
        model = copy.deepcopy(self.lm, frozen).eval().requires_grad_(False)
        return replace(self.core, model=model)

    def plain(self) -> CausalLM:
        """The language model without adapters: itself, or a copy with the adapters merged."""
        return replace(self.core, model=merged(self.lm)) if self.lora_rank else self.core

    def set_training_mode(self, mode: bool) -> None:
        """Switch between acting, which caches keys and values, and training, which never does."""
        if mode:
            self._cache.clear()
            self.critic.clear()
        super().set_training_mode(mode)

    def follow(self, reference: CausalLM) -> None:
        """Adopt the temperature, end ids and mask of the environment's reference."""
        self.core = self.core.following(reference)
        self._guide_cache = None if self.core.guide is None else DecodeCache(self.core.guide)

    def _check_guide(self) -> None:
        if self.core.mask.follows_reference and self.core.guide is None:
            raise InputError(
                "this policy's mask follows a reference that it was not given: call "
                "policy.follow(env.unwrapped.objective.reference) after loading"
            )

    def _distribution(self, hidden: Tensor, limits: Limits | None) -> TokenDistribution:
        return TokenDistribution(self.core.logits(hidden, limits))

    def _limits(
        self, obs: Observations, hidden: Tensor, chosen: Tensor | None = None
    ) -> Limits | None:
        """Which tokens may be chosen in each state; None where the mask is the same everywhere."""
        if self.core.mask.is_static:
            return None
        self._check_guide()
        if isinstance(obs, Sequences):
            return self.core.limits(obs, hidden)
        if self.core.mask.min_new_tokens:
            raise InputError(
                "min_new_tokens needs an agent that knows where a prompt ends, and an observation "
                "does not say: use --algorithm ppo, or write a loop of your own with the "
                "environment's action_masks(), and bind no actor or one that knows"
            )
        assert self.core.guide is not None
        assert self._guide_cache is not None
        at_guide = self._guide_cache.last_hidden(obs.long())
        return self.core.guide.next_limits(at_guide, obs.new_zeros(len(obs)), chosen)

    def _states(self, obs: Observations) -> Tensor:
        if isinstance(obs, Sequences):
            return self.core.states(obs)
        return self._last_hidden(obs)

    def _last_hidden(self, obs: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.training:
            return last_hidden(self.core, obs.long())
        return self._cache.last_hidden(obs.long())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark_as_copy(self)  # until it acts

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "model": self.model_name,
            "revision": self.revision,
            "tokenizer": self.tokenizer,
            "temperature": self.temperature,
            "entropy": self.entropy,
            "attn_implementation": self.attn_implementation,
            "value_lr_scale": self.value_lr_scale,
            "critic": self.critic_name,
            "critic_revision": self.critic_revision,
            "critic_lr_scale": self.critic_lr_scale,
            "mask": self.core.mask,
            "precision": self.precision,
            "gradient_checkpointing": self.gradient_checkpointing,
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


@functools.cache
def warn_of_greedy() -> None:
    """Say once what a deterministic policy's return is."""
    logger.warning(
        "deterministic=True: the greedy policy acts, which is another one than the policy that "
        "was trained. Its log π is 0, so its mean return is the greedy policy's own J; that of "
        "the trained policy needs deterministic=False"
    )
