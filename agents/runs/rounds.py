"""Rounds of labelling: the share of the totals, the seed and the folder of each."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Round:
    """One round of labelling, reward modelling and learning.

    Attributes:
        number: Number of this round, from 1.
        of: Number of rounds in all.
        folder: Folder of its outputs. For the last round this is the run folder, so that one round
            and many leave the final policy in the same place.
    """

    number: int
    of: int
    folder: Path

    @property
    def last(self) -> bool:
        """Whether this is the last round."""
        return self.number == self.of

    def share(self, total: int) -> int:
        """Return this round's share of a total. The shares of all rounds add up to the total."""
        return total * self.number // self.of - total * (self.number - 1) // self.of

    def seed(self, seed: int) -> int:
        """Return this round's seed. Rounds have different seeds, so their samples differ."""
        return seed + 1000 * (self.number - 1)

    def title(self, stage: str) -> str:
        """Return the line to print when a stage begins."""
        return stage if self.of == 1 else f"round {self.number} of {self.of}, {stage}"


def rounds(run_dir: Path, n: int) -> list[Round]:
    """Return the n rounds in order."""
    earlier = [Round(i, n, run_dir / "rounds" / str(i)) for i in range(1, n)]
    return [*earlier, Round(n, n, run_dir)]
