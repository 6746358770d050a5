"""The report of a run: whole in one file, harmless, and complete as far as the folder goes."""

import ast
import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from rich.console import Console

from agents.cli import report
from rlhf_gym.errors import InputError
from rlhf_gym.reports import charts, run_charts, run_files, run_page, terminal
from rlhf_gym.reports.comparison_page import page as comparison_page
from rlhf_gym.reports.display import clean, show
from rlhf_gym.reports.pages import ENVIRONMENT, render
from rlhf_gym.reports.reward_model_page import page as reward_model_page

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "report.py"
EVIL = '<script>alert("$x_1$")</script>&amp; [bold]a[/bold] \x1b[31m\x00 \ud800 \u202e …'
PNG = b"\x89PNG\r\n\x1a\n"


def figure(value: float, se: float = 0.0123, n: int = 48) -> dict[str, float]:
    return {"value": value, "se": se, "n": n}


def interval(value: float) -> dict[str, float]:
    return {**figure(value, 0.021), "low": value - 0.04, "high": value + 0.04}


def make_summary() -> dict[str, Any]:
    return {
        "env_id": "rlhf_gym/Reviews-v0",
        "algorithm": "ppo",
        "seed": 1,
        "episodes": 20480,
        "tokens": 614400,
        "seconds": 754.3,
        "tokens_per_second": 814.5,
        "score_before": figure(0.2114),
        "score_after": figure(2.314, 0.041),
        "gold_before": figure(0.102),
        "gold_after": figure(0.813),
        "kl": figure(6.41, 0.22),
        "objective_before": figure(0.2114),
        "objective_after": figure(1.673, 0.035),
        "objective_optimum": figure(1.981, 0.028),
        "optimality": interval(0.826),
        "hashes": {"reference": "ab" * 32, "reward_model": "cd" * 32, "data": EVIL},
        "versions": {"python": "3.11.2", "torch": "2.11.0", "git": {"commit": "0123abc"}},
    }


def make_evaluation() -> dict[str, Any]:
    summary = make_summary()
    shared = ("score", "gold", "objective")
    pairs = {f"{name}_{at}": summary[f"{name}_{at}"] for name in shared for at in PAIR}
    more = {
        "length": (30.1, 26.3),
        "stopped": (0.02, 0.91),
        "ref_perplexity": (21.4, 18.9),
        "distinct_1": (0.41, 0.32),
        "novelty": (0.31, 0.42),
    }
    for name, values in more.items():
        pairs |= {f"{name}_{at}": figure(x) for at, x in zip(PAIR, values, strict=True)}
    return {
        **pairs,
        "kl": summary["kl"],
        "kl_per_token": figure(0.21),
        "win_rate_score": figure(0.93),
        "win_rate_gold": figure(0.81),
        "objective_optimum": summary["objective_optimum"],
        "optimality": summary["optimality"],
        "optimum": {
            "ess": figure(51.2),
            "kl": figure(7.12),
            "score": figure(2.69),
            "samples": 192,
        },
        "best_of_n_optimality": {"4": interval(0.41), "16": interval(0.52)},
    }


PAIR = ("before", "after")
SAMPLE = {
    "prompt": "The film was",
    "reference": " about a man who",
    "policy": " a joy from start to end.",
    "reference_score": 0.1234,
    "policy_score": 2.5,
    "reference_gold": 0.25,
    "policy_gold": 0.75,
}
REWARD_MODEL = {
    "accuracy": figure(0.742),
    "nll": figure(0.521),
    "accuracy_longest": figure(0.513),
    "accuracy_chance": figure(0.5, 0.0),
    "comparisons": 4000,
    "held_out": 400,
}


def make_metrics(updates: int) -> str:
    rng = np.random.default_rng(0)
    progress = np.linspace(0, 1, updates)
    kl = 6.4 * progress + 0.05 * rng.random(updates)
    score = 0.2 + 2.1 * np.sqrt(progress) + 0.1 * rng.normal(size=updates)
    columns = {
        "tokens": 7680.0 * np.arange(1, updates + 1),
        "rollout/score": score,
        "rollout/kl_per_sequence": kl,
        "rollout/objective": score - 0.1 * kl,
        "rollout/length": 30 - 4 * progress,
        "rollout/stopped": 0.9 * progress,
        "train/clip_fraction": 0.1 * progress,
        "train/explained_variance": np.full(updates, np.nan),
    }
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(["" if np.isnan(cell) else cell for cell in row])
    return file.getvalue()


