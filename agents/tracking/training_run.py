"""Recording of training metrics: metrics.csv, TensorBoard, W&B and a progress bar."""

import csv
import json
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from torch.utils.tensorboard import SummaryWriter

from agents.tracking.wandb import begin_wandb
from rlhf_gym.utils.files import whole_lines, write_text
from rlhf_gym.utils.progress import time_bar


class TrainingRun:
    """The record of one training in its run folder.

    Use as a context manager. The key of a row is the number of tokens sampled so far. `rewind` cuts
    the record back to a restored checkpoint, so the file of a resumed run equals that of an
    uninterrupted one. Entering deletes the record of an earlier attempt without checkpoints.

    Args:
        run_dir: The run folder.
        total_tokens: Tokens at which the progress bar is full.
        label: Text next to the progress bar.
        wandb: If True, log the metrics to Weights & Biases too.
        progress: If True, show a progress bar, or lines where there is no terminal.
    """

    def __init__(
        self,
        run_dir: Path,
        total_tokens: int,
        label: str,
        *,
        wandb: bool = False,
        progress: bool = True,
    ) -> None:
        self.run_dir = run_dir
        self.checkpoints = run_dir / "checkpoints"
        self._file = run_dir / "metrics.csv"
        self._samples = run_dir / "training_samples.jsonl"
        self._asked_for_wandb = wandb
        self._wandb: Any = None
        self._rows: list[dict[str, str]] = self._read()
        self._tensorboard: SummaryWriter | None = None
        self._earlier_seconds = 0.0
        self._begun = time.monotonic()
        console = Console(stderr=True, quiet=not progress)
        self._progress = time_bar(
            console, TextColumn("{task.percentage:3.0f} %  {task.fields[note]}")
        )
        self._console = console
        self._total = total_tokens
        self._tenths = 0
        self._task = self._progress.add_task(label, total=total_tokens, note="")

    def __enter__(self) -> "TrainingRun":
        if not any(self.checkpoints.glob("tokens_*")):
            self.rewind(0)
        self._wandb = begin_wandb(self.run_dir) if self._asked_for_wandb else None
        self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"))
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(exception[0] is not None))

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return self._earlier_seconds + time.monotonic() - self._begun

    @property
    def tokens(self) -> int:
        """Tokens sampled at the last record."""
        return int(self._rows[-1]["tokens"]) if self._rows else 0

    @property
    def metrics(self) -> list[dict[str, float]]:
        """What was recorded so far: a row per update, `tokens` and `seconds` among its columns."""
        return [{name: float(value) for name, value in row.items()} for row in self._rows]

    @property
    def updates(self) -> int:
        """Updates recorded so far; each is one row."""
        return len(self._rows)

    def rewind(self, tokens: int) -> None:
        """Delete every row and every sample after `tokens`."""
        self._rows = [row for row in self._rows if int(row["tokens"]) <= tokens]
        self._earlier_seconds = float(self._rows[-1]["seconds"]) if self._rows else 0.0
        self._write_all()
        if self._samples.exists():
            kept = [x for x in whole_lines(self._samples) if json.loads(x)["tokens"] <= tokens]
            write_text(self._samples, "".join(f"{line}\n" for line in kept))

    def record(self, tokens: int, metrics: Mapping[str, float]) -> None:
        """Add a row of metrics, measured when `tokens` tokens had been sampled."""
        row = {"tokens": str(tokens), "seconds": f"{self.seconds:.3f}"}
        row.update({name: repr(float(value)) for name, value in metrics.items()})
        known = self._columns()
        self._rows.append(row)
        if self._columns() == known:
            with self._file.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, known).writerow(row)
        else:  # a new column changes the header
            self._write_all()
        assert self._tensorboard is not None, "call record inside `with TrainingRun(…)`"
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, float(value), tokens)
        if self._wandb is not None:
            self._wandb.log({name: float(value) for name, value in metrics.items()}, step=tokens)
        self._show(tokens, metrics)

    def add_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Add responses to training_samples.jsonl, and their texts to TensorBoard.

        Args:
            samples: JSON objects with the keys `tokens` (sampled so far), `prompt`, `response`,
                `score` and `kl`.
        """
        with self._samples.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(sample, ensure_ascii=False)}\n" for sample in samples)
        assert self._tensorboard is not None, "call add_samples inside `with TrainingRun(…)`"
        for i, sample in enumerate(samples):
            said = textwrap.indent(f"{sample['prompt']} ⟶ {sample['response']}", "    ")
            text = f"score {sample['score']:.3f} at {sample['kl']:.3f} nats\n\n{said}"
            self._tensorboard.add_text(f"samples/{i}", text, sample["tokens"])

    def _show(self, tokens: int, metrics: Mapping[str, float]) -> None:
        score = metrics.get("rollout/score")
        kl = metrics.get("rollout/kl_per_sequence")
        note = "" if score is None or kl is None else f"score {score:.3f} at {kl:.2f} nats"
        self._progress.update(self._task, completed=min(tokens, self._total), note=note)
        tenths = min(10 * tokens // max(self._total, 1), 10)
        if not self._console.is_terminal and tenths > self._tenths:
            self._tenths = tenths
            self._console.print(f"{tenths * 10} % of {self._total} tokens, {note}", highlight=False)

    def _read(self) -> list[dict[str, str]]:
        if not self._file.exists():
            return []
        with self._file.open(newline="", encoding="utf-8") as file:
            return [
                {key: value for key, value in row.items() if value not in ("", None)}
                for row in csv.DictReader(file)
            ]

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self._rows for key in row))

    def _write_all(self) -> None:
        partial = self._file.with_suffix(".csv.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns() or ["tokens", "seconds"])
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(partial, self._file)
