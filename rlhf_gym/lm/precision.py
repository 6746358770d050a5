"""In which precision a model computes: float32, or bfloat16 where that is harmless."""

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
        device: Where the model lies.
        precision: Of its matrix products.
        reuse_casts: Share bfloat16 copies of the weights with other passes within `casts_kept`.
            Off, they are cast anew, so that a weight which has learned since is never met with an
            old copy, whatever context lies around this one.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=reuse_casts)


@contextmanager
def casts_kept(device: torch.device, precision: Precision) -> Iterator[None]:
    """Within, passes with `reuse_casts` cast each weight once; no weight may change meanwhile.

    (Frozen weights are not among those that autocast keeps.)
    """
    if precision == "fp32":
        yield
        return
    torch.clear_autocast_cache()
    # Copies are dropped when the outermost context ends: this one, which itself is off.
    with torch.autocast(device.type, enabled=False):
        yield


def warn_if_emulated(device: torch.device, precision: Precision) -> None:
    """Log one line where bfloat16 is many times slower than float32."""
    if precision == "fp32" or device.type != "cpu":
        return
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "this processor has no bfloat16 products, so that bf16 is emulated and many times "
            "slower than fp32 here"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
