"""The names that `upstream_tests.py` puts into copies of other projects' tests.

It is copied next to them as `exchanged.py`. Each algorithm keeps its name and only fills in the
keywords that a causal LM needs as a policy; keywords of an MLP (`net_arch` …) are dropped.
"""

import os
from typing import Any

import gymnasium
import sb3_contrib
import stable_baselines3
from sb3_contrib import *  # noqa: F403 (the tests' imports of other algorithms)
from stable_baselines3 import *  # noqa: F403
from stable_baselines3 import __version__, get_system_info  # noqa: F401
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    set_seed,
)

import agents.sb3.response_ppo
from agents.sb3.options import PPOOptions
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.stock.maskable import MaskableCausalLMPolicy
from agents.sb3.stock.q_network import CausalLMDQNPolicy
from agents.sb3.stock.quantiles import CausalLMQRDQNPolicy
from agents.sb3.stock.trpo import TRPO as PatchedTRPO
from agents.sb3.vec_env import TokenSB3VecEnv, policy_kwargs
from rlhf_gym.envs import TokenEnv, TokenVectorEnv  # noqa: F401
from rlhf_gym.tasks.exact import ASSETS, exact_env, exact_vector_env  # noqa: F401

FLAGSHIP = os.environ.get("UPSTREAM_PPO") == "flagship"
"""Whether PPO is this project's."""
CONVERT = os.environ.get("UPSTREAM_CONVERT") == "1"
"""Whether the flagship gets each environment as a `TokenSB3VecEnv`."""
ENV_ID = "rlhf_gym/Exact-v0"
OF_AN_MLP = ("net_arch", "activation_fn", "n_critics", "n_quantiles", "share_features_extractor")
"""Keywords of MLP policies."""


def reference_keywords() -> dict[str, Any]:
    """Keywords of a policy that starts from the environment's reference."""
    return policy_kwargs(gymnasium.make(ENV_ID).unwrapped)  # type: ignore[arg-type]


def without_mlp(keywords: dict[str, Any] | None) -> dict[str, Any]:
    """Keywords of the policy that do not belong to an MLP."""
    return {k: v for k, v in (keywords or {}).items() if k not in OF_AN_MLP}


