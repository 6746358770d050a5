"""Benchmark of TRL's RLOO or GRPO, run by bench/groups.py in TRL's own environment.

`python scripts/bench/system_trl_groups.py FOLDER` reads options.json, prompts.json, reference/ and
reward_model/ from the folder, trains, and prints a JSON line: seconds of each iteration after the
first, and versions.
"""

import json
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from trl_clock import Clock


def main(folder: Path) -> None:
    """Train, and print the seconds of each iteration."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )

    options = json.loads((folder / "options.json").read_text())
    torch.set_flush_denormal(True)
    torch.set_num_threads(options["threads"])
    set_seed(0)
    kind = options["algorithm"].upper()
    on_gpu = torch.cuda.is_available()
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=options["episodes"],
        num_generations=options["samples_per_prompt"],
        num_iterations=options["epochs"],
        max_completion_length=options["response"],
        generation_kwargs={"min_new_tokens": options["response"]},
        max_steps=(options["iterations"] + 1) * options["epochs"],
        beta=options["kl_coef"],
        learning_rate=1e-5,
        temperature=1.0,
        disable_dropout=True,
        gradient_checkpointing=False,
        bf16=False,
        save_strategy="no",
        logging_steps=10**6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
    )
    clock = Clock()
    load = {"dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference", padding_side="left")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", **load)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder / "reference", **load),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {"prompt": json.loads((folder / "prompts.json").read_text())}
        ),
        processing_class=tokenizer,
        reward_processing_classes=AutoTokenizer.from_pretrained(folder / "reward_model"),
        callbacks=[clock],
    )
    trainer.train()
    ends = clock.times[:: options["epochs"]]
    spent = [b - a for a, b in pairwise(ends)]
    packages = ("trl", "transformers", "torch")
    print(
        json.dumps({"seconds": spent[1:], "versions": {name: version(name) for name in packages}})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
