"""Whether a faster way to compute a model's states is exact for it: try it on a few tokens.

What a config says is not enough: an architecture may keep other state, read positions from a
mask, or refuse an input. So each fast path is tried once per model, against a plain pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def agrees(
    model: PreTrainedModel,
    fast: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    tolerance: float = 1e-3,
) -> bool:
    """Whether a fast way gives the numbers of a plain one; False if the model cannot go that way.

    Args:
        model: The model that both use; it is in eval mode meanwhile.
        fast: Computes hidden states in the way that is tried.
        plain: Computes the same states by a full pass.
        tolerance: Relative to the largest state.
    """
    training = model.training
    model.eval()  # dropout would make the two ways differ
    try:
        found = fast()
    except torch.OutOfMemoryError:
        raise  # says nothing about the model
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        # What transformers' model code raises on a cache or an input that it does not know.
        return False
    else:
        whole = plain()
    finally:
        model.train(training)
    return torch.allclose(found, whole, atol=tolerance * float(whole.abs().max()), rtol=tolerance)
