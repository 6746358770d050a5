"""Whether prompts are in the form that the models were made for: chats, plain text, words."""

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.rewards.ensemble import RewardEnsemble
from rlhf_gym.rewards.functions import Reward
from rlhf_gym.rewards.reward_model import RewardModel

UNKNOWN = 0.05
"""Share of unknown tokens above which a tokenizer seems to belong to other texts."""


def reward_models(reward: Reward) -> list[RewardModel]:
    """The reward models that a reward consists of; none if it is a function."""
    if isinstance(reward, RewardEnsemble):
        return list(reward.members)
    return [reward] if isinstance(reward, RewardModel) else []


def form_problems(
    prompts: PromptDataset, reference: CausalLM, rewards: list[RewardModel]
) -> list[tuple[str, str]]:
    """What does not fit, and the fix of each; empty if all does.

    Args:
        prompts: The prompts.
        reference: The model that reads them.
        rewards: The reward models that read them too.
    """
    found = []
    chats = sum(ids in prompts.chats for ids in prompts.ids)
    plain = len(prompts) - chats
    if plain and reference.tokenizer.chat_template:
        found.append(
            (
                f"{plain} of {len(prompts)} prompts are plain text, but the model "
                f"{reference.model.name_or_path!r} was made for chats: its tokenizer has a chat "
                "template",
                'give the prompts as messages, [{"role": "user", "content": …}], or take a base '
                "model",
            )
        )
    for reward in rewards:
        learned = reward.prompt_forms
        met = {name for name, n in (("chats", chats), ("texts", plain)) if n}
        if learned and not met <= learned:
            found.append(
                (
                    f"the reward model {reward.model.name_or_path!r} learned from "
                    f"{' and '.join(sorted(learned))}, but the prompts are "
                    f"{' and '.join(sorted(met))}",
                    "give the prompts in the form of its comparisons, or train it on comparisons "
                    "in the form of the prompts",
                )
            )
    share = prompts.unknown_share(reference.tokenizer)
    if share > UNKNOWN:
        found.append(
            (
                f"the tokenizer of {reference.model.name_or_path!r} does not know {share:.0%} of "
                "the prompts' tokens: they are all one id",
                "take a model whose tokenizer knows these texts",
            )
        )
    return found
