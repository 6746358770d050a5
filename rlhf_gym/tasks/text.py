"""`rlhf_gym/Text-v0`: any causal LM, any reward, any prompts."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypedDict

from transformers import PreTrainedModel

from rlhf_gym.data.bad_rows import OnBadRow
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.envs.token_env import entry_point
from rlhf_gym.errors import InputError
from rlhf_gym.kl import RewardEstimator
from rlhf_gym.lm.architecture import context_length
from rlhf_gym.lm.causal_lm import shared_causal_lm
from rlhf_gym.lm.loading import same_tokens
from rlhf_gym.lm.masks import make_mask
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.callables import check_model_name, is_callable_name
from rlhf_gym.rewards.ensemble import Pooling, RewardEnsemble, check_pooling
from rlhf_gym.rewards.functions import Reward, TextReward, load_reward
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.rewards.shaping import Named, along_the_way, make
from rlhf_gym.rewards.shared_reward_model import shared_reward_model
from rlhf_gym.tasks.keywords import passes_on
from rlhf_gym.tasks.prompt_form import form_problems, reward_models
from rlhf_gym.tasks.prompt_source import read_prompts, warn_of_dropped
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.once import warn_once
from rlhf_gym.utils.type_hints import check_hints

logger = logging.getLogger(__name__)


class Parts(TypedDict):
    """Arguments that both environment classes take."""

    objective: Objective
    prompts: PromptDataset
    max_new_tokens: int
    stop_at_eos: bool
    gold: TextReward | None


def load_parts(
    *,
    reference: str,
    reward_model: str | list[str],
    prompts: str,
    max_prompt_tokens: int = 64,
    max_new_tokens: int = 48,
    kl_coef: float = 0.1,
    temperature: float = 1.0,
    device: str = "auto",
    tokenizer: str | None = None,
    reference_revision: str | None = None,
    reward_model_revision: str | None = None,
    reward_label: str | int | None = None,
    reward_probability: bool = False,
    pooling: Pooling = "mean",
    uncertainty_weight: float = 1.0,
    prompts_revision: str | None = None,
    prompt_split: str = "train",
    prompt_column: str | None = None,
    prompt_words: int | None = None,
    prompt_share: float | None = None,
    prompt_keep: str | None = None,
    prompt_format: str | None = None,
    prompt_columns: dict[str, Any] | None = None,
    on_bad_row: OnBadRow = "error",
    split: str = "train",
    held_out: float = 0.1,
    stop_at_eos: bool = True,
    min_new_tokens: int = 0,
    decodable_only: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
    cuts: Sequence[Named] = (),
    shaping: Sequence[Named] = (),
    token_rewards: Sequence[Named] = (),
    dense: bool = False,
    kl_estimator: RewardEstimator = "k1",
    gold: str | None = None,
) -> Parts:
    """Load everything that an environment consists of.

    Args:
        reference: Causal LM, by hub name or local path; policies start from it too.
        reward_model: Sequence classifier, by hub name or local path (a list of them is an
            ensemble), or a function of (prompts, responses) as "package.module:function" or
            "path/to/file.py:function". A model with the reference's tokenizer scores the sampled
            ids; with another tokenizer, the text.
        prompts: A file, a pattern of files or a folder (text, JSON, JSON Lines, CSV, TSV,
            Parquet), or a dataset of the `datasets` library; docs/data.md lists all forms.
        max_prompt_tokens: Longer prompts are dropped and counted (see `prompt_keep`).
        max_new_tokens: Token budget of a response.
        kl_coef: β.
        temperature: Divides the logits of both policy and reference.
        device: "auto", "cpu", "cuda" …
        tokenizer: Name or path of the reference's tokenizer, if not in the model's folder.
        reference_revision: Commit or tag on the hub.
        reward_model_revision: Commit or tag on the hub.
        reward_label: For a classifier with several labels: the one that is the reward.
        reward_probability: Pay that label's probability instead of its logit.
        pooling: "mean", "min" or "uncertainty" of an ensemble's members; `info["score_std"]` is
            their standard deviation.
        uncertainty_weight: Score that "uncertainty" subtracts per unit of the members' variance.
        prompts_revision: Commit or tag on the hub.
        prompt_split: Split of a folder or of a dataset to read; `split` then divides its prompts.
        prompt_column: Field of a JSON object or column of a dataset; None takes the first that
            there is of prompt, text, messages, question, instruction, query and conversations.
        prompt_words: Keep only this many first words of each text.
        prompt_share: Keep only this share of each text's words, the first ones.
        prompt_keep: "first" or "last": cut texts that are too long to their first or last
            `max_prompt_tokens` tokens instead of dropping them.
        prompt_format: Read the prompts of comparisons in this format (see
            `rlhf_gym.preferences.known_formats`); token ids in them are the reference's.
        prompt_columns: Read the prompts of comparisons with this map of their columns (see
            `rlhf_gym.preferences.column_map`), as {"prompt": "question", "chosen": "a", …}.
        on_bad_row: What to do with rows that have no prompt: stop with an "error" that names the
            first ones, or "skip" them, which is counted. With `prompt_format`, rows that are not
            comparisons are always skipped.
        split: "train", "held_out" or "all" prompts.
        held_out: Share of the prompts that is held out, chosen by a hash of their text.
        stop_at_eos: Whether an EOS ends a response.
        min_new_tokens: The first `min_new_tokens` tokens of a response cannot be an EOS. This and
            the next three mask policy and reference in the same way.
        decodable_only: Only the EOS and tokens that are text by themselves may be chosen.
        top_k: Only the reference's k likeliest tokens of each state may be chosen.
        top_p: Only the reference's likeliest tokens up to this probability mass may be chosen.
        cuts: The part of a response that is scored: factories of `rlhf_gym.rewards.shaping`, or
            your own as "package.module:factory", each a name or [name, {options}].
        shaping: Changes of the score, named in the same way.
        token_rewards: Rewards paid after each token, named in the same way.
        dense: Potential-based dense reward: pay the change in the reward model's score after each
            token (J is unchanged).
        kl_estimator: "k1"; "k2" and "k3" exist to be studied, and their optimum is not J*.
        gold: A scorer that only evaluation uses, as "package.module:function".

    Raises:
        InputError: Something cannot be loaded or does not fit; the message names it.
    """
    check_hints(load_parts, locals())
    device = resolve_device(device)
    lm = shared_causal_lm(reference, reference_revision, temperature, device, tokenizer)
    mask = make_mask(
        lm.tokenizer,
        lm.vocab_size,
        lm.eos_ids,
        max_new_tokens=max_new_tokens,
        stop_at_eos=stop_at_eos,
        min_new_tokens=min_new_tokens,
        decodable_only=decodable_only,
        top_k=top_k,
        top_p=top_p,
    )
    lm = dataclasses.replace(lm, mask=mask, stop_at_eos=stop_at_eos)
    longest = max_prompt_tokens + max_new_tokens
    _check_context(lm.model, repr(reference), longest)
    texts, bad_rows = read_prompts(
        prompts,
        lm.tokenizer,
        format=prompt_format,
        columns=prompt_columns,
        column=prompt_column,
        split=prompt_split,
        revision=prompts_revision,
        on_bad_row=on_bad_row,
    )
    dataset = PromptDataset.from_texts(
        texts,
        lm.tokenizer,
        lm.eos_ids,
        max_prompt_tokens,
        max_words=prompt_words,
        share=prompt_share,
        keep=prompt_keep,
        split=split,
        held_out=held_out,
    )
    dataset = dataclasses.replace(dataset, bad_rows=bad_rows)
    warn_of_dropped(dataset, prompts, (prompt_split, prompt_column, max_prompt_tokens, prompt_keep))
    reward: Reward
    names = [reward_model] if isinstance(reward_model, str) else reward_model
    if not names:
        raise InputError("reward_model is an empty list; give at least one")
    check_pooling(pooling)
    if len(names) == 1 and is_callable_name(names[0]):
        reward = load_reward(names[0])
    else:
        for name in names:
            check_model_name(name)
        members = [
            shared_reward_model(
                name, reward_model_revision, device, reward_label, reward_probability
            )
            for name in names
        ]
        for name, member in zip(names, members, strict=True):
            _check_context(member.model, f"the reward model {name!r}", longest)
        several = len(members) > 1 or members[0].heads > 1
        reward = RewardEnsemble(members, pooling, uncertainty_weight) if several else members[0]
    along = make("token_rewards", token_rewards, lm)
    if dense:
        if not isinstance(reward, RewardModel):
            raise InputError(
                "dense=True needs a single reward model, not a function or an ensemble"
            )
        if not same_tokens(reward.tokenizer, lm.tokenizer):
            raise InputError("dense=True needs a reward model with the reference's tokenizer")
        if dataset.chats and reward.tokenizer.chat_template not in (
            None,
            lm.tokenizer.chat_template,
        ):
            raise InputError(
                "dense=True needs a reward model with the reference's chat template: it scores the "
                "policy's own rows"
            )
        along.append(along_the_way(reward))
    for problem, fix in form_problems(dataset, lm, reward_models(reward)):
        warn_once(logger, f"{prompts}: {problem}; {fix}")
    return Parts(
        objective=Objective(
            lm,
            reward,
            kl_coef=kl_coef,
            cuts=make("cuts", cuts, lm),
            shaping=make("shaping", shaping, lm),
            token_rewards=along,
            chats=dataset.chats,
            kl_estimator=kl_estimator,
        ),
        prompts=dataset,
        max_new_tokens=max_new_tokens,
        stop_at_eos=stop_at_eos,
        gold=None if gold is None else load_reward(gold),
    )


def _check_context(model: PreTrainedModel, who: str, longest: int) -> None:
    reach = context_length(model)
    if reach and longest > reach:
        raise InputError(
            f"max_prompt_tokens + max_new_tokens = {longest}, but {who} has a context of {reach} "
            "tokens; lower one of them, or use another model"
        )


@entry_point
def text_env(*, render_mode: str | None = None, **keywords: Any) -> TokenEnv:
    """`rlhf_gym/Text-v0` for `gym.make`; keywords as in `load_parts`."""
    return TokenEnv(**load_parts(**keywords), render_mode=render_mode)


@passes_on(load_parts)
def text_vector_env(
    *,
    num_envs: int = 1,
    autoreset_mode: str = "SameStep",
    rows_per_prompt: int = 1,
    render_mode: str | None = None,
    **keywords: Any,
) -> TokenVectorEnv:
    """`rlhf_gym/Text-v0` for `gym.make_vec`.

    Args:
        num_envs: Number of rows.
        autoreset_mode: "SameStep", "NextStep" or "Disabled", as in Gymnasium.
        rows_per_prompt: Rows in turn that play the same prompt; must divide `num_envs`.
        render_mode: "ansi", "rgb_array" or None; `render` returns one frame per row.
        **keywords: As in `load_parts`.
    """
    check_hints(text_vector_env, {"num_envs": num_envs, "rows_per_prompt": rows_per_prompt})
    return TokenVectorEnv(
        **load_parts(**keywords),
        num_envs=num_envs,
        autoreset_mode=autoreset_mode,
        rows_per_prompt=rows_per_prompt,
        render_mode=render_mode,
    )
