"""Imports go down the floors only: between the wings, inside them, and between the packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The lowest floor first; modules on the same floor do not import each other. A name is a module or
# a folder. "algorithms" are the files at the top of agents/, which build on each other.
FLOORS: dict[str, list[str]] = {
    "rlhf_gym": [
        "errors",
        "utils kl tokens",
        "data",
        "lm",
        "rewards",
        "preferences objective",
        "envs",
        "tasks evaluation",
        "training reports",
    ],
    "rlhf_gym/utils": [
        "arrays devices files hub nearest once optional process progress type_hints",
        "same_data statistics",
    ],
    "rlhf_gym/data": [
        "bad_rows compressed endings prompts row_columns row_problems",
        "row_files row_values",
        "rows",
        "row_reader",
        "prompt_rows",
        "encoding example_rows",
        "prompt_dataset",
    ],
    "rlhf_gym/lm": [
        "architecture lora masks precision probe sources",
        "attention batching loading",
        "causal_lm",
        "decoding",
    ],
    "rlhf_gym/lm/decoding": [
        "cuda_graphs own_cache",
        "kv_slots",
        "method",
        "decode_cache",
        "active_rows",
        "sampling",
    ],
    "rlhf_gym/rewards": [
        "callables human responses score_scale shared_prompts",
        "classifiers",
        "reward_model",
        "ensemble shared_reward_model",
        "functions",
        "shaping",
    ],
    "rlhf_gym/preferences": [
        "cells likelihood winners",
        "comparison dialogues",
        "comparison_rows duel_formats list_formats pair_formats",
        "rating_formats repair",
        "column_map known_formats",
        "collect encoded formats splits survey",
    ],
    "rlhf_gym/objective": ["objective optimum", "enumeration"],
    "rlhf_gym/envs": [
        "acts checked_actions groups infos render resets",
        "actor traces",
        "token_vector_env",
        "token_env",
    ],
    "rlhf_gym/training": [
        "sft_data trainer_progress",
        "reward_training sft sft_counts",
        "reward_run sft_run",
    ],
    "rlhf_gym/tasks": [
        "grammar prompt_form prompt_source registered",
        "keywords",
        "text",
        "exact published reviews",
    ],
    "rlhf_gym/evaluation": [
        "drawing reward_models",
        "policies reward_model_slices yardstick",
        "record",
    ],
    "rlhf_gym/reports": [
        "charts comparison_statistics display run_files",
        "comparison_charts pages run_charts terminal token_view",
        "comparison_page reward_model_page run_page",
    ],
    "agents": ["tracking libraries", "sb3", "algorithms", "doctor", "runs", "cli"],
    "agents/libraries": ["ppo_options"],
    "agents/sb3": [
        "finite options tf1_adam",
        "kl_control policy ptx",
        "rollout",
        "vec_env",
        "layers loss",
        "options_algorithm",
        "response_algorithm",
        "build groups response_ppo",
        "learning",
        "stock",
        "optimality_callback",
    ],
    "agents/sb3/policy": [
        "critic distribution observations optimizer shared_base update_graphs",
        "causal_lm_policy",
    ],
    "agents/sb3/rollout": ["buffer metrics", "advantages collection", "steps"],
    "agents/sb3/learning": ["stopping token_samples", "checkpoint", "learner"],
    "agents/sb3/stock": ["contrib maskable q_network trpo", "quantiles"],
    "agents/doctor": ["subject", "data_checks environment_checks policy_checks seam_check"],
    "agents/tracking": ["wandb", "training_run"],
    "agents/runs": [
        "algorithm comparison_files labelling rounds setup",
        "examination training",
        "experiments journey_options",
        "comparison_options stages",
        "comparison journey",
    ],
    "agents/cli": [
        "arguments run_folder subcommands config_file field_help",
        "env_help",
        "parsing",
        "command",
        "compare convert_preferences doctor evaluate evaluate_reward_model report "
        "train_policy train_reward_model train_sft",
        "rlhf",
    ],
}


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(dotted: str, folder: str) -> str | None:
    """The module or folder of `folder` that a dotted name belongs to; None outside of it."""
    before, after = folder.replace("/", ".") + ".", dotted
    if not after.startswith(before):
        return None
    name = after.removeprefix(before).split(".")[0]
    path = ROOT / folder / name
    if not path.is_dir() and not path.with_suffix(".py").exists():
        return "__init__"  # a name of the package's own face
    return "algorithms" if folder == "agents" and not path.is_dir() else name


def rooms(folder: str) -> dict[str, list[Path]]:
    """The files of each module or folder of `folder`."""
    found: dict[str, list[Path]] = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file.parent == ROOT / folder and file.name == "__init__.py":
            continue
        dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found.setdefault(str(room(dotted, folder)), []).append(file)
    return found


def arrows(folder: str) -> Iterator[tuple[str, str, Path, str]]:
    """(importing room, imported room, file, dotted name) of each import inside `folder`."""
    for here, files in rooms(folder).items():
        for file in files:
            for name in imported(file):
                there = room(name, folder)
                if there not in (None, here):
                    yield here, str(there), file, name


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_go_down(folder):
    floor = {name: i for i, line in enumerate(FLOORS[folder]) for name in line.split()}
    assert rooms(folder).keys() == floor.keys(), "every room has a floor, every floor its rooms"
    for here, there, file, name in arrows(folder):
        where = f"{file.relative_to(ROOT)} imports {name}"
        assert there != "__init__", f"{where}: inside a package import the module, not its face"
        assert floor[there] < floor[here], f"{where}, which is not below it"


def test_every_folder_has_its_order():
    folders = {
        str(file.parent.relative_to(ROOT))
        for package in ("rlhf_gym", "agents")
        for file in (ROOT / package).rglob("*.py")
    }
    assert folders == FLOORS.keys()


def test_the_whole_house_is_read():
    assert sum(1 for folder in FLOORS for _ in arrows(folder)) > 300


@pytest.mark.parametrize(
    "folder,name,expected",
    [
        ("rlhf_gym", "rlhf_gym.envs.Actor", "envs"),
        ("rlhf_gym", "agents.ppo", None),
        ("rlhf_gym/lm", "rlhf_gym.lm.CausalLM", "__init__"),
        ("rlhf_gym/lm", "rlhf_gym.lm.decoding.sampling.draw", "decoding"),
        ("agents", "agents.ppo.Config", "algorithms"),
    ],
)
def test_what_a_name_belongs_to(folder, name, expected):
    assert room(name, folder) == expected


def test_the_task_never_imports_agents_or_their_libraries():
    for file in ROOT.glob("rlhf_gym/**/*.py"):
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & {"agents", "stable_baselines3", "sb3_contrib", "tyro"}, file


def test_no_two_modules_of_a_package_share_a_name():
    for package in ("rlhf_gym", "agents"):
        names = [f.stem for f in (ROOT / package).rglob("*.py") if f.stem != "__init__"]
        # A command is called as what it runs.
        twice = {name for name in names if names.count(name) > 1} - {"doctor"}
        assert not twice
