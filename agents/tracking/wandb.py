"""Weights & Biases, where it is installed and asked for."""

import secrets
from pathlib import Path
from typing import Any

from rlhf_gym.utils.files import read_json, write_text
from rlhf_gym.utils.optional import require


def require_wandb() -> Any:
    """The module `wandb`.

    Raises:
        InputError: It is not installed.
    """
    need, mend = "--wandb needs the package wandb", "pip install wandb, or leave --wandb out"
    return require("wandb", need, mend)


def begin_wandb(run_dir: Path) -> Any:
    """Begin the run of a folder, or go on with it; the folder's config.json goes along.

    Steps are tokens sampled, and W&B ignores those that it has already: what a resumed run
    measures again does not show twice.
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
