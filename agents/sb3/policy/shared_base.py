"""A policy of adapters on weights that are somebody else's: what is saved is its own alone."""

from typing import Any

from torch import Tensor, nn

from rlhf_gym.lm.causal_lm import CausalLM


class Lent:
    """A model that a policy is to share with its owner: never copied, and left out of pickles.

    Args:
        lm: The model, frozen.
    """

    def __init__(self, lm: CausalLM | None) -> None:
        self.lm = lm

    def __reduce__(self) -> tuple[type["Lent"], tuple[None]]:
        return Lent, (None,)


def leave_out_frozen(
    policy: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object
) -> None:
    """A hook of `state_dict`: only what learns is in it."""
    for name in _frozen(policy):
        state.pop(prefix + name, None)


def do_without_frozen(policy: nn.Module, keys: Any) -> None:
    """A hook of `load_state_dict`: nothing else is missed."""
    frozen = _frozen(policy)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def _frozen(policy: nn.Module) -> set[str]:
    """Names of what does not learn."""
    every = policy.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in every if not parameter.requires_grad}
    return names | {name for name, _ in policy.named_buffers(remove_duplicate=False)}
