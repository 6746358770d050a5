"""LoRA: low-rank adapters on a model's linear layers; only the adapters are trained.

A model and its adapted twin share one set of weights. The twin has its own modules around the same
tensors, so the plain model has no adapters. Source: Hu et al. (2021), "LoRA", arXiv 2106.09685.
Needs the package peft.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_gym.errors import InputError


def add_adapters(
    model: PreTrainedModel, rank: int, *, alpha: int | None = None, task_type: str = "CAUSAL_LM"
) -> Any:
    """Put adapters into every linear layer of the trunk, in place, and freeze everything else.

    Their product starts at 0, so the model's output does not change.

    Args:
        model: The model.
        rank: Rank of the adapters.
        alpha: The adapters' product is scaled by alpha / rank; 2 · rank if None.
        task_type: As in peft.

    Returns:
        peft's `LoraModel` around the model.

    Raises:
        InputError: peft is not installed, or the rank is not positive.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise InputError(
            "lora_rank needs the package peft: pip install 'rlhf-gym[lora]'"
        ) from error
    if rank < 1:
        raise InputError(f"lora_rank must be at least 1 if it is given, not {rank}")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear",
        task_type=task_type,
        # GPT-2's Conv1D stores its weight transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return LoraModel(model, config, "default")


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its own modules and config around the same parameters and buffers."""
    # deepcopy takes whatever its memo has for an object, here the tensor itself.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of an adapted model, with the adapters added to the copy's weights."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            assert isinstance(module, nn.Module)
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    return plain
