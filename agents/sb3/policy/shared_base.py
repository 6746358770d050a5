"""Adapters on a frozen model that the policy shares: only the policy's own weights are saved."""

from typing import Any

from torch import Tensor, nn

from rlhf_gym.lm.causal_lm import CausalLM


class Lent:
    """A model that a policy shares with its owner: never copied, and left out of pickles.

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
    """state_dict hook: leave out frozen base weights."""
    for name in _frozen(policy):
        state.pop(prefix + name, None)


def do_without_frozen(policy: nn.Module, keys: Any) -> None:
    """load_state_dict hook: do not report frozen base weights as missing."""
    frozen = _frozen(policy)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def _frozen(policy: nn.Module) -> set[str]:
    """Names of frozen parameters, and of buffers."""
    every = policy.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in every if not parameter.requires_grad}
    return names | {name for name, _ in policy.named_buffers(remove_duplicate=False)}