def make_samples() -> str:
    evil = {**SAMPLE, "prompt": EVIL, "policy": EVIL, "reference": "", "policy_gold": None}
    return "".join(f"{json.dumps(sample)}\n" for sample in [evil, *[SAMPLE] * 5])


def make_training_samples() -> str:
    def piece(text: str, x: float | None) -> dict[str, Any]:
        value = None if x is None else 1.5 + x
        return {"text": text, "log_ratio": x, "value": value, "advantage": x and -x}

    def row(update: int, *pieces: dict[str, Any]) -> dict[str, Any]:
        figures = {"score": 0.5, "kl": 1.25, "finish_reason": "stop"}
        return {"update": update, "tokens": 100 * update, "prompt": EVIL, **figures} | {
            "response": "",
            "pieces": list(pieces),
        }

    rows = [
        row(1, piece(" first", 0.0)),
        row(11, piece(" passed over", 9.0)),
        row(21, piece(EVIL, 0.25), piece("", -0.75), piece("a\n", None), piece(" up", 0.75)),
        {"update": 21},
        {"update": 21, "pieces": ["not", 1, "object"]},
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A finished run."""
    files = {
        "summary.json": json.dumps(make_summary()),
        "evaluation.json": json.dumps(make_evaluation()),
        "reward_model.json": json.dumps(REWARD_MODEL),
        "config.json": json.dumps({"kl_coef": 0.1, "name": EVIL, "env_kwargs": {"split": None}}),
        "samples.jsonl": make_samples(),
        "training_samples.jsonl": make_training_samples(),
        "metrics.csv": make_metrics(80),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Charts without their drawing, which takes time."""
    for module in (charts, run_page):
        monkeypatch.setattr(module, "pixels", lambda *_: np.zeros((2, 2, 4), np.uint8))


def set_summary(run_dir: Path, **values: object) -> None:
    (run_dir / "summary.json").write_text(json.dumps({**make_summary(), **values}))


class Page(HTMLParser):
    """Tags, attributes and text of a page; every opened tag must be closed in order."""

    EMPTY = ("meta", "img", "input", "!doctype")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def images(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name == "src"]


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(PNG)
    assert png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_the_whole_report_is_one_file(run_dir, capsys):
    report.main(report.Config(run_dir))
    assert "report.html" in capsys.readouterr().out
    page = Page(run_dir / "report.html")
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not any(name.startswith("on") or name == "href" for name, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert len(page.images) == 1 + 6 + 1  # the bar, the curves, the clip fraction
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    for section in (
        "Optimality",
        "Before and after",
        "Learning curves",
        "Reward model",
        "Samples",
        "Token by token",
        "Configuration",
        "Versions and hashes",
    ):
        assert section in page.text
    width, height = size((run_dir / "curves.png").read_bytes())
    assert width > height > 500


def test_figures_come_with_errors_and_units(run_dir, undrawn):
    text = Page(run_page.write_report(run_dir)).text
    for shown in (
        "0.826 ± 0.021",
        "95 % interval 0.786 to 0.866, 48 held-out prompts",
        "best-of-16 reaches 0.520 ± 0.021",
        "2.314 ± 0.041",
        "6.41 ± 0.22",
        "KL to the reference, nats per sequence",
        "12 min 34 s",
        "614,400",
        "accuracy of preferring the longest response",
        "4,000 comparisons for training, 400 comparisons held out",
        "novelty",
        "git.commit",
        "env_kwargs.split",
    ):
        assert shown in text


def test_texts_are_escaped(run_dir, undrawn):
    page = Page(run_page.write_report(run_dir))
    assert "<script>" not in page.source
    # A prompt, a response, a config value, a hash, and of two training samples both prompts and a
    # token.
    assert page.text.count('<script>alert("$x_1$")</script>&amp;') == 7
    assert "\x1b" not in page.source
    assert "\x00" not in page.source
    assert "(empty)" in page.text


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("evaluation.json", "best-of"),
        ("reward_model.json", "Reward model"),
        ("config.json", "Configuration"),
        ("samples.jsonl", "Samples"),
        ("training_samples.jsonl", "Token by token"),
        ("metrics.csv", "Learning curves"),
    ],
)
def test_a_missing_file_leaves_its_section_out(run_dir, file, section, undrawn):
    assert section in Page(run_page.write_report(run_dir)).text
    (run_dir / file).unlink()
    assert section not in Page(run_page.write_report(run_dir)).text


