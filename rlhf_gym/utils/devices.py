"""The choice of the device that models run on."""

import torch

from rlhf_gym.errors import InputError


def resolve_device(name: str) -> str:
    """Return a device name that torch accepts; "auto" is the GPU if there is one, else the CPU.

    Raises:
        InputError: torch does not know the device, or a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InputError(
            f"torch does not know the device {name!r}; use auto, cpu or cuda"
        ) from error
    if kind == "cuda" and not has_gpu:
        raise InputError(f"device is {name!r}, but torch finds no GPU; use cpu or auto")
    return name
