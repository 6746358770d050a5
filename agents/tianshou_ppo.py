"""Tianshou's PPO through its public interface. ``--algorithm tianshou_ppo``.

Needs ``pip install 'rlhf-gym[tianshou]'``. Tianshou's collector steps the batched environment
through an adapter to its own vector environments, one token per step; its buffer has one row per
token. The policy is bound as the environment's actor, so the rewards include the full KL
penalty.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from agents.libraries import ppo_options
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden

try:
    from tianshou.algorithm import PPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import BaseVectorEnv
    from tianshou.trainer import OnPolicyTrainerParams
except ImportError as error:
    raise InputError(
        f"tianshou_ppo needs tianshou ({error}): pip install 'rlhf-gym[tianshou]'"
    ) from error


@dataclass(frozen=True)
class Config(ppo_options.Config):
    """Options of Tianshou's PPO."""


class Actor(nn.Module):
    """A causal LM with the interface of Tianshou's actors and of the environment's actor."""

    def __init__(self, core: CausalLM) -> None:
        super().__init__()
        self.core, self.lm = core, core.model
        self._cache = DecodeCache(core)
        self._last: tuple[npt.NDArray[np.int64], Tensor] | None = None

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        """Return next-token logits (N, V) for observations (N, L)."""
        tokens = torch.as_tensor(obs, device=self.core.device).long()
        if torch.is_grad_enabled():
            return self.core.logits(last_hidden(self.core, tokens)), state
        logits = self.core.logits(self._cache.last_hidden(tokens))
        self._last = tokens.cpu().numpy(), logits
        return logits, state

    @torch.no_grad()
    def log_prob(
        self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return log π of actions (N,), from the pass that chose them if it was the last one."""
        known = self._last is not None and np.array_equal(self._last[0], observations)
        logits = self._last[1] if known else self(observations)[0]  # type: ignore[index]
        log_p = torch.log_softmax(logits, -1)
        chosen = torch.as_tensor(actions, device=log_p.device)
        found: npt.NDArray[np.float32] = log_p.gather(1, chosen[:, None])[:, 0].cpu().numpy()
        return found


class Critic(ppo_options.Critic):
    """The critic with the call signature that Tianshou uses."""

    def forward(self, obs: Any, **_: Any) -> Tensor:  # type: ignore[override]
        """Return values (N, 1) of observations (N, L)."""
        return super().forward(torch.as_tensor(obs, device=self.head.weight.device).long())


class TianshouVectorEnv(BaseVectorEnv):
    """Adapter from the batched environment to Tianshou's vector environments, without workers.

    Args:
        env: An environment with autoreset_mode "Disabled", because Tianshou resets the rows itself.
    """

    def __init__(self, env: TokenVectorEnv) -> None:
        self._env, self.env_num = env, env.num_envs
        self.is_async, self.is_closed = False, False
        self.workers: list[Any] = []
        self.waiting_id: list[int] = []
        self.ready_id = list(range(env.num_envs))
        self.finished: list[
            dict[str, Any]
        ] = []  # score and KL of the episodes since they were last read

    def get_env_attr(self, key: str, id: Any = None) -> list[Any]:
        """Return an attribute for each row; a space is that of a single row."""
        name = f"single_{key}" if key in ("action_space", "observation_space") else key
        return [getattr(self._env, name)] * len(self._wrap_id(id))

    def reset(self, env_id: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Reset some rows to new prompts."""
        rows = np.asarray(self._wrap_id(env_id))
        mask = np.zeros(self.env_num, dtype=np.bool_)
        mask[rows] = True
        observations, _ = self._env.reset(options={"reset_mask": mask})
        return observations[rows], np.array([{} for _ in rows], dtype=object)

    def step(self, action: Any, id: Any = None) -> tuple[Any, Any, Any, Any, Any]:
        """Append one token in every row."""
        if len(self._wrap_id(id)) != self.env_num:
            raise InputError(
                "all rows must step together; let the collector count steps, not episodes"
            )
        observations, rewards, ended, cut, infos = self._env.step(np.asarray(action))
        rows = [{"env_id": i} for i in range(self.env_num)]
        self.finished += [
            {"score": infos["score"][i], "kl_sum": infos["kl_sum"][i]}
            for i in np.flatnonzero(ended)
        ]
        return observations, rewards, ended, cut, np.array(rows, dtype=object)

    @property
    def episodes(self) -> int:
        """Responses finished so far."""
        return self._env.episodes

    def close(self) -> None:
        """Mark the environment as closed; there is nothing to release."""
        self.is_closed = True

    def seed(self, seed: Any = None) -> list[Any]:
        """Do nothing: the wrapped environment is already seeded."""
        return [None] * self.env_num


class TianshouLearner:
    """Tianshou's PPO on an environment.

    Args:
        config: The options.
        env: The environment. Training runs in a second one with its objective and prompts, whose
            rows reset only on request.
    """

    def __init__(self, config: Config, env: TokenVectorEnv) -> None:
        reference = env.objective.reference
        if not reference.mask.is_static:
            raise InputError("tianshou_ppo supports only masks that are the same in every state")
        self.config, self._given = config, env
        self.policy = reference.trainable()
        self.actor = Actor(self.policy)
        own = TokenVectorEnv(
            env.objective,
            env.prompts,
            num_envs=env.num_envs,
            max_new_tokens=env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
            autoreset_mode="Disabled",
        )
        own.reset(seed=int(np.random.randint(2**31)))
        own.bind_actor(self.actor)
        self.env = TianshouVectorEnv(own)
        policy = ProbabilisticActorPolicy(
            actor=self.actor,
            dist_fn=lambda logits: Categorical(logits=logits, validate_args=False),
            action_space=own.single_action_space,
            observation_space=own.single_observation_space,
            action_scaling=False,
            action_bound_method=None,
        )
        self.algorithm = PPO(
            policy=policy,
            critic=Critic(reference),
            optim=AdamOptimizerFactory(lr=config.learning_rate, eps=1e-5),
            eps_clip=config.clip_range,
            vf_coef=config.vf_coef,
            ent_coef=0.0,
            max_grad_norm=config.max_grad_norm,
            gae_lambda=config.gae_lambda,
            gamma=1.0,
        )

    def learn(self, total_tokens: int, run: TrainingRun | None = None) -> None:
        """Sample about `total_tokens` tokens and train on them."""
        per_update = self.config.n_steps * self.env.env_num
        buffer = VectorReplayBuffer(per_update, self.env.env_num)

        def record(epoch: int, tokens: int) -> None:
            finished, self.env.finished = self.env.finished, []
            if run is not None and finished:
                score, kl = (
                    float(np.mean([x[key] for x in finished])) for key in ("score", "kl_sum")
                )
                run.record(tokens, {"rollout/score": score, "rollout/kl_per_sequence": kl})

        self.algorithm.run_training(
            OnPolicyTrainerParams(
                training_collector=Collector(self.algorithm, self.env, buffer),
                max_epochs=1,
                epoch_num_steps=total_tokens,
                collection_step_num_env_steps=per_update,
                batch_size=self.config.batch_size,
                update_step_num_repetitions=self.config.n_epochs,
                training_fn=record,
                verbose=False,
                show_progress=False,
            )
        )
        record(1, total_tokens)
        self._given.episodes += self.env.episodes

    def save(self, directory: Path) -> None:
        """Save the policy in the format of transformers' `from_pretrained`."""
        self.policy.save_pretrained(directory)


make = TianshouLearner