def test_a_summary_is_enough(tmp_path, undrawn):
    set_summary(tmp_path, versions=None, hashes=None)
    page = Page(run_page.write_report(tmp_path))
    assert len(page.images) == 1
    assert "2.314 ± 0.041" in page.text
    assert not (tmp_path / "curves.png").exists()


def test_without_gold_and_optimum(run_dir, undrawn):
    nothing = dict.fromkeys(("gold_before", "gold_after", "objective_optimum", "optimality"))
    set_summary(run_dir, **nothing, kl=figure(float("nan"), float("nan")))
    evaluation = {**make_evaluation(), **nothing, "win_rate_gold": None}
    del evaluation["best_of_n_optimality"]
    evaluation["optimum"]["ess"] = figure(3.4, 0.3)
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    text = Page(run_page.write_report(run_dir)).text
    assert "unknown" in text
    assert "3.40 ± 0.30 effective samples" in text
    assert "gold score" not in text
    assert "2.69" not in text  # the optimum's score is as unsure as J*


@pytest.mark.parametrize("value", [-7.0, 3.0, 1.02, float("nan")])
def test_any_optimality_can_be_drawn(run_dir, value):
    run = run_files.read_run(run_dir)
    run.summary["optimality"] = {**interval(value), "low": float("nan")}
    run.evaluation["best_of_n_optimality"]["16"] = figure(-9.0)
    bar = run_charts.bar(run)
    assert bar is None if np.isnan(value) else size(bar.png)


@pytest.mark.parametrize(
    ("metrics", "images"),
    [
        (make_metrics(1), 6 + 1),
        ("tokens,rollout/score,rollout/length\n10,0.5,\n20,0.7\n30,inf,many\n", 1),
        ("rollout/score,rollout/kl_per_sequence\n0.5,1\n,2\n", 3),
        ("tokens,rollout/score\n", 0),
        ("", 0),
    ],
)
def test_short_and_ragged_metrics(run_dir, metrics, images):
    set_summary(run_dir, optimality=None)
    (run_dir / "metrics.csv").write_text(metrics)
    assert len(Page(run_page.write_report(run_dir)).images) == images


def test_samples_on_the_terminal(run_dir):
    console = Console(file=io.StringIO(), width=100)
    terminal.print_samples(run_dir, console)
    text = console.file.getvalue()
    assert "[bold]a[/bold]" in text
    assert "\x1b" not in text
    assert text.count("gold 0.75") == 2
    assert "(empty)" in text
    (run_dir / "samples.jsonl").unlink()
    silent = Console(file=io.StringIO())
    terminal.print_samples(run_dir, silent)
    assert not silent.file.getvalue()


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("summary.json", b"{"),
        ("summary.json", b"[]"),
        ("evaluation.json", b"\xff"),
        ("samples.jsonl", b'{}\n{"prompt"\n'),
        ("samples.jsonl", b"3\n"),
        ("training_samples.jsonl", b"{}\n[]\n"),
        ("metrics.csv", b"tokens\n\xff\n"),
    ],
)
def test_bad_files_are_named(run_dir, file, data):
    (run_dir / file).write_bytes(data)
    with pytest.raises(InputError, match=re.escape(file)):
        run_page.write_report(run_dir)


