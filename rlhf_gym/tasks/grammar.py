"""A grammar of short film reviews with a hidden attitude.

The tables below form a context-free grammar, with ``|`` between alternatives; an alternative that
is listed twice is twice as likely. A slot ``{name}`` expands to an alternative of the table
``name``. Most opinions come in two mirrored tables, ``pos_name`` and ``neg_name``, built from one
text in which ``{+x}`` has the polarity of the table and ``{-x}`` the opposite one. While a review
is written, ``{op:name}`` chooses between the two by the attitude of the review, and ``{same:name}``
and ``{other:name}`` agree or disagree with the last choice.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

MIN_TOKENS = 24
MAX_TOKENS = 44

_Rules = dict[str, tuple[str, ...]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split("|"))


def _mirrored(name: str, text: str) -> _Rules:
    positive = text.replace("{+", "{pos_").replace("{-", "{neg_")
    negative = text.replace("{+", "{neg_").replace("{-", "{pos_")
    return {f"pos_{name}": _phrases(positive), f"neg_{name}": _phrases(negative)}


_DEGREES: _Rules = {
    "very": _words("very really so extremely utterly quite incredibly totally particularly deeply"),
    "slightly": _phrases("slightly|somewhat|barely|kind of|partly|sort of|hardly|almost|a little"),
    "not": _words("not not never rarely seldom"),
    "plain": _words(
        "long short quiet simple modern strange dark ordinary slow loud familiar small"
    ),
}

_ATTITUDES: _Rules = {
    "pos_adj": _words(
        "good great excellent wonderful brilliant charming funny clever lovely beautiful fantastic "
        "superb amazing impressive enjoyable delightful strong smart warm perfect fascinating "
        "interesting entertaining powerful elegant sweet hilarious satisfying thrilling exciting "
        "original engaging bold sincere honest memorable gripping fresh believable moving"
    ),
    "neg_adj": _words(
        "bad awful terrible horrible boring dull weak poor stupid lame annoying ugly painful messy "
        "disappointing ridiculous pathetic confusing pointless dreadful mediocre irritating lazy "
        "pretentious empty tired depressing tragic unconvincing predictable tedious clumsy flat "
        "shallow forgettable bland"
    ),
    "pos_better": _words("better finer smarter funnier"),
    "neg_better": _words("worse weaker duller poorer"),
    "pos_best": _words("best finest greatest strongest"),
    "neg_best": _words("worst weakest dullest poorest"),
    "pos_love": _phrases("love|like|enjoy|admire|appreciate|care for"),
    "neg_love": _words("hate dislike mind resent regret"),
    "pos_loved": _words("loved liked enjoyed adored admired appreciated"),
    "neg_loved": _words("hated disliked resented despised regretted"),
    "pos_pleased": _words("impressed amused surprised moved charmed convinced thrilled delighted"),
    "neg_pleased": _words("bored annoyed disappointed confused irritated offended distracted"),
    "pos_joy": _words("joy pleasure delight treat triumph success surprise masterpiece winner"),
    "neg_joy": _words("mess disaster failure waste bore disappointment shame chore problem joke"),
    "pos_smile": _phrases("smile|laugh|grin|feel happy|feel alive|forget the time"),
    "neg_smile": _phrases("angry|sad|sleepy|miserable|nervous|want to leave|check the time"),
    "charm": _words("charm humor passion energy beauty wit grace hope heart talent"),
    "fault": _phrases("problem with|trouble with|doubts about|complaints about|fears about"),
}

_FILM: _Rules = {
    "aspect": _phrases(
        "plot|story|acting|music|dialogue|ending|script|camera work|direction|pacing|editing|cast|"
        "villain|humor|soundtrack|lead actor|lead actress|opening scene|photography|lighting|"
        "atmosphere|premise|final act|second half|first half|love story|sound design|title song|"
        "twist|finale|narration|main character|romance|director|production"
    ),
    "aspects": _phrases(
        "costumes|characters|jokes|special effects|songs|action scenes|fight scenes|performances|"
        "dance numbers|visuals|sets|child actors|chase scenes|flashbacks|minor roles|stunts"
    ),
    "np": ("the {aspect}", "the {aspect}", "the {aspects}"),
    "np_was": ("the {aspect} was", "the {aspect} was", "the {aspects} were"),
    "np_wasnt": ("the {aspect} wasn't", "the {aspects} weren't", "{np} didn't seem"),
    "np_felt": ("{np} felt", "{np} seemed", "{np} looked"),
    "star": _phrases("lead actor|young actress|villain|star|old comedian|young singer"),
    "film": _words("film movie picture"),
    "genre": _words(
        "film movie picture comedy drama thriller western musical mystery documentary sequel "
        "remake cartoon"
    ),
    "book": _phrases("book|novel|first film|trailer|original|stage play|old series|sequel"),
}

# A claim is only about the film, so that it can be reported ("my sister said ..."); a clause may
# also be about the writer.
_OPINIONS: _Rules = (
    _mirrored(
        "praise",
        "{+adj} | {+adj} | {very} {+adj} | {very} {+adj} | {slightly} {+adj} |"
        "{+adj} and {plain} | {plain} and {very} {+adj} | {not} {-adj} | {not} {-adj} |"
        "{not} {very} {-adj} | never {-adj} or {-adj} | {very} {+adj}, never {-adj} |"
        "{+better} than the {book} | {not} {-better} than the {book} |"
        "{not} as {-adj} as the {book} | as {+adj} as my {sister} said",
    )
    | _mirrored(
        "claim",
        "{np_was} {+praise} | {np_was} {+praise} | {np_was} {+praise} | {np_was} {+praise} |"
        "{np_felt} {+adj} | {np_felt} {very} {+adj} | {np_wasnt} {-adj} |"
        "{np_wasnt} {very} {-adj} | the {aspect} was a {+joy} | the {aspect} was never a {-joy} |"
        "the {star} gave a {+adj} performance | the {star} was {+adj} in a {plain} role |"
        "the {+best} part was the {aspect} | the {aspect} was the least {-adj} part |"
        "there was nothing {-adj} about {np} | there was no {-adj} scene",
    )
    | _mirrored(
        "clause",
        "{+claim} | {+claim} | {+claim} | {+claim} | {+claim} | i {+loved} {np} |"
        "i really {+loved} {np} | i didn't {-love} {np} | i was {+pleased} by {np} |"
        "{np} never {-pleased} me | {np} made me {+smile} | {+remark}",
    )
    | _mirrored(
        "first", "this {genre} is {very} {+adj}. | this {genre} about {topic} is {not} {-adj}."
    )
    | {
        "pos_remark": ("i had no {fault} {np}", "it had {charm} and {charm}"),
        "neg_remark": ("i found no {charm} in {np}", "it went on without {charm} or {charm}"),
        "pos_aside": _phrases("at least|luckily,|to my surprise,|thankfully,|as always,"),
        "neg_aside": _phrases("sadly,|to be fair,|as always,|unfortunately,|to my surprise,"),
        "view": _phrases("i thought|for me,|i felt that|in my view,|i would say|you could say"),
        "later": _phrases("in the end,|after an hour,|at first,|in the last scenes,|as a whole,"),
    }
)

_PLOT: _Rules = {
    "sister": _words("sister brother mother father wife husband cousin neighbor daughter son aunt"),
    "rainy": _words("rainy cold mild quiet windy long late boring"),
    "evening": _words("evening night afternoon sunday morning weekend"),
    "when": _phrases("last week|last night|yesterday|on friday|in may|on a train|on my birthday"),
    "young": _words("young old lonely busy shy quiet retired nervous tall foreign famous former"),
    "hero": _words(
        "detective teacher soldier farmer nurse thief painter pilot widow singer barber lawyer "
        "student doctor sailor cook ghost boxer prince orphan waiter writer judge"
    ),
    "small": _words("small quiet old dark cold distant foreign northern snowy modern crowded"),
    "town": _words("town village city castle hospital prison school desert harbor forest palace"),
    "goes": _phrases("moves to|returns to|hides in|is sent to|grew up in|travels to|works in"),
    "meets": _words("meets follows marries hunts helps saves betrays visits finds"),
    "topic": _words("love war family money music friendship work memory travel food time power"),
    "storm": _words("storm wedding funeral robbery war murder trial flood party journey reunion"),
    "chose": _words("chose found borrowed rented ordered suggested picked"),
    "heard": _phrases("heard a lot|read a little|known nothing|heard jokes|talked|been told"),
    "plot": _phrases(
        "it follows a {young} {hero} in a {town}. | a {young} {hero} {meets} a {hero}. |"
        "it is about {topic} and {topic}. | the {hero} {meets} a {young} {hero}. |"
        "then the {hero} {goes} the {town}. | most of it takes place in a {town}. |"
        "it begins after a {storm}."
    ),
    "open": _phrases(
        "i watched this {genre} on a {rainy} {evening}. | i saw it with my {sister} {when}. |"
        "i saw this {genre} {when}. | we went to see this {genre} {when}. |"
        "my {sister} and i saw this {genre}. | my {sister} {chose} this {genre} {when}. |"
        "i had {heard} about this {genre}. | this is a {genre} about a {young} {hero}. |"
        "this {plain} {genre} is about {topic}. | the {genre} tells of a {hero} and a {hero}. |"
        "the story follows a {young} {hero}. | a {young} {hero} {goes} a {small} {town}. |"
        "set in a {small} {town}, this {genre} is about {topic}. |"
        "after a {storm}, a {hero} {meets} a {hero}. |"
        "the {film} opens with a {storm} in a {town}. |"
        "when a {hero} {meets} a {hero}, a {storm} begins. |"
        "one {evening} a {young} {hero} {meets} a {hero}. | {op:first}"
    ),
}

_SENTENCES: _Rules = {
    "end": (".", ".", ".", "!"),
    "short": ("{op:clause}{end}",),
    "brief": _phrases(
        "{short} | {short} | {view} {op:claim}{end} | {later} {op:clause}{end} |"
        "{op:aside} {same:claim}{end}"
    ),
    "opinion": _phrases(
        "{op:clause} and {same:claim}{end} | {op:aside} {same:claim} and {same:claim}. |"
        "{op:clause}, but {other:clause}{end} | {op:clause}, but {other:clause}. |"
        "although {op:clause}, {other:clause}. | {op:clause}, even though {other:clause}. |"
        "{op:clause} while {other:claim}. | my {sister} said {op:claim}, but {other:clause}. |"
        "{brief}"
    ),
    "pos_verdict": _phrases(
        "i would recommend it to your {sister}{end} | i would watch it again{end} |"
        "you will not {neg_love} it{end} | it is worth your time{end} | do not miss it! |"
        "it is not a {neg_joy}{end} | i left the cinema {very} happy. |"
        "what a {pos_adj} {film}! | few films are this {pos_adj}{end}"
    ),
    "neg_verdict": _phrases(
        "i would not recommend it to your {sister}{end} | i would never watch it again{end} |"
        "you will not {pos_love} it{end} | it is not worth your time{end} |"
        "it is a waste of your {evening}{end} | it is not a {pos_joy}{end} |"
        "i left the cinema {very} angry. | what a {neg_adj} {film}! |"
        "few films are this {neg_adj}{end}"
    ),
    "mixed": _phrases(
        "see it for the {aspect}, not for the {aspect}. | it is fine for a {rainy} {evening}. |"
        "some will {pos_love} it and others will {neg_love} it. |"
        "i did not {pos_love} it, but i did not {neg_love} it. |"
        "it is {plain}, neither {pos_adj} nor {neg_adj}. |"
        "the {book} was less {pos_adj} but also less {neg_adj}."
    ),
    "close": ("{op:verdict}", "{op:verdict}", "{mixed}"),
    "review": _phrases(
        "{open} {opinion} {brief} | {open} {brief} {opinion} | {open} {opinion} {close} |"
        "{open} {opinion} {close} | {open} {brief} {brief} | {open} {opinion} {opinion} |"
        "{open} {brief} {brief} {close} | {open} {short} {short} {brief} |"
        "{open} {plot} {brief} {close} | {open} {plot} {short} {brief} |"
        "{open} {short} {short} {short} {close} | {open} {plot} {short} {short} {close}"
    ),
}

_RULES: _Rules = _DEGREES | _ATTITUDES | _FILM | _OPINIONS | _PLOT | _SENTENCES

_SLOT = re.compile(r"\{([a-z_:]+)\}")
_TOKEN = re.compile(r"[a-z']+|[.,!]")
_ARTICLE = re.compile(r"\ba (?=[aeiou]|hon)")

# Each alternative is split into literal text (even places) and slot names (odd places).
_SHAPES = {name: tuple(tuple(_SLOT.split(alt)) for alt in alts) for name, alts in _RULES.items()}


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    # One block is enough for a review: a call into numpy per choice would dominate the run time.
    while True:
        yield from rng.random(80).tolist()


class _Writer:
    """The state of a review being written: its attitude and the phrases used so far."""

    def __init__(self, draws: Iterator[float]) -> None:
        self._draws = draws
        self._favour = next(draws)
        self._positive = True
        self._used: set[tuple[str, ...]] = set()

    def write(self, name: str) -> str:
        """Expand one table, or one polarity slot, into text."""
        if ":" in name:
            name = self._polar(name)
        shapes = _SHAPES[name]
        size = len(shapes)
        shape = shapes[int(next(self._draws) * size)]
        # Two more tries make repetitions rare, but leave every derivation possible.
        for _ in range(2):
            if shape not in self._used:
                break
            shape = shapes[int(next(self._draws) * size)]
        self._used.add(shape)
        if len(shape) == 1:
            return shape[0]
        parts = list(shape)
        parts[1::2] = [self.write(slot) for slot in shape[1::2]]
        return "".join(parts)

    def _polar(self, slot: str) -> str:
        relation, name = slot.split(":")
        if relation == "op":
            self._positive = next(self._draws) < self._favour
        elif relation == "other":
            self._positive = not self._positive
        return ("pos_" if self._positive else "neg_") + name


def sample_review(rng: np.random.Generator) -> str:
    """Draw one review.

    Args:
        rng: The only source of randomness; equal generator states give equal reviews.

    Returns:
        Three to five lowercase sentences on one line, with ``MIN_TOKENS`` to ``MAX_TOKENS`` tokens.
    """
    draws = _uniforms(rng)
    while True:
        review = _ARTICLE.sub("an ", _Writer(draws).write("review"))
        if MIN_TOKENS <= len(_TOKEN.findall(review)) <= MAX_TOKENS:
            return review


def vocabulary() -> list[str]:
    """List the distinct tokens of the grammar.

    Returns:
        The sorted words and punctuation marks that a review can contain.
    """
    literals = (part for shapes in _SHAPES.values() for shape in shapes for part in shape[::2])
    return sorted({"an"}.union(*map(_TOKEN.findall, literals)))


@functools.cache
def _distinct_by_length(slot: str) -> Mapping[int, int]:
    """Bound the number of different texts of a slot from below, for each length in tokens.

    Texts of one shape whose slots have fixed lengths differ whenever a slot differs, so their
    numbers multiply. Different shapes might share a text, so the largest number is taken over
    them and not the sum. Polarity slots count for one fixed choice of signs.
    """
    relation, _, name = slot.rpartition(":")
    if relation:
        name = ("neg_" if relation == "other" else "pos_") + name
    shapes = set(_SHAPES[name])
    best = Counter(len(_TOKEN.findall(shape[0])) for shape in shapes if len(shape) == 1)
    for shape in shapes:
        if len(shape) == 1:
            continue
        counts = {sum(len(_TOKEN.findall(part)) for part in shape[::2]): 1}
        for inner in shape[1::2]:
            longer: dict[int, int] = {}
            for length, count in counts.items():
                for extra, choices in _distinct_by_length(inner).items():
                    total = length + extra
                    longer[total] = max(longer.get(total, 0), count * choices)
            counts = longer
        best |= Counter(counts)
    return best


def count_reviews_lower_bound() -> int:
    """Bound the number of different reviews from below.

    Returns:
        The number of reviews with the most productive outline, which is a product of table sizes.
    """
    counts = _distinct_by_length("review")
    return max(count for length, count in counts.items() if MIN_TOKENS <= length <= MAX_TOKENS)
