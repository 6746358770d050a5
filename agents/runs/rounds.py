"""Rounds of labelling: how a journey's totals and folders are spread over them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Round:
    """One round of labelling, reward modelling and learning.

    Attributes:
        number: From 1.
        of: How many there are.
        folder: Where its outputs go; the last round's is the run folder.
    """

    number: int
    of: int
    folder: Path

    @property
    def last(self) -> bool:
        """Whether no other follows."""
        return self.number == self.of

    def share(self, total: int) -> int:
        """This round's share of a total."""
        return total * self.number // self.of - total * (self.number - 1) // self.of

    def seed(self, seed: int) -> int:
        """This round's seed: no two rounds draw the same."""
        return seed + 1000 * (self.number - 1)

    def title(self, stage: str) -> str:
        """What is printed as a stage begins."""
        return stage if self.of == 1 else f"round {self.number} of {self.of}, {stage}"


def rounds(run_dir: Path, n: int) -> list[Round]:
    """The n rounds in turn."""
    earlier = [Round(i, n, run_dir / "rounds" / str(i)) for i in range(1, n)]
    return [*earlier, Round(n, n, run_dir)]
