"""NaN and infinity stop a run before they reach the weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.tokens import PAD, Sequences, row_sums
from rlhf_gym.utils.files import own_memory, whole_folder


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity, found before it reached the weights.

    Attributes:
        what: Name of the quantity that is not finite.
        sequences: The responses in question.
        quantities: Known quantities of their tokens, (M,) each.
    """

    def __init__(self, what: str, sequences: Sequences, quantities: Mapping[str, Tensor]) -> None:
        self.what, self.sequences, self.quantities = what, sequences, dict(quantities)
        bad = {k: int((~torch.isfinite(v)).sum()) for k, v in self.quantities.items()}
        counts = ", ".join(f"{n} of {name}" for name, n in bad.items() if n) or "none of its inputs"
        super().__init__(f"{what} is not finite (not finite among the batch: {counts})")

    def rows(self) -> list[int]:
        """The responses that hold something that is not finite."""
        bad = torch.zeros(int(self.sequences.lengths.sum()), device=self.sequences.tokens.device)
        for values in self.quantities.values():
            bad += (~torch.isfinite(values)).float()
        return row_sums(bad, self.sequences.lengths).nonzero().flatten().tolist()

    def dump(self, folder: Path, lm: CausalLM) -> Path:
        """Write the batch, as batch.safetensors, and its texts, as texts.json."""
        sequences = self.sequences.to("cpu")
        tensors = dict(zip(("tokens", "starts", "lengths"), sequences, strict=True))
        tensors |= self.quantities
        rows = [[i for i in row if i != PAD] for row in sequences.tokens.tolist()]
        with whole_folder(folder) as partial:
            save_file(own_memory(tensors), partial / "batch.safetensors")
            (partial / "texts.json").write_text(
                json.dumps(
                    {"what": str(self), "rows": self.rows(), "texts": lm.texts(rows)}, indent=2
                )
            )
        return folder


def check_finite(what: str, checked: Tensor, sequences: Sequences, /, **quantities: Tensor) -> None:
    """Raise if a quantity of a batch is not finite.

    Args:
        what: Its name.
        checked: The quantity, of any shape.
        sequences: The batch.
        **quantities: Known quantities of its M tokens, for the dump.

    Raises:
        NonFiniteError: It holds a NaN or an infinity.
    """
    if not torch.isfinite(checked).all():
        raise NonFiniteError(what, sequences, quantities)
