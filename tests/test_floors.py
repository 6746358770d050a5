"""Imports go down the floors only, and the task never imports who acts in it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Lowest first; modules on one line may import each other only as the order within it allows.
FLOORS = [
    ["errors", "figures", "progress"],
    ["devices", "files", "hints", "tokens", "choices", "process"],
    ["masks"],
    ["prompts", "kl", "human", "models", "lots", "lora", "precision", "attention", "passes"],
    ["graphs"],
    ["lm", "preferences"],
    ["slots", "decode", "preference_formats"],
    ["decoding_rows", "preference_survey", "prefix"],
    ["sampling", "reward_model", "responses"],
    ["ensemble"],
    ["objective", "optimum"],
    ["enumeration", "shaping"],
    ["collect", "evaluation", "envs"],
    ["tasks"],
    ["training"],
    ["agents"],
    ["scripts"],
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] == "rlhf_gym" and len(parts) > 1:
        return parts[1]
    return parts[0] if parts[0] in ("agents", "scripts") else None


def test_imports_go_down():
    checked = 0
    for file in [*ROOT.glob("rlhf_gym/**/*.py"), *ROOT.glob("agents/**/*.py")]:
        here = room(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if here in (None, "__init__"):
            continue
        for name in imported(file):
            there = room(name)
            if there in FLOOR and there != here:
                checked += 1
                assert FLOOR[there] <= FLOOR[here], f"{file.name} on {here} imports {name}"
    assert checked > 50


def test_every_room_has_a_floor():
    rooms = {p.stem for p in (ROOT / "rlhf_gym").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms - {"__init__", "__pycache__"} <= FLOOR.keys()


def test_the_task_never_imports_agents_or_their_libraries():
    for file in ROOT.glob("rlhf_gym/**/*.py"):
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & {"agents", "stable_baselines3", "sb3_contrib", "tyro"}, file
