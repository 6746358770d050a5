"""The arguments of a reset, checked: which rows, which seeds, which prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_gym.data.encoding import prompt_ids
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.data.prompts import HALF_A_CHARACTER, Prompt, has_half_a_character
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM


def checked_options(given: Any, num_envs: int) -> dict[str, Any]:
    """Check the options of a reset.

    Raises:
        InputError: One is unknown, or has the wrong type.
    """
    if given is not None and not isinstance(given, dict):
        raise InputError(f"reset options must be a dict, not {given!r}")
    options: dict[str, Any] = given or {}
    unknown = options.keys() - {"reset_mask", "prompt", "prompt_index"}
    if unknown:
        raise InputError(f"unknown reset options {sorted(unknown)}")
    if "reset_mask" in options:
        mask = options["reset_mask"]
        shape = np.shape(mask) if isinstance(mask, np.ndarray | list | tuple) else None
        if shape != (num_envs,) or not np.any(mask):
            raise InputError(f"reset_mask must be ({num_envs},) bool with a True in it")
    return options


def checked_seeds(seed: Any, num_envs: int) -> Sequence[int | None]:
    """A seed, or none, for each row.

    Raises:
        InputError: It is not a seed.
    """
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    seeds = [int(seed) + i for i in range(num_envs)] if whole else seed
    if (
        not isinstance(seeds, list | tuple)
        or len(seeds) != num_envs
        or not all(s is None or (isinstance(s, int | np.integer) and s >= 0) for s in seeds)
    ):
        raise InputError(
            f"seed must be an integer from 0, or a list of {num_envs} (or None), not {seed!r}"
        )
    return seeds


def named_prompts(
    options: dict[str, Any], n: int, prompts: PromptDataset, reference: CausalLM
) -> list[tuple[int, ...]] | None:
    """The prompts that the options name for the n rows to reset; None if they name none.

    Args:
        options: As `checked_options` returns them.
        n: Number of rows to reset.
        prompts: The prompts that `prompt_index` refers to.
        reference: Its tokenizer reads a `prompt`.

    Raises:
        InputError: There is no such prompt, or there are not n of them.
    """
    if "prompt_index" in options:
        index = options["prompt_index"]
        several = list(index) if isinstance(index, list | tuple | np.ndarray) else [index] * n
        kinds = all(isinstance(i, int | np.integer) for i in several)
        if len(several) != n or not kinds or not all(0 <= i < len(prompts) for i in several):
            raise InputError(
                f"prompt_index must be 0 to {len(prompts) - 1}, one or a list of {n}, not {index}"
            )
        return [prompts.ids[i] for i in several]
    if "prompt" not in options:
        return None
    prompt = options["prompt"]
    # A list of messages is one prompt; a list of texts or of such lists has one prompt per row.
    several = [prompt] * n if _is_prompt(prompt) else prompt
    if not isinstance(several, list | tuple) or not all(map(_is_prompt, several)):
        raise InputError(f"prompt must be a text or a list of chat messages, not {prompt!r}")
    if has_half_a_character(several):
        raise InputError(f"the option prompt: {HALF_A_CHARACTER}")
    if len(several) != n:
        raise InputError(f"prompt has {len(several)} prompts for {n} rows")
    return [_ids_of(p, prompts, reference) for p in several]


def _ids_of(prompt: Prompt, prompts: PromptDataset, reference: CausalLM) -> tuple[int, ...]:
    ids = prompt_ids(prompt, reference.tokenizer, reference.eos_ids)
    if not 0 < len(ids) <= prompts.max_tokens:
        raise InputError(
            f"the prompt has {len(ids)} tokens; max_prompt_tokens is {prompts.max_tokens}"
        )
    if not isinstance(prompt, str):
        prompts.chats.setdefault(tuple(ids), prompt)
    return tuple(ids)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)
