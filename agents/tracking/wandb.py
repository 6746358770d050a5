"""Logging to Weights & Biases, an optional package."""

import secrets
from pathlib import Path
from typing import Any

from rlhf_gym.utils.files import read_json, write_text
from rlhf_gym.utils.optional import require


def require_wandb() -> Any:
    """Return the module `wandb`.

    Raises:
        InputError: It is not installed.
    """
    need, fix = "--wandb needs the package wandb", "pip install wandb, or leave --wandb out"
    return require("wandb", need, fix)


def begin_wandb(run_dir: Path) -> Any:
    """Start or resume the W&B run of a run folder, with config.json as its configuration.

    The step is the number of sampled tokens. W&B ignores a step that it already has, so metrics
    that a resumed run measures again do not appear twice.
    """
    wandb = require_wandb()
    id_file, config = run_dir / "wandb_id.txt", run_dir / "config.json"
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(8))
    return wandb.init(
        project="rlhf_gym",
        name=run_dir.resolve().name,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run_dir),
        config=read_json(config) if config.exists() else None,
    )
