"""Benchmark of TRL's RewardTrainer, run by bench/reward.py in TRL's own environment.

`python scripts/bench/system_trl_reward.py FOLDER` reads pairs.json (chosen_ids, rejected_ids),
options.json and model/ from the folder, trains one epoch, and prints a JSON line: seconds, steps,
versions.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main(folder: Path) -> None:
    """Train one epoch, and print its seconds."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    options = json.loads((folder / "options.json").read_text())
    torch.set_flush_denormal(True)
    torch.set_num_threads(options["threads"])
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", num_labels=1, dtype=torch.float32
    )
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        max_length=None,
        bf16=options["bf16"],
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=10**6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(json.loads((folder / "pairs.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    packages = ("trl", "transformers", "torch")
    print(
        json.dumps(
            {
                "seconds": seconds,
                "steps": trainer.state.global_step,
                "versions": {name: version(name) for name in packages},
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
