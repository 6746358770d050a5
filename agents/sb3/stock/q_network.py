"""A causal LM as the Q-network of value-based algorithms, and the learner that runs them.

Q(s, a) = V(s) + β · log π_θ(a | s). V is a linear head that starts at 0, and π_θ starts as the
reference. So training starts at the reference's greedy policy, with values of the same scale as the
environment's KL penalty. Its greedy policy is deterministic: log π = 0, and so is what it owes for
the random tokens that it explores with. Notation: N rows, L columns, d the trunk's width, V tokens,
Q quantiles.
"""

import copy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from safetensors.torch import save_file
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn
from torch.nn import functional as F

from agents.sb3.learning.learner import RunFormat
from agents.sb3.policy.observations import host_rows, token_ids
from agents.sb3.vec_env import TokenSB3VecEnv, policy_kwargs
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.envs.acts import announce, announce_exploration, will_announce
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import logit_rule
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden
from rlhf_gym.utils.arrays import Ints
from rlhf_gym.utils.files import own_memory, whole_folder

Algorithm = TypeVar("Algorithm", bound=OffPolicyAlgorithm)

SHARPNESS = 1e4
"""Factor of a saved policy's values; it is so large that softmax sampling is practically greedy."""


class TokenQNetwork(BasePolicy):
    """Q-values of every next token, from a causal LM.

    Args:
        observation_space: The environment's `Box` of token ids.
        action_space: `Discrete(V)`.
        model: Hub name or local path of the causal LM.
        revision: Commit or tag on the hub.
        tokenizer: Hub name or local path of the tokenizer, if it is not in the model's folder.
        temperature: Temperature of the environment.
        scale: β, the weight of log π_θ.
        n_quantiles: Q; 0 for plain values.
    """

    spread_head: nn.Linear

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        model: str,
        revision: str | None,
        tokenizer: str | None,
        temperature: float,
        scale: float,
        n_quantiles: int = 0,
    ) -> None:
        super().__init__(observation_space, action_space)
        self.loaded_from = {"model": model, "revision": revision, "tokenizer": tokenizer}
        self.core = CausalLM.load(
            model, revision=revision, tokenizer=tokenizer, temperature=temperature
        )
        if n_quantiles and logit_rule(self.core.model).soft_cap is not None:
            # `greedy` could not write the spread into the head.
            raise InputError(
                f"the model {model!r} caps its logits, which quantiles cannot be added to; use DQN "
                "or another family"
            )
        self.lm, self.scale, self.n_quantiles = self.core.model, scale, n_quantiles
        width = self.lm.get_output_embeddings().in_features
        self.value_head = nn.Linear(width, 1)
        heads = [self.value_head]
        if n_quantiles:
            self.spread_head = nn.Linear(width, n_quantiles * self.core.vocab_size, bias=False)
            heads.append(self.spread_head)
        for parameter in (p for head in heads for p in head.parameters()):
            nn.init.zeros_(parameter)
        self._cache = DecodeCache(self.core)
        will_announce(self)

    def forward(self, obs: Tensor) -> Tensor:
        """Return values of all tokens in each state: (N, L) -> (N, V), or quantiles (N, Q, V)."""
        ids = token_ids(obs)
        if torch.is_grad_enabled() or self.training:
            hidden = last_hidden(self.core, ids)
        else:
            hidden = self._cache.last_hidden(ids)
        log_p = F.log_softmax(self.core.logits(hidden), -1)
        values: Tensor = self.value_head(hidden) + self.scale * log_p
        if not self.n_quantiles:
            return values
        spread: Tensor = self.spread_head(hidden).view(len(hidden), self.n_quantiles, -1)
        return values[:, None] + spread

    def set_training_mode(self, mode: bool) -> None:
        """As in Stable-Baselines3, which calls it with False before it steps the environment."""
        super().set_training_mode(mode)
        if not mode:
            announce_exploration(self)

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        values: Tensor = self(observation)
        actions = (values.mean(1) if self.n_quantiles else values).argmax(-1)
        seen, chosen = host_rows(observation), actions.cpu().numpy()
        announce(self, seen, chosen, self.log_prob(seen, chosen))
        return actions

    def log_prob(self, observations: Ints, actions: Ints) -> npt.NDArray[np.float32]:
        """Log π (N,) of actions: 0, because the policy is deterministic."""
        return np.zeros(len(actions), dtype=np.float32)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # `BasePolicy.load` passes these to the constructor, which takes none of the base class's
        # but the two spaces.
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            **self.loaded_from,
            "temperature": self.core.temperature,
            "scale": self.scale,
            "n_quantiles": self.n_quantiles,
        }

    def greedy(self) -> CausalLM:
        """Return a language model that almost surely samples the token with the highest value."""
        model: Any = copy.deepcopy(self.core.model)
        rule = logit_rule(model)
        if rule.soft_cap is not None:
            # It keeps the order of the tokens, but would make large values equal.
            model.config.get_text_config().final_logit_softcapping = None
        head: Any = model.get_output_embeddings()
        # The output weights change below. Tied input embeddings must not change with them.
        if head.weight is model.get_input_embeddings().weight:
            model.config.tie_word_embeddings = False
            head.weight = nn.Parameter(head.weight.detach().clone())
        with torch.no_grad():
            head.weight.mul_(self.scale * SHARPNESS)
            if head.bias is not None:
                head.bias.mul_(self.scale * SHARPNESS)
            if self.n_quantiles:
                spread = self.spread_head.weight.view(self.n_quantiles, self.core.vocab_size, -1)
                # The model's logits are divided by the temperature, the spread is not.
                head.weight[: self.core.vocab_size] += (
                    SHARPNESS * self.core.temperature / rule.scale * spread.mean(0)
                )
        return CausalLM.wrap(model, self.core.tokenizer).following(self.core)