def spans(source: str) -> list[tuple[dict[str, str], str, str]]:
    """Colours by quantity, tooltip and text of each token on a page."""
    found = re.findall(r'<span style="(--r[^"]*)" title="([^"]*)">([^<]*)</span>', source)
    return [
        (dict(part.split(":") for part in style.split(";")), title, text)
        for style, title, text in found
    ]


def test_tokens_are_coloured_by_each_quantity_and_carry_its_number(run_dir, undrawn):
    page = Page(run_page.write_report(run_dir))
    tokens = spans(page.source)
    assert len(tokens) == 5
    by_text = {text: (colors, title) for colors, title, text in tokens}
    assert " passed over" not in page.text, "neither the last nor the first update"
    assert page.text.index("update 21") < page.text.index("update 1,")
    colors, title = by_text[" up"]
    # Values are coloured around their mean, 1.56; the lowest, 0.75, is farthest from it.
    assert colors == {"--r": "var(--up4)", "--v": "var(--up3)", "--a": "var(--down4)"}
    assert title == "log-ratio 0.75 · value 2.25 · advantage −0.75"
    assert by_text["∅"][0] == {"--r": "var(--down4)", "--v": "var(--down4)", "--a": "var(--up4)"}
    assert by_text[" first"][0]["--r"] == "none"
    # What is unknown has no colour and no number, and a line break shows.
    colors, title = by_text["a⏎\n"]
    assert set(colors.values()) == {"none"}
    assert title == "log-ratio – · value – · advantage –"


def test_one_of_three_switches_is_on_and_each_has_its_rule_and_its_legend(run_dir, undrawn):
    source = Page(run_page.write_report(run_dir)).source
    switches = re.findall(r'<input type="radio" name="by" id="by-(\w)"( checked)?>', source)
    assert switches == [("r", " checked"), ("v", ""), ("a", "")]
    for letter, _ in switches:
        assert f'<label for="by-{letter}">' in source
        assert f"#by-{letter}:checked ~ * .tokens span {{ background: var(--{letter}); }}" in source
        assert f"#by-{letter}:checked ~ .of-{letter} {{ display: block; }}" in source
        assert source.count(f'class="legend of-{letter}"') == 1
    assert "default-src 'none'" in source


@pytest.mark.parametrize(
    ("mode", "ink", "ground"), [("light", "#1b1f24", "#f6f8fa"), ("dark", "#e4e8ec", "#1c2128")]
)
def test_text_is_readable_on_every_colour(mode, ink, ground):
    from rlhf_gym.reports.token_view import PALETTES

    style = ENVIRONMENT.get_template("style.css").render()
    assert f"--ink: {ink}" in style
    assert f"--card: {ground}" in style

    def rgb(color: str) -> np.ndarray:
        return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255

    def luminance(color: np.ndarray) -> float:
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    palette = PALETTES[mode]
    for color in (palette.up, palette.down):
        for strength in palette.strengths:
            mixed = rgb(color) * strength / 100 + rgb(ground) * (1 - strength / 100)
            dim, bright = sorted([luminance(mixed), luminance(rgb(ink))])
            # The contrast that WCAG 2 asks of text.
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (color, strength)


def test_the_curve_of_optimality_knows_its_ends(run_dir):
    run = run_files.read_run(run_dir)
    before, after, optimum = run.held_out("optimality")
    assert (before["value"], optimum["value"]) == (0.0, 1.0)
    assert after == run.optimality
    metrics = (run_dir / "metrics.csv").read_text().replace("rollout/length", "rollout/optimality")
    (run_dir / "metrics.csv").write_text(metrics)
    assert "Optimality" in [title for title, _ in run_charts.curves(run_files.read_run(run_dir))]


def test_a_training_alone_has_a_report(run_dir, undrawn):
    for name in ("summary.json", "evaluation.json", "samples.jsonl", "reward_model.json"):
        (run_dir / name).unlink()
    config = {"env": "rlhf_gym/Mine-v0", "algorithm": "rloo", "seed": 7}
    (run_dir / "config.json").write_text(json.dumps(config))
    text = Page(run_page.write_report(run_dir)).text
    assert "unknown" in text
    assert "scripts/evaluate.py" in text
    assert "Before and after" not in text
    assert "tokens/s" not in text, "it has not ended"
    (run_dir / "policy.json").write_text('{"tokens": 2051, "seconds": 61.0, "episodes": 640}')
    text = Page(run_page.write_report(run_dir)).text
    assert "rlhf_gym/Mine-v0 · rloo · seed 7" in text
    assert "Learning curves" in text
    assert "Token by token" in text
    assert "2,051" in text
    assert "1 min 01 s" in text


