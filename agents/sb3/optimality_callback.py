"""J, KL, score and optimality on held-out prompts while any algorithm of SB3 trains."""

import json
import tempfile
from pathlib import Path

import gymnasium
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.layers import whole_rows
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.stock.q_network import TokenQNetwork
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.policies import MIN_ESS
from rlhf_gym.evaluation.yardstick import Yardstick
from rlhf_gym.lm.causal_lm import CausalLM

FIGURES = ("objective", "optimality", "score", "kl")


class OptimalityEvalCallback(BaseCallback):
    """Evaluates the policy itself, as `rlhf_gym.evaluation` does, and keeps the best model by J.

    In place of SB3's `EvalCallback`, whose mean reward is that of the greedy policy by default. J
    is exact where all responses can be listed. Elsewhere each evaluation draws its own responses,
    with its own generator, so that the training goes the same way with it and without it.

    The log gets `eval/objective` (J), `eval/score`, `eval/kl` (nats per sequence) and, where J* is
    known well enough, `eval/optimality`.

    Args:
        env: The environment of the evaluation, `gymnasium.make_vec(id, split="held_out")` or what
            `whole_rows` makes rows of.
        every: Tokens between two evaluations. There is one before the first token and one after the
            last, too.
        prompts: Number of prompts; all if there are fewer.
        responses: Responses of the policy to each prompt.
        reference_samples: Responses of the reference to each prompt, drawn once.
        best_model_save_path: Folder for `best_model.zip`; None keeps none.
        log_path: Folder for `evaluations.jsonl`, one line per evaluation; None writes none.
        seed: Seed of the responses.

    Raises:
        InputError: `every` is below 1, or the environment is none of this project's, or wrapped.
    """

    def __init__(
        self,
        env: TokenVectorEnv | GymEnv,
        *,
        every: int = 10_000,
        prompts: int = 48,
        responses: int = 16,
        reference_samples: int = 128,
        best_model_save_path: str | Path | None = None,
        log_path: str | Path | None = None,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if every < 1:
            raise InputError(f"every must be at least 1 token, not {every}")
        if not isinstance(env, gymnasium.Env | VectorEnv | VecEnv):
            raise InputError(
                f"{env!r} is no environment: make it with gymnasium.make_vec(id, split='held_out')"
            )
        self.env = whole_rows(env).get_attr("unwrapped")[0]
        self.every, self.seed = every, seed
        self.best_model_save_path, self.log_path = best_model_save_path, log_path
        self.evaluations: list[dict[str, float]] = []
        self.best_objective = -float("inf")
        # The reference's scores are drawn once; the ruler keeps them in a file.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "reference_scores.npz"
            self._ruler = Yardstick(self.env, file, prompts, reference_samples, responses)

    def _init_callback(self) -> None:
        for folder in (self.best_model_save_path, self.log_path):
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)

    def _on_training_start(self) -> None:
        self._measured = (-1, -1)
        self._evaluate()

    def _on_step(self) -> bool:
        if self.num_timesteps - self.evaluations[-1]["tokens"] >= self.every:
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        # The last update may come after an evaluation at the same number of tokens.
        if self._measured != (self.num_timesteps, self._updates):
            self._evaluate()

    @property
    def _updates(self) -> int:
        return int(vars(self.model).get("_n_updates", 0))

    def _evaluate(self) -> None:
        row = self._ruler.measure(language_model(self.model), self.seed)
        shown = [name for name in FIGURES if name != "optimality" or self._ruler.ess >= MIN_ESS]
        found: dict[str, float] = {"tokens": self.num_timesteps, **{k: row[k] for k in shown}}
        self.evaluations.append(found)
        self._measured = (self.num_timesteps, self._updates)
        for name in shown:
            self.logger.record(f"eval/{name}", found[name])
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.log_path is not None:
            file = Path(self.log_path) / "evaluations.jsonl"
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(found) + "\n")
        if found["objective"] > self.best_objective:
            self.best_objective = found["objective"]
            if self.best_model_save_path is not None:
                self.model.save(Path(self.best_model_save_path) / "best_model")


def language_model(algorithm: BaseAlgorithm) -> CausalLM:
    """The policy of an algorithm as the language model that acts; of a Q-network, its greedy one.

    Raises:
        InputError: The policy is none of this project's.
    """
    policy = algorithm.policy
    if isinstance(policy, CausalLMPolicy):
        return policy.plain()
    for network in policy.children():  # the target network comes second
        if isinstance(network, TokenQNetwork):
            return network.greedy()
    raise InputError(f"{type(policy).__name__} has no language model of this project")
