"""Where models lie."""

import torch

from rlhf_gym.errors import InputError


def resolve_device(name: str) -> str:
    """The device named; "auto" is the GPU where there is one.

    Raises:
        InputError: torch knows no such device, or a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InputError(
            f"device {name!r} is none that torch knows; use auto, cpu, cuda"
        ) from error
    if kind == "cuda" and not has_gpu:
        raise InputError(f"device {name!r}, but torch finds no GPU here; use cpu or auto")
    return name