class CausalLMDQNPolicy(DQNPolicy):
    """DQN's pair of Q-networks, each a causal LM.

    Args:
        *args: As in `DQNPolicy`.
        network: Keywords of `TokenQNetwork`.
        **options: As in `DQNPolicy`.
    """

    def __init__(self, *args: Any, network: dict[str, Any], **options: Any) -> None:
        self.network = network
        super().__init__(*args, **options)

    def make_q_net(self) -> Any:
        """Build one of the two networks."""
        net = TokenQNetwork(self.observation_space, self.action_space, **self.network)
        return net.to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "network": self.network}


class QLearner:
    """A learner with a value-based algorithm of SB3; it writes SB3's log into a training run.

    Args:
        algorithm: The algorithm.
        network: Its Q-network.
    """

    def __init__(self, algorithm: OffPolicyAlgorithm, network: TokenQNetwork) -> None:
        self.algorithm, self.network = algorithm, network

    @property
    def policy(self) -> TokenQNetwork:
        """The network whose greedy policy acts."""
        return self.network

    def learn(self, total_tokens: int, run: TrainingRun | None = None) -> None:
        """Sample about `total_tokens` tokens and train on them."""
        if run is not None:
            self.algorithm.set_logger(Logger(None, [RunFormat(run)]))
        # Log one row per n_envs episodes, not one per episode.
        self.algorithm.learn(total_tokens, log_interval=self.algorithm.n_envs)
        if run is not None:
            run.record(self.algorithm.num_timesteps, {})

    def save(self, directory: Path) -> None:
        """Save the greedy policy for transformers' `from_pretrained`, and the Q-network."""
        with whole_folder(directory) as partial:
            self.network.greedy().save_pretrained(partial)
            save_file(own_memory(self.network.state_dict()), partial / "q_network.safetensors")


def build_q_learner(
    algorithm: type[Algorithm],
    policy: type[BasePolicy],
    config: Any,
    env: TokenVectorEnv,
    n_quantiles: int = 0,
) -> QLearner:
    """Build a learner with a value-based algorithm on `env`.

    Args:
        algorithm: The algorithm's class.
        policy: Its policy class; it must take the keyword `network`.
        config: A dataclass of the algorithm's keywords.
        env: The environment.
        n_quantiles: Quantiles per token; 0 for plain values.

    Raises:
        InputError: The environment has a mask, which random exploration would break, or β = 0.
    """
    reference = env.objective.reference
    if env.objective.kl_coef <= 0:
        raise InputError(
            "the Q-network starts at kl_coef · log π_ref, which is 0 for kl_coef = 0; make the "
            "environment with kl_coef above 0"
        )
    if reference.mask:
        raise InputError(
            "this algorithm explores with random tokens of the whole vocabulary, which the "
            "environment's mask forbids; use another algorithm, or an environment without a mask"
        )
    network = {k: v for k, v in policy_kwargs(env).items() if k != "mask"}
    network |= {"scale": env.objective.kl_coef, "n_quantiles": n_quantiles}
    # Exploration samples from the action space, which has its own seed.
    env.single_action_space.seed(int(np.random.randint(2**31)))
    learner = algorithm(
        policy,
        TokenSB3VecEnv(env),
        gamma=1.0,
        # The next observation of a transition is the following one in the buffer: store it once.
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        policy_kwargs={"network": network, "optimizer_kwargs": {"eps": 1e-5}},
        device=reference.device,
        **vars(config),
    )
    net = learner.policy.quantile_net if n_quantiles else learner.policy.q_net
    assert isinstance(net, TokenQNetwork)
    net.core = net.core.following(reference)
    env.bind_actor(net, named=False)
    return QLearner(learner, net)
