"""The wheel, installed where no checkout is: `rlhf-gym` runs, and all data files are there."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agents", "rlhf_gym")

pytestmark = pytest.mark.smoke


def done(command: list[object], folder: Path, **env: str) -> str:
    """The output of a command that ends well."""
    run = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the working tree."""
    # From a copy: setuptools keeps a build/ next to the sources, and packs what is left in it.
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Without isolation if setuptools is new enough; else `build` installs the one that is needed.
    spec = importlib.util.find_spec("setuptools")
    recent = spec is not None and int(version("setuptools").split(".")[0]) >= 77
    here = ["--no-isolation"] if recent else []
    done([sys.executable, "-m", "build", "--wheel", *here, "--outdir", source / "dist"], source)
    (file,) = (source / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel's packages and its command, without their dependencies."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    done([*pip, "--target", folder, wheel], folder)
    return folder


def test_every_data_file_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {
        str(file.relative_to(ROOT))
        for name in PACKAGES
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"agents/py.typed", "rlhf_gym/py.typed"} <= files
    assert any(name.startswith("rlhf_gym/tasks/assets/") for name in files)
    assert files <= packed
    assert {name.split("/")[0] for name in packed if "dist-info" not in name} == set(PACKAGES)


def test_the_command_runs_outside_of_the_checkout(installed, tmp_path):
    where = {"PYTHONPATH": str(installed)}
    code = "import agents.cli, rlhf_gym; print(agents.cli.__file__, rlhf_gym.__file__)"
    files = done([sys.executable, "-c", code], tmp_path, **where).split()
    assert all(Path(file).is_relative_to(installed) for file in files)
    command = installed / "bin" / "rlhf-gym"
    traced = {"PYTHONPROFILEIMPORTTIME": "1"}
    run = subprocess.run(
        [command, "--help"],
        cwd=tmp_path,
        env={**os.environ, **where, **traced},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "evaluate-reward-model" in run.stdout
    imported = {line.rsplit("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "agents.cli" in imported
    assert not {"torch", "gymnasium", "tyro", "rich"} & imported
    said = done(
        [
            *(command, "run", "--env", "rlhf_gym/Exact-v0", "--device", "cpu"),
            *("--comparisons", 64, "--total-tokens", 400, "--num-envs", 16),
            *("--episodes", 64, "--prompts", 8, "--reference-samples", 16),
            *("--run-dir", "runs/first"),
        ],
        tmp_path,
        **where,
    )
    assert "open runs/first/report.html" in said
    assert "<html" in (tmp_path / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    evaluate = [command, "evaluate", "--policy", "runs/first", "--episodes", 64]
    said = done(evaluate, tmp_path, **where)
    assert "reward_model runs/first/reward_model" in said
    what = json.loads((tmp_path / "runs" / "evaluation" / "evaluation_config.json").read_text())
    assert what["env_kwargs"]["reward_model"] == "runs/first/reward_model"
