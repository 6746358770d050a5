"""Save what is good in a row: a bad candidate costs the candidate, not the comparison.

Under the models of choice that are fitted here (Luce's axiom), the choice among the remaining
candidates has the same odds with and without the one that is left out. So a label keeps its meaning
if it says something about them: a ranking, scores, votes and pairs do; a single choice does if the
chosen one remains.

Two candidates with one text are one candidate. Their votes add up, and a choice of either is a
choice of the text. If a label puts one of them above the other, it contradicts itself, and says
nothing about this text: both are left out.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_gym.data.prompts import has_half_a_character
from rlhf_gym.preferences.comparison import LABELS
from rlhf_gym.preferences.comparison_rows import is_finite, label_problem, whole_numbers
from rlhf_gym.preferences.dialogues import Row


def repaired(row: Any) -> tuple[Row, list[str]] | None:
    """A row of the project's format without its bad candidates.

    Args:
        row: The row, which need not be a comparison.

    Returns:
        The row and what was done to it; None if there is nothing to repair, fewer than two
        candidates would remain, or the label would be lost. Sampled rows, with token ids, are left
        as they are.
    """
    if not isinstance(row, dict) or row.get("ids") is not None:
        return None
    row = whole_numbers(row)
    candidates = row.get("candidates")
    labels = [name for name in LABELS if row.get(name) is not None]
    if not isinstance(candidates, list | tuple) or len(labels) != 1:
        return None
    name = labels[0]
    label = row[name]
    unscored: list[int] = []
    if name == "scores" and isinstance(label, list | tuple):
        unscored = [i for i, value in enumerate(label) if not is_finite(value)]
    whole = [0 if i in unscored else v for i, v in enumerate(label)] if unscored else label
    if label_problem(name, whole, len(candidates), row.get("ties") or 0):
        return None
    kept, done = _kept(candidates, name, label, unscored)
    if not done or len(kept) < 2:
        return None
    relabelled = _relabelled(name, label, kept)
    if relabelled is None:
        return None
    firsts = [same[0] for same in kept]
    out = {**row, "candidates": [candidates[i] for i in firsts], name: relabelled}
    reasons = row.get("finish_reasons")
    if isinstance(reasons, list | tuple) and len(reasons) == len(candidates):
        out["finish_reasons"] = [reasons[i] for i in firsts]
    return out, done


def _kept(
    candidates: Sequence[Any], name: str, label: Any, unscored: Sequence[int]
) -> tuple[list[list[int]], list[str]]:
    """The candidates that stay, those with one text together, and what is done to the others."""
    done: list[str] = []
    same_text: dict[str, list[int]] = {}
    for i, text in enumerate(candidates):
        if not isinstance(text, str):
            done.append(f"candidate {i} is not a text")
        elif not text.strip():
            done.append(f"candidate {i} is empty")
        elif has_half_a_character(text):
            done.append(f"candidate {i} contains half a character")
        elif i in unscored:
            done.append(f"candidate {i} has no score")
        else:
            same_text.setdefault(text, []).append(i)
    kept: list[list[int]] = []
    for same in same_text.values():
        if len(same) == 1:
            kept.append(same)
        elif _agrees(name, label, same):
            kept.append(same)
            done.append(f"candidates {same[0]} and {same[1]} are the same text, merged")
        else:
            done.append(
                f"candidates {same[0]} and {same[1]} are the same text with different labels, "
                "left out"
            )
    return kept, done


def _agrees(name: str, label: Any, same: Sequence[int]) -> bool:
    """Whether a label puts none of the candidates with one text above another."""
    if name == "scores":
        return len({label[i] for i in same}) == 1
    if name == "ranking":  # one that is not listed was not compared, so it contradicts nothing
        return sum(not set(place).isdisjoint(same) for place in label) <= 1
    if name == "pairs":
        return not any(winner in same and loser in same for winner, loser in label)
    return True  # an annotator had to choose one of them


def _relabelled(name: str, label: Any, kept: Sequence[Sequence[int]]) -> Any:
    """The label of the candidates that stay; None if it says nothing about them."""
    new = {i: n for n, same in enumerate(kept) for i in same}
    if name == "best":
        return new.get(label)  # if the chosen one is lost, nothing is known about the others
    if name == "scores":
        return [label[same[0]] for same in kept]
    if name == "votes":
        return [sum(label[i] for i in same) for same in kept]
    if name == "ranking":
        places = [list(dict.fromkeys(new[i] for i in p if i in new)) for p in label]
        places = [place for place in places if place]
        return places if sum(map(len, places)) > 1 else None
    pairs = [[new[winner], new[loser]] for winner, loser in label if {winner, loser} <= new.keys()]
    return pairs or None