def test_an_evaluation_alone_has_a_report(run_dir, tmp_path, undrawn):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name in ("evaluation.json", "samples.jsonl"):
        (folder / name).write_bytes((run_dir / name).read_bytes())
    page = Page(run_page.write_report(folder))
    assert len(page.images) == 1, "the bar"
    assert "95 % interval 0.786 to 0.866" in page.text
    assert "2.314 ± 0.041" in page.text
    assert "tokens/s" not in page.text


def test_a_folder_of_no_run_is_an_input_error(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--run-dir", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert "has none of summary.json, evaluation.json, metrics.csv" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (3, "3"),
        (614400, "614,400"),
        (-0.123456, "−0.123"),
        (figure(1.23456, 0.0432), "1.235 ± 0.043"),
        (figure(1234.5, 120.0), "1,234 ± 120"),
        (figure(0.5, 0.0), "0.5"),
        (figure(0.5, float("nan"), 1), "0.5"),
        ({"value": None, "se": None, "n": 0}, "–"),
    ],
)
def test_numbers_show_what_is_known_of_them(value, shown):
    assert show(value).replace("\N{NO-BREAK SPACE}", " ") == shown


HOSTILE = """</style></title>'"><x-evil onload="x">&lt;x-evil&gt; {{ 7 * 7 }} {% x %}\x1b"""


def hostile(values: Any) -> Any:
    """The same values, with hostile text after each text, and as a name and value of each dict."""
    if isinstance(values, str):
        return values + HOSTILE
    if isinstance(values, list | tuple):
        return [hostile(value) for value in values]
    if isinstance(values, dict):
        return {name: hostile(value) for name, value in values.items()} | {HOSTILE: HOSTILE}
    return values


def assert_harmless(file: Path, *fields: str) -> None:
    """All tags are the templates' own, and each of these texts is shown as it is."""
    page = Page(file)
    own = set("html head meta title style body h1 section h2 h3 p div span strong details".split())
    own |= set("summary table thead tr th td dl dt dd img article input label i".split())
    assert set(page.tags) <= own
    assert page.tags.count("title") == page.tags.count("style") == 1
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "\x1b" not in page.source
    for field in fields:
        assert clean(field + HOSTILE) in page.text, field


def test_no_text_of_a_run_reaches_its_page_as_a_tag(run_dir, undrawn):
    for name in ("config.json", "summary.json", "reward_model.json"):
        values = hostile(json.loads((run_dir / name).read_text()))
        (run_dir / name).write_text(json.dumps(values))
    evaluation = make_evaluation()
    evaluation |= {f"column{HOSTILE}_{at}": figure(0.5) for at in PAIR}
    evaluation["best_of_n_optimality"] = {f"4{HOSTILE}": interval(0.3)}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    for name in ("samples.jsonl", "training_samples.jsonl"):
        rows = [hostile(json.loads(line)) for line in (run_dir / name).read_text().splitlines()]
        rows = [{**row, "update": hostile(str(row.get("update")))} for row in rows]
        (run_dir / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    metrics = (run_dir / "metrics.csv").read_text()
    quoted = f"column{HOSTILE}".replace('"', '""')
    (run_dir / "metrics.csv").write_text(metrics.replace("tokens", f'"{quoted}"', 1))
    round_dir = run_dir / "rounds" / "1"
    round_dir.mkdir(parents=True)
    (round_dir / "round.json").write_text(json.dumps(hostile({"round": "1", "score": "high"})))
    shown = [
        "rlhf_gym/Reviews-v0",
        "ppo",
        "The film was",
        " about a man who",
        "column",
        "best-of-4",
    ]
    shown += [" a joy from start to end.", " up", "update 21", "2.11.0", "cd" * 32, ""]
    assert_harmless(run_page.write_report(run_dir), *shown)


def reward_model_figures() -> dict[str, Any]:
    """The content of reward_evaluation.json, small."""
    both = {"accuracy": interval(0.75), "accuracy_pairwise": interval(0.7)}
    part = {"from": 0.0, "to": 1.0, "k": 2, "chance": 0.5, "accuracy": interval(0.75)}
    mistake = {
        "prompt": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "x" * 700}],
        "candidates": ["Hello.", "No."],
        "preferred": [0],
        "probabilities": [0.25, 0.75],
        "nll": 1.4,
    }
    return {
        "config": {"reward_model": "a/model", "data": "a/file.jsonl", "label": None},
        "counts": {"whole": 40, "cut": 0, "dropped": 1},
        **both,
        **{name: interval(0.5) for name in ("nll", "nll_uniform", "annotator_agreement")},
        **{"ece": 0.1, "comparisons": 40, "prompts": 40, "without_preference": 0},
        "rules": {"chance": {**both, "lead": interval(0.25)}},
        "bag_of_words_learnt_from": 0,
        "reliability": [],
        **{name: [part] for name in ("by_candidates", "by_margin", "by_length")},
        "mistakes": [mistake, {**mistake, "prompt": "How are you?"}],
    }


