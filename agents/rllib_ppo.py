"""RLlib's PPO through its public interface. ``--algorithm rllib_ppo``.

Needs ``pip install 'rlhf-gym[rllib]'``. RLlib's runner steps the batched environment in this
process, one token per step. The module that acts is bound as the environment's actor, so the
rewards include the full KL penalty.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import VectorWrapper
from torch import Tensor

from agents.libraries import ppo_options
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden

try:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.apis import ValueFunctionAPI
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.core.rl_module.torch import TorchRLModule
except ImportError as error:
    raise InputError(f"rllib_ppo needs RLlib ({error}): pip install 'rlhf-gym[rllib]'") from error

_live: dict[int, TokenVectorEnv] = {}
"""Environments of this process by number, because RLlib's configuration only takes plain values."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Config(ppo_options.Config):
    """Options of RLlib's PPO."""


class TokenModule(TorchRLModule, ValueFunctionAPI):
    """A causal LM as policy, and a critic with a separate trunk."""

    def setup(self) -> None:
        """Copy policy and critic from the reference of the environment."""
        reference = _live[self.model_config["number"]].objective.reference
        self.core = reference.trainable()
        self.lm, self.critic = self.core.model, ppo_options.Critic(reference)
        self._cache = DecodeCache(self.core)
        self._log_p: dict[
            bytes, Tensor
        ] = {}  # log π (V,) of the states of the last sampling pass, by token ids

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        tokens = batch[Columns.OBS].long()
        if torch.is_grad_enabled():
            return {Columns.ACTION_DIST_INPUTS: self.core.logits(last_hidden(self.core, tokens))}
        logits = self.core.logits(self._cache.last_hidden(tokens))
        log_p = torch.log_softmax(logits, -1)
        rows = tokens.cpu().numpy()
        self._log_p = {row.tobytes(): p for row, p in zip(rows, log_p, strict=True)}
        return {Columns.ACTION_DIST_INPUTS: logits}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Return values (N,) of the states."""
        values: Tensor = self.critic(batch[Columns.OBS].long())
        return values[:, 0]

    @torch.no_grad()
    def log_prob(
        self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return log π of actions (N,), from the pass that chose them if it is still known."""
        if any(row.tobytes() not in self._log_p for row in observations):
            self._forward({Columns.OBS: torch.as_tensor(observations)})
        found = [
            float(self._log_p[row.tobytes()][action])
            for row, action in zip(observations, actions, strict=True)
        ]
        return np.array(found, dtype=np.float32)


class Seen:
    """Counter of sampled tokens, and (score, KL) of the episodes since it was last read."""

    def __init__(self) -> None:
        self.tokens = 0
        self.finished: list[tuple[float, float]] = []

    def __deepcopy__(self, memo: Any) -> "Seen":
        return self  # RLlib copies its configuration; all copies must share one counter


class LiveEnv(VectorWrapper):
    """A copy of an environment, with the autoreset mode that RLlib needs.

    Args:
        config: `number` of the given environment in `_live`, and `seen`, a `Seen` to count into.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        given = _live[config["number"]]
        self.seen: Seen = config["seen"]
        super().__init__(
            TokenVectorEnv(
                given.objective,
                given.prompts,
                num_envs=given.num_envs,
                max_new_tokens=given.max_new_tokens,
                stop_at_eos=given.stop_at_eos,
                autoreset_mode="NextStep",
            )
        )
        self._ended = np.zeros(given.num_envs, dtype=np.bool_)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append one token in every row; count the tokens and record the finished episodes."""
        observations, rewards, ended, cut, infos = self.env.step(np.asarray(actions))
        # With autoreset "NextStep" this step resets a row that had ended, and ignores its action.
        self.seen.tokens += int((~self._ended).sum())
        self.seen.finished += [
            (infos["score"][i], infos["kl_sum"][i]) for i in np.flatnonzero(ended).tolist()
        ]
        self._ended = ended
        return observations, rewards, ended, cut, {}

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Reset all rows."""
        self._ended = np.zeros(self.num_envs, dtype=np.bool_)
        return self.env.reset(**options)


class RLlibLearner:
    """RLlib's PPO on an environment.

    Args:
        config: The options.
        env: The environment.
    """

    def __init__(self, config: Config, env: TokenVectorEnv) -> None:
        reference = env.objective.reference
        if reference.mask:
            raise InputError("rllib_ppo does not support masks; use an environment without one")
        if reference.device.type != "cpu":
            raise InputError(
                "rllib_ppo runs only on the CPU; make the environment with device='cpu'"
            )
        per_update = config.n_steps * env.num_envs
        self.env, self.seen = env, Seen()
        number = next(_numbers)
        _live[number] = env
        module = RLModuleSpec(module_class=TokenModule, model_config={"number": number})
        options = (
            PPOConfig()
            .environment(env=LiveEnv, env_config={"number": number, "seen": self.seen})
            .env_runners(
                num_env_runners=0,
                num_envs_per_env_runner=env.num_envs,
                gym_env_vectorize_mode="vector_entry_point",
                rollout_fragment_length=config.n_steps,
            )
            .learners(num_learners=0)
            .rl_module(rl_module_spec=module)
            .training(
                lr=config.learning_rate,
                gamma=1.0,
                lambda_=config.gae_lambda,
                clip_param=config.clip_range,
                vf_clip_param=float("inf"),
                vf_loss_coeff=config.vf_coef,
                entropy_coeff=0.0,
                use_kl_loss=False,
                grad_clip=config.max_grad_norm,
                train_batch_size_per_learner=per_update,
                minibatch_size=min(config.batch_size, per_update),
                num_epochs=config.n_epochs,
            )
            .debugging(seed=int(np.random.randint(2**31)), log_level="ERROR")
        )
        try:
            self.algorithm = options.build_algo()
        finally:
            del _live[number]
        runner = self.algorithm.env_runner
        self.module: TokenModule = runner.module
        live = runner.env
        while not isinstance(live, LiveEnv):
            live = live.env
        self.seen = live.seen
        runner.env.unwrapped.bind_actor(self.module)

    @property
    def policy(self) -> CausalLM:
        """The language model that is trained."""
        return self.module.core

    def learn(self, total_tokens: int, run: TrainingRun | None = None) -> None:
        """Sample about `total_tokens` tokens and train on them."""
        self.seen.tokens = 0
        while self.seen.tokens < total_tokens:
            self.algorithm.train()
            finished, self.seen.finished = self.seen.finished, []
            self.env.episodes += len(finished)
            if run is not None and finished:
                score, kl = np.mean(finished, axis=0).tolist()
                figures = {"rollout/score": score, "rollout/kl_per_sequence": kl}
                run.record(self.seen.tokens, figures)

    def save(self, directory: Path) -> None:
        """Save the policy in the format of transformers' `from_pretrained`."""
        learned = self.algorithm.get_module()
        learned.core.save_pretrained(directory)


make = RLlibLearner
