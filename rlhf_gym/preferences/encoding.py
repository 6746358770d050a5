"""Comparisons made ready for training: token ids, lengths that fit, and splits that do not leak."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf_gym.data.prompts import Prompt, is_held_out
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import embedded
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.likelihood import Choice
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import pad_rows

# Prompts that share this much of their three-word phrases (Jaccard) are one prompt to a split.
NEAR_DUPLICATE = 0.7

TooLong = Literal["drop", "cut_turns"]


@dataclass(frozen=True)
class EncodedComparison:
    """A comparison as token ids.

    Attributes:
        prompt: Ids of the prompt.
        candidates: Ids of each of K candidates.
        choices: What its label consists of (see `rlhf_gym.preferences.likelihood`).
        comparison: Where it comes from.
    """

    prompt: list[int]
    candidates: list[list[int]]
    choices: list[Choice]
    comparison: Comparison

    @property
    def width(self) -> int:
        """Tokens of the prompt and the longest candidate."""
        return len(self.prompt) + max(map(len, self.candidates))

    @property
    def rows(self) -> list[list[int]]:
        """Ids of prompt and candidate, for each candidate."""
        return [[*self.prompt, *candidate] for candidate in self.candidates]


@dataclass
class Fit:
    """How many comparisons fitted a model's context, and how.

    Attributes:
        whole: Fitted as they are.
        cut: Lost turns at the front of their dialogue.
        dropped: Did not fit at all.
        anew: Of all, how many had token ids of another tokenizer, so that their text was read.
    """

    whole: int = 0
    cut: int = 0
    dropped: int = 0
    anew: int = 0

    def __str__(self) -> str:
        fitted = f"{self.whole} whole, {self.cut} cut by turns, {self.dropped} dropped as too long"
        return f"{fitted}, {self.anew} read anew as text" if self.anew else fitted

    def __add__(self, other: "Fit") -> "Fit":
        return Fit(
            self.whole + other.whole,
            self.cut + other.cut,
            self.dropped + other.dropped,
            self.anew + other.anew,
        )


def encode_comparisons(
    comparisons: Sequence[Comparison],
    model: RewardModel,
    max_tokens: int | None,
    *,
    too_long: TooLong = "drop",
    soft_temperature: float | None = None,
) -> tuple[list[EncodedComparison], Fit]:
    """Tokenise comparisons, and count what became of the ones above `max_tokens`.

    Args:
        comparisons: N comparisons.
        model: Whose tokenizer reads them.
        max_tokens: Longest prompt + candidate; None for any.
        too_long: "drop", or "cut_turns": whole turns go from the dialogue's front, for all its
            candidates alike, until the longest one fits; what has one turn only is dropped.
        soft_temperature: As in `Comparison.choices`.

    Raises:
        InputError: None is left, or the tokenizer has ids that the model cannot embed.
    """
    encoded: list[EncodedComparison] = []
    fit = Fit()
    vocab = embedded(model.model)
    for i, comparison in enumerate(comparisons, 1):
        one: Comparison | None = comparison
        if comparison.ids is not None and not _speaks(comparison, model):
            one = comparison = replace(comparison, ids=None)
            fit.anew += 1
        while one is not None:
            prompt, candidates = _ids(one, model)
            if not max_tokens or len(prompt) + max(map(len, candidates)) <= max_tokens:
                break
            one = one.shortened() if too_long == "cut_turns" else None
        if one is None:
            fit.dropped += 1
            continue
        highest = max(max(row, default=0) for row in [prompt, *candidates])
        if highest >= vocab:
            raise InputError(
                f"comparison {i} has token ids up to {highest}, but the reward model embeds "
                f"{vocab}; its tokenizer belongs to another model"
            )
        fit.whole += one is comparison
        fit.cut += one is not comparison
        choices = one.choices(soft_temperature)
        encoded.append(EncodedComparison(prompt, candidates, choices, one))
    if not comparisons:
        raise InputError("there are no comparisons to encode")
    if not encoded:
        raise InputError(
            f"all {len(comparisons)} comparisons exceed max_tokens = {max_tokens}; raise it, or "
            "cut their dialogues by turns"
        )
    return encoded, fit


def _ids(comparison: Comparison, model: RewardModel) -> tuple[list[int], list[list[int]]]:
    """Token ids as the model will read them when it is the reward."""
    if model.causal:
        return comparison.encode(model.tokenizer)
    if comparison.ids is not None:
        return [], [[*comparison.ids[0], *row] for row in comparison.ids[1]]
    return [], [model.encode(comparison.prompt, c) for c in comparison.candidates]


def _speaks(comparison: Comparison, model: RewardModel) -> bool:
    """Whether a comparison's token ids are those of the model's tokenizer.

    They are if they say its texts; spaces aside, which tokenizers treat in many ways at a border.
    """
    assert comparison.ids is not None
    prompt, candidates = comparison.ids
    named = list(zip(candidates, comparison.candidates, strict=True))
    if isinstance(comparison.prompt, str):  # a chat's roles may be special tokens
        named.append((prompt, comparison.prompt))
    vocab = embedded(model.model)
    for ids, text in named:
        if max(ids, default=0) >= vocab:
            return False
        # A text may name its special tokens.
        said = {
            str(model.tokenizer.decode(list(ids), skip_special_tokens=s)) for s in (True, False)
        }
        if "".join(text.split()) not in {"".join(one.split()) for one in said}:
            return False
    return True


def candidate_rows(comparisons: Sequence[EncodedComparison], at_most: int | None = None) -> Tensor:
    """Prompt + candidate rows (B, L), all, or about `at_most` from evenly spaced comparisons."""
    each = sum(len(c.candidates) for c in comparisons) / len(comparisons)
    step = 1 if at_most is None else max(1, int(len(comparisons) * each / at_most))
    return torch.from_numpy(pad_rows([row for c in comparisons[::step] for row in c.rows]))


def split_comparisons(
    comparisons: Sequence[Comparison], held_out: float, *, salt: str = "comparisons"
) -> tuple[list[Comparison], list[Comparison]]:
    """Training and held-out comparisons; equal and nearly equal prompts are on one side.

    Args:
        comparisons: N comparisons.
        held_out: Share that is held out.
        salt: Another salt makes another split. None is shared with the environments' prompts, so
            that comparisons collected on training prompts split too.

    Raises:
        InputError: One side is empty.
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
    """A key for each prompt, the same for prompts that a split must not separate.

    Those are prompts that open with the same human turn (a dialogue and its continuation, in which
    an answer of the one is quoted by the other), and near-duplicates: `NEAR_DUPLICATE` of their
    three-word phrases in common, proposed by MinHash and decided exactly. Groups are closed: where
    a belongs to b and b to c, all three are one.
    """
    # Slow to import, and of use to training alone.
    from datasketch import MinHash, MinHashLSH

    keys = [(opening(prompt), _plain(prompt)) for prompt in prompts]
    first: dict[str, str] = {}
    group: dict[str, str] = {}
    phrases: dict[str, set[str]] = {}
    # More permissive than what decides, so that it misses almost none.
    index = MinHashLSH(threshold=0.5, num_perm=128)
    for start, text in sorted(set(keys)):
        words = text.casefold().split()
        phrases[text] = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        group.setdefault(text, text)
        kin = {text, first.setdefault(start, text)}
        # So few phrases reach the threshold only where all of them are the same.
        if len(phrases[text]) > 3:
            signature = MinHash(num_perm=128, seed=1)
            signature.update_batch([phrase.encode() for phrase in sorted(phrases[text])])
            kin |= {
                other
                for other in index.query(signature)
                if len(phrases[text] & phrases[other])
                >= NEAR_DUPLICATE * len(phrases[text] | phrases[other])
            }
            if text not in index:
                index.insert(text, signature)
        roots = {_root(group, one) for one in kin}
        for root in roots:
            group[root] = min(roots)
    return [_root(group, text) for _, text in keys]


def opening(prompt: Prompt) -> str:
    """The first human turn of a dialogue; the whole of a prompt that is none."""
    if isinstance(prompt, str):
        return prompt.split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()
    return next((str(m["content"]) for m in prompt if m["role"] == "user"), _plain(prompt)).strip()


def _root(group: dict[str, str], text: str) -> str:
    while group[text] != text:
        text = group[text]
    return text


def _plain(prompt: Prompt) -> str:
    """A prompt's words, whether it is text or chat messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message["content"]) for message in prompt)
