"""A Stable-Baselines3 algorithm as a `Learner` of this project's scripts."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from agents.sb3.build import build
from agents.sb3.finite import NonFiniteError
from agents.sb3.learning.checkpoint import CheckpointCallback, restore_latest
from agents.sb3.learning.stopping import stop_when_asked
from agents.sb3.learning.token_samples import SampleCallback
from agents.sb3.options import ResponseOptions, SampledOptions
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.sb3.response_ppo import PPO
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.loading import load_causal_lm
from rlhf_gym.utils.files import own_memory, whole_folder

ADAPTERS = "adapters.safetensors"


class SB3Learner:
    """Learns with an SB3 algorithm; writes SB3's log into a training run.

    Args:
        algorithm: As `agents.sb3.build` returns it.
        checkpoint_seconds: Least time between two checkpoints; only a `ResponseAlgorithm` has any.
        sample_every: Updates between two records of its sample responses; 0 records none.
    """

    def __init__(
        self, algorithm: BaseAlgorithm, checkpoint_seconds: float = 60.0, sample_every: int = 0
    ) -> None:
        self.algorithm = algorithm
        self.checkpoint_seconds, self.sample_every = checkpoint_seconds, sample_every

    @property
    def policy(self) -> CausalLMPolicy:
        """The policy."""
        assert isinstance(self.algorithm.policy, CausalLMPolicy)
        return self.algorithm.policy

    def learn(self, total_tokens: int, run: TrainingRun | None = None) -> None:
        """Sample about `total_tokens` tokens in all and learn from them.

        A `ResponseAlgorithm` writes checkpoints to ``run.checkpoints`` and resumes from the last.
        """
        if run is None:
            self.algorithm.learn(total_tokens, log_interval=1)
            return
        self.algorithm.set_logger(Logger(None, [RunFormat(run)]))
        fresh = True
        if isinstance(self.algorithm, ResponseAlgorithm):
            fresh = not restore_latest(self.algorithm, run)
        if fresh:
            run.rewind(0)
        done = 0 if fresh else self.algorithm.num_timesteps
        if done < total_tokens:
            self._learn(total_tokens - done, run, fresh)

    def _learn(self, tokens: int, run: TrainingRun, fresh: bool) -> None:
        options: dict[str, Any] = {"log_interval": 1, "reset_num_timesteps": fresh}
        if not isinstance(self.algorithm, ResponseAlgorithm):
            self.algorithm.learn(tokens, **options)
            return
        with stop_when_asked() as stop:
            callbacks: list[BaseCallback] = [
                CheckpointCallback(run.checkpoints, self.checkpoint_seconds, stop)
            ]
            if self.sample_every:
                callbacks.append(SampleCallback(run, self.sample_every))
            try:
                self.algorithm.learn(tokens, callback=callbacks, **options)
            except NonFiniteError as error:
                folder = error.dump(run.run_dir / "broken_batch", self.policy.core)
                raise InputError(
                    f"{error}: stopped before the update. {folder} has the batch and its texts "
                    f"(rows {error.rows()[:8]} first). If it is a reward, look at its function or "
                    "model. If it is a log-prob, loss or gradient, lower the learning rate or "
                    "max_grad_norm and continue from the last checkpoint with --resume"
                ) from error

    def start_from(self, directory: Path) -> None:
        """Load the language model and the critic that `save` wrote."""
        policy = self.policy
        if policy.lora_rank:
            _load_adapters(policy, directory / ADAPTERS)
        else:
            policy.lm.load_state_dict(load_causal_lm(str(directory)).state_dict())
        policy.critic.head.load_state_dict(load_file(directory / "value_head.safetensors"))
        if policy.critic.trunk is not None:
            policy.critic.trunk.load_state_dict(load_file(directory / "critic.safetensors"))
        if isinstance(self.algorithm, PPO):
            self.algorithm.critic_is_trained = True

    def save(self, directory: Path) -> None:
        """Write the language model (adapters merged), the tokenizer and the critic."""
        save_policy(self.policy, directory)


def response_learner(
    algorithm: type[ResponseAlgorithm], options: ResponseOptions, env: TokenVectorEnv
) -> SB3Learner:
    """A learner from whole responses.

    Args:
        algorithm: The class.
        options: An instance of its `Options`.
        env: The environment.

    Raises:
        InputError: An option does not fit the environment.
    """
    sample_every = options.sample_every if isinstance(options, SampledOptions) else 0
    return SB3Learner(build(algorithm, env, options=options), sample_every=sample_every)


def stock_learner(
    algorithm: type[OnPolicyAlgorithm],
    config: Any,
    env: TokenVectorEnv,
    *,
    policy_class: type[CausalLMPolicy] = CausalLMPolicy,
    policy_options: dict[str, Any] | None = None,
    buffer: type[SequenceRolloutBuffer] = SequenceRolloutBuffer,
    buffer_options: dict[str, Any] | None = None,
) -> SB3Learner:
    """An algorithm of Stable-Baselines3 on whole sequences; its rate annealed to 0.

    Args:
        algorithm: The class.
        config: A dataclass of its keywords, `learning_rate` among them.
        env: The environment.
        policy_class: `CausalLMPolicy` or a class of it.
        policy_options: Further keywords of the policy.
        buffer: The rollout buffer.
        buffer_options: Its own keywords.
    """
    options = dict(vars(config))
    options["learning_rate"] = LinearSchedule(config.learning_rate, 0.0, 1.0)
    return SB3Learner(
        build(
            algorithm,
            env,
            rollout_buffer_class=buffer,
            rollout_buffer_kwargs=buffer_options,
            policy_class=policy_class,
            policy_options={"entropy": options.get("ent_coef", 0) != 0, **(policy_options or {})},
            device=env.objective.reference.device,
            **options,
        )
    )


def save_policy(policy: CausalLMPolicy, directory: Path) -> None:
    """Save for transformers' `from_pretrained`; `directory` is complete or absent."""
    with whole_folder(directory) as partial:
        policy.plain().save_pretrained(partial)
        if policy.lora_rank:
            save_file(own_memory(_adapters(policy)), partial / ADAPTERS)
        save_file(own_memory(policy.critic.head.state_dict()), partial / "value_head.safetensors")
        if policy.critic.trunk is not None:
            save_file(own_memory(policy.critic.trunk.state_dict()), partial / "critic.safetensors")


def _adapters(policy: CausalLMPolicy) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in policy.lm.named_parameters() if p.requires_grad}


def _load_adapters(policy: CausalLMPolicy, file: Path) -> None:
    if not file.exists():
        raise InputError(f"there is no {file}: the policy that was saved there had no adapters")
    saved, ours = load_file(file), _adapters(policy)
    if {name: p.shape for name, p in saved.items()} != {name: p.shape for name, p in ours.items()}:
        raise InputError(f"the adapters in {file} have the shapes of another model or rank")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(saved[name])


class RunFormat(KVWriter):
    """SB3's logger, writing to a `TrainingRun`."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        """Add a row with the values that are numbers."""
        numbers = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float)}
        self._run.record(step, numbers)

    def close(self) -> None:
        """Nothing is open."""
