"""Find words of a dialect that is hard to read, and name the plain ones.

    python .ci/plain_english.py            # all tracked text files
    python .ci/plain_english.py README.md  # these files

Prints `file:line: "what is written" -> the plain words` and exits 1 if it finds any. It reads
Python, Markdown, TOML, shell, HTML and CSS files, prose and code alike. A phrase may span a line
break.
"""

import re
import subprocess
import sys
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRACKED = ("*.py", "*.md", "*.toml", "*.sh", "*.html", "*.css", ".ci/*")

# These two quote the words. ALLOWED is for a (file, phrase in lower case) whose words are right.
QUOTING = {".ci/plain_english.py", "tests/test_plain_english.py"}
ALLOWED: set[tuple[str, str]] = set()

# "Tokens a second" is found by what is counted and by what it is counted per. Many counted things
# are verbs too ("samples a response"): those need a quantity in front of them.
THINGS = (
    r"tokens|episodes|rows|nats|waves|responses|bytes|characters|floats|comparisons|prompts|"
    r"seconds|minutes|epochs|evaluations|iterations|operations|flops?|[mgk]ib|ms"
)
VERBS_TOO = (
    r"samples?|steps?|passes|pass|pairs?|updates?|rewards?|scores?|times|forward|products?|parts|"
    r"penalty|actions?|token|row|line|text|value|array|advantage|episode|response|comparison|"
    r"prefill|prompt|sum|number"
)
NUMBERS = r"one|two|three|four|five|six|eight|ten|sixteen"
QUANTITY = rf"(?:\d[\d,.]*|\w*}}|{NUMBERS}|many|few|several|most|an?)"
UNITS = (
    r"token|row|sequence|update|wave|step|epoch|response|minibatch|micro-batch|prompt|episode|"
    r"comparison|lot|action|byte|character|pass|line|iteration|trial|state|depth"
)
# Not "the responses a prompt has", "tokens a row of their own", "read the row a second time".
PER = (
    rf"an? (?:(?:{UNITS})\b(?! (?:has|had|can|may|must|takes?|needs?|gives?|gets?|is|was|will|"
    r"would|could|ends?|does|implies|holds?|makes?|costs?|allows?|adds?|of (?:its|their)|and)\b)|"
    r"second\b(?! (?:time|one|model|pass|run|process|look|copy|step|round|token|row)\b))"
)
CODE = r"(?:tokenizer|backbone|models?|weights?|parameters|members|files?|these|they|it|that)"
PLACE = (
    r"(?:`|rlhf_gym|agents|scripts|tests|docs|runs|rounds|"
    r"(?:the|its|a) (?:\w+ )?(?:reward|package|module|file|folder)\b)"
)

# What to look for, and what to write instead.
RULES: tuple[tuple[str, str], ...] = (
    (r"\banew\b", "again, from scratch, re-"),
    (r"\bmend(?:s|ed|ing)?\b", "fix"),
    (r"\bbeside\b", "next to, compared with, besides, in addition to"),
    (r"\bso many\b(?! \w+ that\b)", "N, this many; as the name of a column: speed-up"),
    (rf"\b(?:{THINGS}) {PER}", "per (tokens per second)"),
    (rf"(?<!\w){QUANTITY} (?:[\w-]+ )?(?:{VERBS_TOO}) {PER}", "per (one step per token)"),
    (rf"\b(?:steps|pairs|samples) (?=an? (?:second|step|update|epoch|pass)\b){PER}", "per"),
    (rf"\b(?:{NUMBERS}|\d+) {PER}", "per (four per epoch)"),
    (rf"\b(?:times as long|(?<!each )(?<!every )(?<!first )time) {PER}", "per (time per token)"),
    (r"\b(?:can|cannot|may|not|which|that|what|they|it|still) serves?\b", "works, is used"),
    (r"\bserves? (?:where|if|with|all|others|for|below|exactly)\b", "works if, is used for"),
    (r"\bone'?s own\b", "its own, your own"),
    (
        r"\bone of (?:its|their|his|her|your) own\b(?! (?!that|which|for|with|and|or|in|if)[a-z])",
        "its own, a separate",
    ),
    (r"\bbears?\b(?! (?:in mind|out)\b)", "has, carries, gets"),
    (rf"\b{CODE} (?:still )?lies?\b(?! (?:between|within)\b)", "is, is in"),
    (rf"\blies? (?:in|at|under|with|around) {PLACE}", "is in"),
    (
        r"(?<!as it )(?<!as they )\b(?:stands?|stood)\b"
        r"(?![-\w]| (?:for|in for|out|alone|still|by itself)\b)",
        "is, is in, stays",
    ),
)
COMPILED = [(re.compile(pattern, re.IGNORECASE), plain) for pattern, plain in RULES]


def findings(text: str, name: str = "") -> Iterator[tuple[int, str, str]]:
    """(line, what is written, what to write) of each hit, in the order of the text."""
    # A phrase may go on in the next line, behind the mark of a comment or a quotation.
    lines = [line.strip().lstrip("#>").lstrip() for line in text.split("\n")]
    starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
    flat, found = " ".join(lines), []
    for pattern, plain in COMPILED:
        for hit in pattern.finditer(flat):
            known = any(start < hit.end() and hit.start() < end for start, end, _ in found)
            if not known and (name, hit[0].lower()) not in ALLOWED:
                found.append((*hit.span(), plain))
    for start, end, plain in sorted(found):
        yield bisect(starts, start), flat[start:end], plain


def main(names: list[str]) -> int:
    """Print the findings in these files, or in all tracked ones; 1 if there are any."""
    if not names:
        command = ["git", "ls-files", *TRACKED]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = listed.stdout.splitlines()
    count = 0
    for name in names:
        if name not in QUOTING and (ROOT / name).is_file():
            for line, words, plain in findings((ROOT / name).read_text(encoding="utf-8"), name):
                print(f'{name}:{line}: "{words}" -> {plain}')
                count += 1
    print(f"{count} phrases to write in plain English" if count else "plain English")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
