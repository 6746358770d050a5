"""The precision in which a model computes: float32, or bfloat16 where that is harmless."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
"""Weights are float32 in both; "bf16" multiplies matrices in bfloat16, by autocast."""


def autocast(
    device: torch.device, precision: Precision, *, reuse_casts: bool = False
) -> AbstractContextManager[object]:
    """The context of a forward pass.

    Args:
        device: The model's device.
        precision: Precision of its matrix products.
        reuse_casts: Share bfloat16 copies of the weights with other passes inside `casts_kept`. If
            False, weights are cast again in every pass, so an updated weight is never read from a
            stale copy.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=reuse_casts)


@contextmanager
def casts_kept(device: torch.device, precision: Precision) -> Iterator[None]:
    """Inside this context, passes with `reuse_casts` cast each weight once; none may change.

    Autocast only keeps copies of weights that require a gradient, so frozen ones are cast
    each time.
    """
    if precision == "fp32":
        yield
        return
    torch.clear_autocast_cache()
    # Autocast drops its copies when the outermost context ends. This context is the outermost one,
    # and disabled so that it changes nothing else.
    with torch.autocast(device.type, enabled=False):
        yield


def warn_if_emulated(device: torch.device, precision: Precision) -> None:
    """Log one line if bfloat16 is emulated, which is many times slower than float32."""
    if precision == "fp32" or device.type != "cpu":
        return
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "this processor has no bfloat16 products; bf16 is emulated and many times slower than "
            "fp32 here"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision converted to float32; float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
