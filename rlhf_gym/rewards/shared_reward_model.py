"""The process's one frozen copy of each reward model, shared by environments that name it."""

from functools import lru_cache

from rlhf_gym.lm.loading import weights_stamp
from rlhf_gym.rewards.reward_model import RewardModel


def shared_reward_model(
    name: str,
    revision: str | None,
    device: str,
    label: str | int | None = None,
    probability: bool = False,
) -> RewardModel:
    """The process's one frozen copy of a reward model."""
    return _frozen(name, revision, device, label, probability, weights_stamp(name))


@lru_cache(maxsize=16)
def _frozen(
    name: str,
    revision: str | None,
    device: str,
    label: str | int | None,
    probability: bool,
    stamp: int,
) -> RewardModel:
    model = RewardModel.load(
        name, revision=revision, device=device, label=label, probability=probability
    )
    return model.requires_grad_(False).eval()
