"""Tiny random models, made in memory and saved once a session; nothing is downloaded.

The weights are large, so that the distributions are far from uniform and a wrong position, mask or
neighbour shows in the fifth digit and long before.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.lm.architecture import trunk
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import last_hidden
from rlhf_gym.lm.masks import make_mask
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD

# One thread a test, in the processes that tests start too: several tests run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def gradual_underflow() -> Iterator[None]:
    """Commands that run in this process make the CPU flush denormals; other tests need them."""
    yield
    torch.set_flush_denormal(False)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["<unk>", "<pad>", "<s>", "</s>", *LETTERS]
V = len(VOCABULARY)
PAD_ID, BOS, EOS = 1, 2, 3
# Several ends, so that random responses stop early now and then.
ENDS = (EOS, 20, 21, 22, 23, 24)
PROMPTS = ("a b", "c", "d e f g", "h i j", "k l m n o")
MAX_PROMPT, BUDGET = 6, 5

# Options of the flagship for tests of its mechanics: one model, one rate, and no update that the
# policy sits out.
PLAIN: dict[str, Any] = {"critic": "shared", "critic_warmup": 0, "value_lr_scale": 1.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": False},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": False},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    # Every other layer looks 4 tokens back, under names of its own.
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "num_layers": 2,
        "num_heads": 4,
    },
    "cohere": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "granitemoe": {"num_key_value_heads": 2},
    "llama4_text": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    # Latent attention: its value heads are narrower than its queries.
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
    # Positions are a bias on attention, made from a 2-D mask.
    "bloom": {},
    "falcon": {"alibi": True},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Recurrent layers; in Qwen3-Next every other one.
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        # With larger weights its two formulas for one state differ in the fifth digit.
        "initializer_range": 0.05,
    },
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # no cache at all
}
SERVED = ("llama", "gpt2", "qwen2", "qwen3", "gpt_neox", "opt", "deepseek_v2")
# Rows outgrow their windows, or slots cannot hold their state.
OWN_CACHE = (
    *("mistral", "gpt_neo", "gemma3_text", "bloom", "falcon", "mamba", "mamba2", "qwen3_next"),
)
UNSERVED = ("openai-gpt",)


def make_tokenizer(pad_token: str = "<pad>") -> PreTrainedTokenizerBase:
    """Letters apart by spaces; every text opens with <s>."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad_token,
        unk_token="<unk>",
    )


def make_config(family: str, **options: Any) -> Any:
    common = {
        "vocab_size": V,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD_ID,
        "initializer_range": 0.3,
    }
    return AutoConfig.for_model(family, **{**common, **FAMILIES.get(family, {}), **options})


@pytest.fixture(scope="session")
def save_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Path of a saved tiny LM: `save_lm(family, seed, eos, pad_is_eos, **config)`."""

    @lru_cache
    def save(
        family: str = "llama",
        *,
        seed: int = 0,
        eos: tuple[int, ...] = ENDS,
        pad_is_eos: bool = False,
        **options: Any,
    ) -> str:
        if pad_is_eos:
            options["pad_token_id"] = EOS
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, **options))
        model.generation_config.eos_token_id = list(eos)
        path = tmp_path_factory.mktemp(family)
        model.save_pretrained(path)
        make_tokenizer("</s>" if pad_is_eos else "<pad>").save_pretrained(path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def load_lm(save_lm) -> Callable[..., CausalLM]:
    """A fresh `CausalLM`: keywords of `save_lm`, and `temperature`."""

    def load(family: str = "llama", *, temperature: float = 1.0, **options: Any) -> CausalLM:
        return CausalLM.load(save_lm(family, **options), temperature=temperature)

    return load


@pytest.fixture(scope="session")
def save_reward_model(save_lm, tmp_path_factory) -> Callable[..., str]:
    """Path of a saved tiny reward model on a backbone with these keywords of `save_lm`."""

    @lru_cache
    def save(**options: Any) -> str:
        torch.manual_seed(1)
        reward_model = RewardModel.from_backbone(save_lm(**{"seed": 7, **options}))
        reward_model.set_gain(0.7, 0.2)
        path = tmp_path_factory.mktemp("reward_model")
        reward_model.save_pretrained(path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


def text_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A number in [-1, 1) that depends on every letter of prompt and response."""
    pairs = zip(prompts, responses, strict=True)
    return [zlib.crc32(f"{p}|{r}".encode()) % 1000 / 500 - 1 for p, r in pairs]