class Filled:
    """Fills in the policy's keywords where an algorithm is made (not where it is loaded)."""

    more: dict[str, Any] = {}  # noqa: RUF012 (read only)

    def __init__(self, policy: Any, env: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("_init_setup_model", True) and policy == "CausalLMPolicy":
            given = kwargs.get("policy_kwargs")
            kwargs["policy_kwargs"] = {**self.keywords(given or {}), **without_mlp(given)}
            kwargs = {**self.more, **kwargs}
        super().__init__(policy, env, *args, **kwargs)

    def keywords(self, given: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the policy."""
        return reference_keywords()


class QFilled(Filled):
    """The same for value-based algorithms, whose networks take the keywords."""

    def keywords(self, given: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the policy."""
        network = {k: v for k, v in reference_keywords().items() if k != "mask"}
        beta = gymnasium.make(ENV_ID).unwrapped.objective.kl_coef  # type: ignore[attr-defined]
        return {"network": {**network, "scale": beta, "n_quantiles": self.quantiles(given)}}

    def quantiles(self, given: dict[str, Any]) -> int:
        """Quantiles of each token; 0 for plain values."""
        return 0


class A2C(Filled, stable_baselines3.A2C):
    """Stable-Baselines3's."""

    policy_aliases = {"CausalLMPolicy": CausalLMPolicy}  # noqa: RUF012


class StockPPO(Filled, stable_baselines3.PPO):
    """Stable-Baselines3's."""

    policy_aliases = {"CausalLMPolicy": CausalLMPolicy}  # noqa: RUF012


class DQN(QFilled, stable_baselines3.DQN):
    """Stable-Baselines3's."""

    policy_aliases = {"CausalLMPolicy": CausalLMDQNPolicy}  # noqa: RUF012


class TRPO(Filled, PatchedTRPO):
    """sb3-contrib's, with this project's gradients."""

    policy_aliases = {"CausalLMPolicy": CausalLMPolicy}  # noqa: RUF012

    def keywords(self, given: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the policy; TRPO needs second derivatives."""
        return {**reference_keywords(), "attn_implementation": "eager"}


class MaskablePPO(Filled, sb3_contrib.MaskablePPO):
    """sb3-contrib's."""

    policy_aliases = {"CausalLMPolicy": MaskableCausalLMPolicy}  # noqa: RUF012


class QRDQN(QFilled, sb3_contrib.QRDQN):
    """sb3-contrib's."""

    policy_aliases = {"CausalLMPolicy": CausalLMQRDQNPolicy}  # noqa: RUF012

    def quantiles(self, given: dict[str, Any]) -> int:
        """Quantiles of each token."""
        return given.get("n_quantiles", 16)


class FlagshipPPO(agents.sb3.response_ppo.PPO):
    """This project's PPO, with Stable-Baselines3's keywords as its options of the same meaning."""

    def __init__(self, policy: Any, env: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("_init_setup_model", True):
            kwargs["policy_kwargs"] = without_mlp(kwargs.get("policy_kwargs"))
            if "options" not in kwargs and not args:
                kwargs["options"] = options_of(kwargs)
        super().__init__(policy, converted(env), *args, **kwargs)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As in Stable-Baselines3."""
        super().set_env(converted(env), force_reset)

    @classmethod
    def load(cls, path: Any, env: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in Stable-Baselines3."""
        return super().load(path, converted(env), *args, **kwargs)


def options_of(kwargs: dict[str, Any]) -> PPOOptions:
    """Take PPO's keywords out of `kwargs`: the flagship has them as options."""
    options: dict[str, Any] = {}
    n_steps, batch_size = kwargs.pop("n_steps", None), kwargs.pop("batch_size", None)
    if n_steps is not None:  # tokens of each row per rollout; the budget is four
        options["n_waves"] = max(1, n_steps // 4)
    if n_steps is not None and batch_size is not None:
        options["n_minibatches"] = max(1, n_steps // batch_size)
    for name in set(PPOOptions.__dataclass_fields__) & kwargs.keys():
        options[name] = kwargs.pop(name)
    return PPOOptions(**options)


def converted(env: Any) -> Any:
    """The environment of as many rows behind this project's `VecEnv`, if that is asked for."""
    if not CONVERT or env is None or isinstance(env, TokenSB3VecEnv):
        return env
    if isinstance(env, VecEnv) and not isinstance(env, DummyVecEnv):
        return env
    rows = env.num_envs if isinstance(env, DummyVecEnv) else 1
    one = env.envs[0] if isinstance(env, DummyVecEnv) else env
    spec = (gymnasium.make(one) if isinstance(one, str) else one).unwrapped.spec
    if spec is None or not isinstance(gymnasium.make(spec).unwrapped, TokenEnv):
        return env
    return TokenSB3VecEnv(gymnasium.make_vec(spec.id, num_envs=rows, **spec.kwargs))  # type: ignore[arg-type]


chosen: Any = FlagshipPPO if FLAGSHIP else StockPPO
chosen.__name__ = chosen.__qualname__ = "PPO"
globals()["PPO"] = PPO = chosen


gymnasium.register(
    "upstream/Exact-fixed-v0",
    entry_point="rlhf_gym.tasks.exact:exact_env",
    vector_entry_point="rlhf_gym.tasks.exact:exact_vector_env",
    kwargs={"stop_at_eos": False},
)


def IdentityEnv(*args: Any, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Episodes of one length, as the identity environment has."""
    return gymnasium.make(ENV_ID, stop_at_eos=False)


IdentityEnvBox = IdentityEnv


def InvalidActionEnvDiscrete(*args: Any, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """An environment whose masks depend on the state."""
    return gymnasium.make(ENV_ID, top_k=4)


def local_ids() -> tuple[str, ...]:
    """Register each variant of Exact-v0 and a Text-v0 of local models; return all ids."""
    variants = ("deceptive", "long_range", "ending")
    for variant in variants:
        gymnasium.register(
            f"upstream/Exact-{variant}-v0",
            entry_point="rlhf_gym.tasks.exact:exact_env",
            vector_entry_point="rlhf_gym.tasks.exact:exact_vector_env",
            kwargs={"variant": variant},
        )
    gymnasium.register(
        "upstream/Text-gpt2-v0",
        entry_point="rlhf_gym.tasks.text:text_env",
        vector_entry_point="rlhf_gym.tasks.text:text_vector_env",
        kwargs=gpt2(os.environ["UPSTREAM_MODELS"]),
    )
    names = (*(f"upstream/Exact-{v}-v0" for v in variants), "upstream/Text-gpt2-v0")
    return (ENV_ID, *names, "rlhf_gym/Reviews-v0")


def gpt2(folder: str) -> dict[str, Any]:
    """Keywords of a Text-v0 whose small GPT-2 and reward model are in `folder`."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "reference")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    for name, model in (
        ("reference", GPT2LMHeadModel(config)),
        ("reward", GPT2ForSequenceClassification(config)),
    ):
        if not os.path.exists(f"{folder}/{name}/config.json"):
            model.save_pretrained(f"{folder}/{name}")
            tokenizer.save_pretrained(f"{folder}/{name}")
    return {
        "reference": f"{folder}/reference",
        "reward_model": f"{folder}/reward",
        "prompts": str(ASSETS / "prompts.json"),
        "max_prompt_tokens": 4,
        "max_new_tokens": 6,
        "split": "all",
    }


IDS = local_ids() if os.environ.get("UPSTREAM_SUITE") == "gymnasium" else (ENV_ID,)
"""The environments that Gymnasium's tests of every environment run on."""
