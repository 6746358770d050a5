"""Settings of published work by name: models, data and numbers of papers, as Text-v0 keywords.

Models and data come from the Hugging Face hub, at the commit that is named here if one is known. On
a machine without access to a hub, `local_dir` names a folder of copies, `local_dir/OWNER/NAME`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_gym.data.rows import HUB
from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.envs.token_env import entry_point
from rlhf_gym.errors import InputError, UnreachableError
from rlhf_gym.tasks.keywords import passes_on
from rlhf_gym.tasks.text import text_env, text_vector_env
from rlhf_gym.utils.type_hints import check_hints

Keywords = dict[str, Any]

ABOUT = {
    "reference": ("reference_revision", "tokenizer"),
    "reward_model": ("reward_model_revision", "reward_label", "reward_probability"),
    "prompts": (
        "prompts_revision",
        "prompt_split",
        "prompt_column",
        "prompt_share",
        "prompt_keep",
        "prompt_format",
    ),
}
TURNS = ["\n\nHuman:", "\n\nAssistant:"]
RESOURCES = ("reference", "tokenizer", "reward_model", "prompts")

GPT2 = {
    "reference": "openai-community/gpt2",
    "reference_revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
}


HH = {
    "prompts": "Anthropic/hh-rlhf",
    "prompts_revision": "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
}


@dataclass(frozen=True)
class Setting:
    """A published setting.

    Attributes:
        source: Who published it, and where its numbers come from.
        keywords: Keywords of `rlhf_gym/Text-v0`.
        reward_model: If no reward model is published in transformers' layout: the options of
            train_reward_model.py that train one.
    """

    source: str
    keywords: Keywords = field(default_factory=dict)
    reward_model: str | None = None


def _ziegler(name: str) -> Setting:
    """Ziegler et al. 2019: 64 tokens of a book, 24 new tokens, scored up to a full stop."""
    labels = f"{HUB}vwxyzjn/lm-human-preferences/{name}/offline_5k.json"
    return Setting(
        source="Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences "
        "(arXiv 1909.08593), and its code's settings",
        keywords={
            **GPT2,
            "prompts": labels,
            "prompt_format": "ziegler",
            "max_prompt_tokens": 64,
            "max_new_tokens": 24,
            "temperature": 0.7,
            "kl_coef": 0.15,
            "stop_at_eos": False,
            "cuts": [["stop_token", {"token": ".", "after": 16}]],
            "shaping": [["missing_token", {"token": ".", "score": -1.0}]],
        },
        reward_model=f"--data {labels} --tokenizer {GPT2['reference']} "
        f"--backbone {GPT2['reference']} --learning-rate 5e-5",
    )


SETTINGS: dict[str, Setting] = {
    "IMDB-v0": Setting(
        source="Ramamurthy et al. 2023, RL4LMs (arXiv 2210.01241), its gpt2_ppo task: the last 64 "
        "tokens of a review's first half are continued by 48",
        keywords={
            "reference": "lvwerra/gpt2-imdb",
            "reward_model": "lvwerra/distilbert-imdb",
            "reward_model_revision": "0fc02cd68445b599a9cb2da2368050e7fb31d29a",
            "reward_label": "POSITIVE",
            "reward_probability": True,
            "prompts": "stanfordnlp/imdb",
            "prompts_revision": "e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
            "prompt_share": 0.5,
            "prompt_keep": "last",
            "max_prompt_tokens": 64,
            "max_new_tokens": 48,
            "kl_coef": 0.1,
        },
    ),
    "TLDR-v0": Setting(
        source="Huang et al. 2024, The N+ Implementation Details of RLHF with PPO "
        "(arXiv 2403.17031), 1B",
        keywords={
            "reference": "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
            "reward_model": "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
            "prompts": "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_"
            "1706381144",
            "prompt_column": "query",
            "max_prompt_tokens": 512,
            "max_new_tokens": 53,
            "temperature": 0.7,
            "kl_coef": 0.05,
            "shaping": [["missing_eos", {"score": -1.0}]],
        },
    ),
    "HH-v0": Setting(
        source="Bai et al. 2022 (arXiv 2204.05862) as trlX plays it: a Pythia of 125M taught on "
        "the dialogues, 128 new tokens",
        keywords={
            "reference": "Dahoas/pythia-125M-static-sft",
            "tokenizer": "EleutherAI/gpt-neox-20b",
            **HH,
            "prompt_format": "hh",
            "max_prompt_tokens": 384,
            "max_new_tokens": 128,
            "kl_coef": 0.05,
            "cuts": [["stop_strings", {"strings": TURNS, "included": False}]],
        },
        reward_model=f"--data {HH['prompts']} --data-revision {HH['prompts_revision']} "
        "--on-bad-row skip --backbone Dahoas/pythia-125M-static-sft "
        "--backbone-tokenizer EleutherAI/gpt-neox-20b --learning-rate 5e-5",
    ),
    "Sentiment-v0": _ziegler("sentiment"),
    "Descriptiveness-v0": _ziegler("descriptiveness"),
}


@entry_point
def published_env(
    *, setting: str, render_mode: str | None = None, local_dir: str | None = None, **keywords: Any
) -> TokenEnv:
    """A published setting for `gym.make`; keywords as in `rlhf_gym/Text-v0`, and `local_dir`."""
    parts = published_keywords(setting, local_dir, keywords)
    try:
        return text_env(render_mode=render_mode, **parts)
    except UnreachableError as error:
        raise _how_to_fetch(setting, parts, error) from error


@passes_on(text_vector_env, lambda setting: SETTINGS[setting].keywords)
def published_vector_env(
    *,
    setting: str,
    num_envs: int = 1,
    autoreset_mode: str = "SameStep",
    local_dir: str | None = None,
    **keywords: Any,
) -> TokenVectorEnv:
    """A published setting for `gym.make_vec`.

    Args:
        setting: Name of the setting, the id without `rlhf_gym/`.
        num_envs: Number of rows.
        autoreset_mode: "SameStep", "NextStep" or "Disabled", as in Gymnasium.
        local_dir: Folder of copies of what the hub has, `local_dir/OWNER/NAME`.
        **keywords: As in `rlhf_gym/Text-v0`.
    """
    parts = published_keywords(setting, local_dir, keywords)
    try:
        return text_vector_env(num_envs=num_envs, autoreset_mode=autoreset_mode, **parts)
    except UnreachableError as error:
        raise _how_to_fetch(setting, parts, error) from error


def published_keywords(setting: str, local_dir: str | None, keywords: Keywords) -> Keywords:
    """Keywords of `rlhf_gym/Text-v0` for a setting, with copies in `local_dir` instead of the hub.

    Raises:
        InputError: There is no such folder, or you have to train the reward model first.
    """
    known = SETTINGS[setting]
    parts = {**known.keywords, **keywords}
    for name, about in ABOUT.items():
        # A revision or label of the setting's own resource does not fit one that the user names.
        for word in about:
            if name in keywords and word not in keywords:
                parts.pop(word, None)
    if "reward_model" not in parts:
        raise InputError(
            f"rlhf_gym/{setting} needs a reward model that you train first; none is published in "
            "transformers' layout:\n"
            f"    python scripts/train_reward_model.py {known.reward_model} --run-dir runs/rm\n"
            "and then reward_model='runs/rm/reward_model'"
        )
    if local_dir is not None:
        check_hints(published_keywords, {"local_dir": local_dir})
        folder = Path(local_dir)
        if not folder.is_dir():
            raise InputError(f"local_dir {local_dir!r} is not a folder")
        for name in RESOURCES:
            value = parts.get(name)
            names = value if isinstance(value, list) else [value]
            copies = [_copy(folder, one) for one in names]
            if copies != names:
                parts[name] = copies if isinstance(value, list) else copies[0]
                parts.pop(f"{name}_revision", None)
    return parts


def _copy(folder: Path, name: str | None) -> str | None:
    """Path of a hub name in the folder of copies; the name itself if there is no copy."""
    if name is None:
        return None
    copy = folder / name.removeprefix(HUB)
    return str(copy) if copy.exists() else name


def _how_to_fetch(setting: str, parts: Keywords, error: UnreachableError) -> UnreachableError:
    own = SETTINGS[setting].keywords
    lines = [
        _download(parts[name], parts.get(f"{name}_revision"), dataset=name == "prompts")
        for name in RESOURCES
        # Only the setting's own resources: what the user named, the user knows where to find.
        if name in parts and parts[name] == own.get(name)
    ]
    if not lines:
        return error
    return UnreachableError(
        f"rlhf_gym/{setting}: {error}\n"
        "On a machine that reaches the hub, download\n"
        + "\n".join(f"    {line}" for line in dict.fromkeys(lines))
        + "\nthen put the folder `hub` on this machine and pass local_dir='hub'."
    )


def _download(name: str, revision: str | None, *, dataset: bool) -> str:
    pin = f" --revision {revision}" if revision else ""
    kind = " --repo-type dataset" if dataset else ""
    owner, repository, *file = name.removeprefix(HUB).split("/", 2)
    wanted = " ".join([f"{owner}/{repository}", *file])
    return f"hf download {wanted}{kind}{pin} --local-dir hub/{owner}/{repository}"
