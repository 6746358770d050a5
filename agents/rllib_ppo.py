"""RLlib's PPO through its public interface. ``--algorithm rllib_ppo``.

Needs ``pip install 'rlhf-gym[rllib]'``. RLlib steps single environments side by side in this
process, one token a step; they share the given environment's objective. The module that acts is
bound as their actor, so the rewards are whole.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel

from agents.training_run import TrainingRun
from rlhf_gym.decode import DecodeCache, last_hidden
from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm import CausalLM
from rlhf_gym.models import load_pretrained

try:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.apis import ValueFunctionAPI
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.core.rl_module.torch import TorchRLModule
except ImportError as error:
    raise InputError(f"rllib_ppo needs RLlib ({error}): pip install 'rlhf-gym[rllib]'") from error

_live: dict[int, TokenVectorEnv] = {}
"""Environments of this process by number: RLlib's configuration may only hold plain values."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Config:
    """Options of RLlib's PPO."""

    learning_rate: float = 3e-4
    """Learning rate of policy and critic."""
    n_steps: int = 8
    """Tokens that each row samples between updates."""
    batch_size: int = 256
    """Tokens of a minibatch."""
    n_epochs: int = 1
    """Passes over the tokens of an update."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    clip_range: float = 0.2
    """ε of the ratio's clip."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""


class TokenModule(TorchRLModule, ValueFunctionAPI):
    """A causal LM as policy and a trunk of its own as critic."""

    def setup(self) -> None:
        """Load both from the model that `model_config` names."""
        options = self.model_config
        self.core = CausalLM.load(options["model"], temperature=options["temperature"])
        self.lm = self.core.model
        self.trunk = load_pretrained(AutoModel, options["model"])
        self.head = nn.Linear(self.trunk.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.critic = CausalLM(
            self.trunk, self.core.tokenizer, 1.0, self.core.vocab_size, self.core.eos_ids
        )
        self._cache = DecodeCache(self.core)
        self._log_p: dict[bytes, Tensor] = {}  # of the last states acted in

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
        """Values (N,) of the states."""
        hidden = last_hidden(self.critic, batch[Columns.OBS].long())
        values: Tensor = self.head(hidden)[:, 0]
        return values

    @torch.no_grad()
    def log_prob(
        self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Log π of actions (N,): from the pass that chose them, or computed now."""
        if any(row.tobytes() not in self._log_p for row in observations):
            self._forward({Columns.OBS: torch.as_tensor(observations)})
        found = [
            float(self._log_p[row.tobytes()][action])
            for row, action in zip(observations, actions, strict=True)
        ]
        return np.array(found, dtype=np.float32)


class LiveEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One row beside others, with the objective and prompts of an environment of this process."""

    def __init__(self, config: dict[str, Any]) -> None:
        given = _live[config["number"]]
        super().__init__(
            TokenEnv(
                given.objective,
                given.prompts,
                max_new_tokens=given.max_new_tokens,
                stop_at_eos=given.stop_at_eos,
            )
        )
        self.finished: list[tuple[float, float]] = config["finished"]

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One token; what an episode came to is noted."""
        observation, reward, ended, cut, info = self.env.step(int(action))
        if ended:
            self.finished.append((info["score"], info["kl_sum"]))
        return observation, reward, ended, cut, {}


class RLlibLearner:
    """RLlib's PPO on an environment.

    Args:
        config: The options.
        env: The environment.
    """

    def __init__(self, config: Config, env: TokenVectorEnv) -> None:
        reference = env.objective.reference
        if reference.mask:
            raise InputError("rllib_ppo knows no masks; take an environment without one")
        self.env, self.per_update = env, config.n_steps * env.num_envs
        self.finished: list[tuple[float, float]] = []
        number = next(_numbers)
        _live[number] = env
        model = {
            "model": str(reference.model.name_or_path),
            "temperature": reference.temperature,
        }
        options = (
            PPOConfig()
            .environment(env=LiveEnv, env_config={"number": number, "finished": self.finished})
            .env_runners(
                num_env_runners=0,
                num_envs_per_env_runner=env.num_envs,
                rollout_fragment_length=config.n_steps,
            )
            .learners(num_learners=0)
            .rl_module(rl_module_spec=RLModuleSpec(module_class=TokenModule, model_config=model))
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
                train_batch_size_per_learner=self.per_update,
                minibatch_size=config.batch_size,
                num_epochs=config.n_epochs,
            )
            .debugging(seed=int(np.random.randint(2**31)), log_level="ERROR")
        )
        self.algorithm = options.build_algo()
        runner = self.algorithm.env_runner
        self.module: TokenModule = runner.module
        rows = runner.env.unwrapped.envs
        self.finished = rows[0].get_wrapper_attr("finished")
        for row in rows:
            row.unwrapped.bind_actor(self.module)

    @property
    def policy(self) -> CausalLM:
        """The language model that acts."""
        return self.module.core

    def learn(self, total_tokens: int, run: TrainingRun | None = None) -> None:
        """Sample about `total_tokens` tokens and learn from them."""
        tokens = 0
        while tokens < total_tokens:
            self.algorithm.train()
            tokens += self.per_update
            finished = list(self.finished)
            self.finished.clear()
            self.env.episodes += len(finished)
            if run is not None and finished:
                score, kl = np.mean(finished, axis=0).tolist()
                run.record(tokens, {"rollout/score": score, "rollout/kl_per_sequence": kl})

    def save(self, directory: Path) -> None:
        """Write the policy for transformers' `from_pretrained`."""
        learned = self.algorithm.get_module()
        learned.core.save_pretrained(directory)


make = RLlibLearner