def test_no_text_of_a_reward_evaluation_reaches_its_page_as_a_tag(tmp_path):
    figures = reward_model_figures()
    figures["config"] = hostile(figures["config"])
    figures["mistakes"] = hostile(figures["mistakes"])
    file = tmp_path / "page.html"
    file.write_text(reward_model_page(figures), encoding="utf-8")
    shown = ["a/model", "a/file.jsonl", "user", "Hi.", "How are you?", "Hello.", "x" * 700, ""]
    assert_harmless(file, *shown)


def test_no_text_of_a_comparison_reaches_its_page_as_a_tag(tmp_path):
    ends = [0.1, 0.9]
    env, ours, theirs = hostile(["my-env", "ours", "theirs"])
    row = {"env": env, "rate": 1.0, "seeds": 2, "iqm": 0.5, "iqm_interval": ends, "lowest": 0.4}
    row |= {"tokens": 1000.0, "seconds": 2.0}
    for name in ("optimality", "score", "kl", "gold"):
        row |= {name: 0.5, f"{name}_interval": 0.1}
    scale = {"objective_reference": 0.0, "objective_optimum": 1.0} | {
        "best_of_n_optimality": {f"4{HOSTILE}": 0.5},
        "best_deterministic_optimality": None,
    }
    means = {"iqm": 0.5, "iqm_interval": ends, "mean": 0.5, "mean_interval": ends}
    better = {"better_than_first": 0.5, "better_interval": ends}
    found = {
        "config": hostile({"options": {"name": "value"}}) | {"tuned": {ours: f"c{HOSTILE}"}},
        "environments": {env: scale},
        "rows": [{**row, "algorithm": name} for name in (ours, theirs)],
        "over_environments": [
            {"algorithm": ours, **means},
            {"algorithm": theirs, **means, **better},
        ],
        "versions": hostile({"torch": "2.11.0"}),
    }
    file = tmp_path / "page.html"
    chart = charts.Chart(PNG, f"alt{HOSTILE}")
    file.write_text(comparison_page(found, chart), encoding="utf-8")
    shown = ["my-env", "ours", "theirs", "P(better than ours", "best-of-4", "(c", "value", "2.11.0"]
    assert_harmless(file, *shown, "")
    assert ("alt", clean(f"alt{HOSTILE}")) in Page(file).attributes


def test_only_templates_hold_html_and_none_turns_escaping_off():
    folder = ROOT / "rlhf_gym" / "reports"
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"</?\s*[a-z!]|&#?\w+;", node.value, re.I), (file, node.value)
    templates = list((folder / "templates").iterdir())
    assert templates
    for file in templates:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|autoescape|Markup", text), file


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="chart"):
        render("comparison_page.html", {"title": "no more"})
