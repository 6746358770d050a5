"""Read the files of a run folder for a report."""

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_gym.errors import InputError
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.files import read_json
from rlhf_gym.utils.statistics import Figure

RESULTS = ("summary.json", "evaluation.json", "metrics.csv")
"""Each of these files is enough for a report."""


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; a missing file is empty here.

    Attributes:
        summary: summary.json; if it is missing, the same facts from config.json and policy.json.
        evaluation: evaluation.json.
        reward_model: reward_model.json.
        config: config.json.
        samples: Rows of samples.jsonl.
        metrics: Columns of metrics.csv, one value per update, NaN where a cell is empty.
        rounds: round.json of each earlier round of labelling, oldest first.
        training_samples: Rows of training_samples.jsonl.
    """

    summary: dict[str, Any]
    evaluation: dict[str, Any]
    reward_model: dict[str, Any]
    config: dict[str, Any]
    samples: list[dict[str, Any]]
    metrics: dict[str, Floats]
    rounds: list[dict[str, Any]]
    training_samples: list[dict[str, Any]]

    def held_out(self, name: str) -> tuple[Figure | None, Figure | None, Figure | None]:
        """Return a figure of the reference, the policy and the optimum; None where unknown."""
        figures = {**self.evaluation, **self.summary}
        before, after = figures.get(f"{name}_before"), figures.get(f"{name}_after")
        if name == "optimality" and self.optimality:
            return {"value": 0.0}, self.optimality, {"value": 1.0}
        if name == "kl" and figures.get("kl"):
            before, after = {"value": 0.0, "se": 0.0}, figures["kl"]
        optimum = figures.get("objective_optimum")
        if (
            name != "objective" and optimum
        ):  # if there are too few samples for J*, there are too few for these
            optimum = self.evaluation.get("optimum", {}).get(name)
        return before, after, optimum

    @property
    def optimality(self) -> Figure | None:
        """Optimality; None if it is unknown."""
        found = {**self.evaluation, **self.summary}.get("optimality")
        return found if found and math.isfinite(found["value"]) else None

    @property
    def name(self) -> str:
        """Environment, algorithm and seed, on one line."""
        parts = [self.summary.get("env_id"), self.summary.get("algorithm")]
        return " · ".join([*(str(p) for p in parts if p), f"seed {self.summary.get('seed')}"])


def read_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: There is nothing to report, or one of the files cannot be read.
    """
    if not any((run_dir / name).exists() for name in RESULTS):
        raise InputError(
            f"{run_dir} has none of {', '.join(RESULTS)}; --run-dir must be the folder of a run"
        )
    config = _read_json(run_dir / "config.json") or _read_json(run_dir / "evaluation_config.json")
    return Run(
        # Only rlhf.py writes summary.json; other scripts leave the same facts in other files.
        summary={
            "env_id": config.get("env"),
            "algorithm": config.get("algorithm"),
            "seed": config.get("seed"),
            **_read_json(run_dir / "policy.json"),
            **_read_json(run_dir / "summary.json"),
        },
        evaluation=_read_json(run_dir / "evaluation.json"),
        reward_model=_read_json(run_dir / "reward_model.json"),
        config=config,
        samples=read_json_lines(run_dir / "samples.jsonl"),
        metrics=_read_metrics(run_dir / "metrics.csv"),
        rounds=_read_rounds(run_dir / "rounds"),
        training_samples=read_json_lines(run_dir / "training_samples.jsonl"),
    )


def _read_rounds(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*/round.json"), key=lambda file: int(file.parent.name))
    return [_read_json(file) for file in files]


def _read_json(file: Path) -> dict[str, Any]:
    return _object(file, read_json(file)) if file.exists() else {}


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line; no lines if the file is missing.

    Raises:
        InputError: The file cannot be read, or a line is not a JSON object.
    """
    rows = []
    for i, line in enumerate(_read_text(file).split("\n"), 1):
        try:
            rows += [_object(f"line {i} of {file}", json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(
                f"line {i} of {file} is not valid JSON ({error}); delete the file to do without it"
            ) from error
    return rows


def _object(where: object, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where} is not a JSON object; delete the file to create it again")
    return values


def _read_text(file: Path) -> str:
    """Return the text of a file; empty if it is missing."""
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {file}: {error}; delete the file to do without it"
        ) from error


def _read_metrics(file: Path) -> dict[str, Floats]:
    reader = csv.DictReader(io.StringIO(_read_text(file)))
    rows = list(reader)
    return {
        name: np.array([_number(row[name]) for row in rows]) for name in reader.fieldnames or ()
    }


def _number(cell: str | None) -> float:
    """Return a cell as a number; NaN if it is empty, cut off, infinite or a text."""
    try:
        value = float(cell or "nan")
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")
