"""What a run folder holds, read for a report."""

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
"""Files that a report can be made of, each by itself."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds; a file that is not there is empty here.

    Attributes:
        summary: summary.json, and what of it config.json and policy.json know.
        evaluation: evaluation.json.
        reward_model: reward_model.json.
        config: config.json.
        samples: Rows of samples.jsonl.
        metrics: Columns of metrics.csv, one value per update, NaN where a cell is empty.
        rounds: round.json of each earlier round of labelling, in turn.
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
        """A figure of the reference, of the policy and of the optimum; None where unknown."""
        figures = {**self.evaluation, **self.summary}
        before, after = figures.get(f"{name}_before"), figures.get(f"{name}_after")
        if name == "optimality" and self.optimality:
            return {"value": 0.0}, self.optimality, {"value": 1.0}
        if name == "kl" and figures.get("kl"):
            before, after = {"value": 0.0, "se": 0.0}, figures["kl"]
        optimum = figures.get("objective_optimum")
        if name != "objective" and optimum:  # too few samples for J* are too few for these
            optimum = self.evaluation.get("optimum", {}).get(name)
        return before, after, optimum

    @property
    def optimality(self) -> Figure | None:
        """Optimality; None where it is unknown."""
        found = {**self.evaluation, **self.summary}.get("optimality")
        return found if found and math.isfinite(found["value"]) else None

    @property
    def name(self) -> str:
        """What was run, on one line."""
        parts = [self.summary.get("env_id"), self.summary.get("algorithm")]
        return " · ".join([*(str(p) for p in parts if p), f"seed {self.summary.get('seed')}"])


def read_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: There is nothing to report, or one of the files cannot be read.
    """
    if not any((run_dir / name).exists() for name in RESULTS):
        raise InputError(
            f"{run_dir} has none of {', '.join(RESULTS)}; --run-dir is the folder of a run"
        )
    config = _read_json(run_dir / "config.json") or _read_json(run_dir / "evaluation_config.json")
    return Run(
        # What rlhf.py sums up other scripts leave in other files.
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
        raise InputError(f"{where} holds no JSON object; delete the file to make it anew")
    return values


def _read_text(file: Path) -> str:
    """The text of a file, or nothing where it is not there."""
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
    """A cell as a number; NaN where it is empty, cut off, infinite or a text."""
    try:
        value = float(cell or "nan")
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")