@pytest.fixture(scope="session")
def make_objective(load_lm) -> Callable[..., Objective]:
    """An `Objective` on a fresh reference: its own keywords, and those of `load_lm`."""

    def make(
        family: str = "llama",
        *,
        reward: Any = text_reward,
        kl_coef: float = 0.3,
        temperature: float = 0.8,
        shaping: Sequence[Any] = (),
        mask: dict[str, Any] | None = None,
        **options: Any,
    ) -> Objective:
        lm = load_lm(family, temperature=temperature, **options)
        rule = {"max_new_tokens": BUDGET, **(mask or {})}
        reference = replace(lm, mask=make_mask(lm.tokenizer, lm.vocab_size, lm.eos_ids, **rule))
        return Objective(reference, reward, kl_coef=kl_coef, shaping=shaping)

    return make


def prompt_dataset(lm: CausalLM) -> PromptDataset:
    return PromptDataset.from_texts(PROMPTS, lm.tokenizer, lm.eos_ids, MAX_PROMPT)


@pytest.fixture(scope="session")
def make_vector_env(make_objective) -> Callable[..., TokenVectorEnv]:
    """A `TokenVectorEnv`: its own keywords, and those of `make_objective`."""

    def make(
        num_envs: int = 3,
        *,
        max_new_tokens: int = BUDGET,
        stop_at_eos: bool = True,
        autoreset_mode: str = "SameStep",
        objective: Objective | None = None,
        **options: Any,
    ) -> TokenVectorEnv:
        objective = objective or make_objective(**options)
        return TokenVectorEnv(
            objective,
            prompt_dataset(objective.reference),
            num_envs=num_envs,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            autoreset_mode=autoreset_mode,
        )

    return make


@pytest.fixture(scope="session")
def make_env(make_objective) -> Callable[..., TokenEnv]:
    """A `TokenEnv`: its own keywords, and those of `make_objective`."""

    def make(
        *,
        max_new_tokens: int = BUDGET,
        stop_at_eos: bool = True,
        objective: Objective | None = None,
        **options: Any,
    ) -> TokenEnv:
        objective = objective or make_objective(**options)
        prompts = prompt_dataset(objective.reference)
        return TokenEnv(objective, prompts, max_new_tokens=max_new_tokens, stop_at_eos=stop_at_eos)

    return make


class ModelActor:
    """An actor that knows log π by full forwards of a model of its own."""

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm

    @torch.no_grad()
    def log_prob(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        hidden = last_hidden(self.lm, torch.from_numpy(observations))
        return self.lm.log_probs_of(hidden, torch.from_numpy(actions)).numpy()


@pytest.fixture(scope="session")
def actor(load_lm) -> ModelActor:
    """Someone who acts otherwise than the reference."""
    return ModelActor(load_lm("llama", seed=3, temperature=0.8))


def draw_responses(n: int, budget: int = BUDGET, seed: int = 0) -> np.ndarray:
    """Whole responses of random tokens, (n, budget), PAD behind each end."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, V, (n, budget))
    for row in out:
        ends = np.flatnonzero(np.isin(row, ENDS))
        if len(ends):
            row[ends[0] + 1 :] = PAD
    return out


@torch.no_grad()
def hidden_alone(lm: CausalLM, row: Sequence[int]) -> torch.Tensor:
    """Last hidden state of one unpadded row by transformers alone, (d,)."""
    ids = torch.tensor([[int(i) for i in row if i != PAD]])
    return trunk(lm.model)(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


@torch.no_grad()
def log_probs_alone(lm: CausalLM, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Log-probs of a response's tokens by transformers alone on one unpadded row, (T,)."""
    prompt, response = ([int(i) for i in part if i != PAD] for part in (prompt, response))
    logits = lm.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    log_p = torch.log_softmax(logits[:, : lm.vocab_size] / lm.temperature, -1)
    return log_p[range(len(response)), response]


@contextmanager
def count_forwards(lm: CausalLM) -> Iterator[list[tuple[int, int]]]:
    """The (rows, tokens) of every forward of a model's trunk."""
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape))

    handle = trunk(lm.model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def assert_same_gradients(
    found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], relative: float
) -> None:
    """Equal but for an error of `relative` times the expected gradient's norm."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected))
    assert float((a - b).norm()) <= relative * float(b.norm())


def play_rollout(learner: Any) -> None:
    """Let a flagship with a value head that is not 0 play one rollout, and learn nothing."""
    torch.manual_seed(1)
    torch.nn.init.normal_(learner.policy.critic.head.weight, std=0.3)
    _, callback = learner._setup_learn(1)
    callback.on_training_start({}, {})
    learner.collect_rollouts(learner.env, callback, learner.rollout_buffer, 0)
