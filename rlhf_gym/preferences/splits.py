"""Training and held-out comparisons: splits that do not leak between near-duplicate prompts."""

import zlib
from collections.abc import Sequence

from rlhf_gym.data.prompts import Prompt, is_held_out
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import Comparison

# Prompts that share this much of their three-word phrases (Jaccard) count as one prompt in a split.
NEAR_DUPLICATE = 0.7


def split_comparisons(
    comparisons: Sequence[Comparison], held_out: float, *, salt: str = "comparisons"
) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out comparisons; equal and nearly equal prompts are in the same split.

    Args:
        comparisons: N comparisons.
        held_out: Share that is held out.
        salt: Another salt gives another split. The default differs from that of the environments'
            prompts: comparisons collected on training prompts would otherwise all be training
            comparisons.

    Raises:
        InputError: One split is empty.
    """
    keys = prompt_groups([c.prompt for c in comparisons])
    sides = [is_held_out(key, held_out, salt=salt) for key in keys]
    train = [c for c, held in zip(comparisons, sides, strict=True) if not held]
    test = [c for c, held in zip(comparisons, sides, strict=True) if held]
    if not train or not test:
        raise InputError(
            f"{len(comparisons)} comparisons split by prompt into {len(train)} for training and "
            f"{len(test)} held out; both are needed: give more prompts, or another held-out share"
        )
    return train, test


def folds(comparisons: Sequence[Comparison], k: int) -> list[int]:
    """The fold 0 … k − 1 of each comparison; equal and nearly equal prompts are in one fold."""
    keys = prompt_groups([c.prompt for c in comparisons])
    return [zlib.crc32(("fold" + key).encode()) % k for key in keys]


def prompt_groups(prompts: Sequence[Prompt]) -> list[str]:
    """A key for each prompt, equal for prompts that a split must not separate.

    Two prompts belong together if they open with the same human turn (one may be a dialogue that
    quotes an answer to the other), or if they are near-duplicates: `NEAR_DUPLICATE` of their
    three-word phrases in common. MinHash (Broder 1997) proposes near-duplicates; the exact overlap
    decides. Groups are transitive: if a belongs to b and b to c, all three are one group.
    """
    # Slow to import, and only needed here.
    from datasketch import MinHash, MinHashLSH

    keys = [(opening(prompt), _plain(prompt)) for prompt in prompts]
    first: dict[str, str] = {}
    group: dict[str, str] = {}
    phrases: dict[str, set[str]] = {}
    # A lower threshold than the one that decides, so that it misses almost no pair.
    index = MinHashLSH(threshold=0.5, num_perm=128)
    for start, text in sorted(set(keys)):
        words = text.casefold().split()
        phrases[text] = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        group.setdefault(text, text)
        related = {text, first.setdefault(start, text)}
        # Shorter texts are only matched if they are equal: one word is a large part of them.
        if len(phrases[text]) > 3:
            signature = MinHash(num_perm=128, seed=1)
            signature.update_batch([phrase.encode() for phrase in sorted(phrases[text])])
            related |= {
                other
                for other in index.query(signature)
                if len(phrases[text] & phrases[other])
                >= NEAR_DUPLICATE * len(phrases[text] | phrases[other])
            }
            if text not in index:
                index.insert(text, signature)
        roots = {_root(group, one) for one in related}
        for root in roots:
            group[root] = min(roots)
    return [_root(group, text) for _, text in keys]


def opening(prompt: Prompt) -> str:
    """The first human turn of a dialogue; the whole prompt if it is not a dialogue."""
    if isinstance(prompt, str):
        return prompt.split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()
    return next((str(m["content"]) for m in prompt if m["role"] == "user"), _plain(prompt)).strip()


def _root(group: dict[str, str], text: str) -> str:
    while group[text] != text:
        text = group[text]
    return text


def _plain(prompt: Prompt) -> str:
    """A prompt as plain text, whether it is text or chat messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message["content"]) for message in prompt)
