"""Benchmark of TRL 0.23.1's PPOTrainer, run by bench/speed.py in TRL's own environment.

`python scripts/bench/system_trl_ppo.py FOLDER` prints a JSON line in the format of `work.say`. Its
critic always has a separate trunk.
"""

import json
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from trl_clock import Clock
from work import begin, live_tokens, say


def main(folder: Path) -> None:
    """Train the timed iterations, after one as a warm-up."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )
    from trl import PPOConfig, PPOTrainer
    from trl.trainer import ppo_trainer

    options = json.loads((folder / "options.json").read_text())
    begin(options)
    on_gpu = options["device"] == "cuda"
    n, steps = options["episodes"], options["iterations"] + 1
    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        total_episodes=n * steps,
        per_device_train_batch_size=n,
        gradient_accumulation_steps=1,
        num_mini_batches=options["minibatches"],
        num_ppo_epochs=options["epochs"],
        local_rollout_forward_batch_size=n,
        response_length=options["response"],
        stop_token="eos" if options["ends"] else None,
        temperature=1.0,
        kl_coef=options["kl_coef"],
        learning_rate=1e-5,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=options["precision"] == "bf16",
        save_strategy="no",
        logging_steps=10**6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
    )
    load = {"dtype": torch.float32}
    # Not AutoTokenizer: an older transformers does not know the class name that a newer one writes.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "reference", padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "reference", **load) for _ in range(2)
    )
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", **load)
    value = AutoModelForSequenceClassification.from_pretrained(
        folder / "reference", num_labels=1, **load
    )
    clock = Clock()
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict(
            {"input_ids": json.loads((folder / "prompts.json").read_text())}
        ),
        callbacks=[clock],
    )
    cut, tokens = ppo_trainer.truncate_response, []

    def counted(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        tokens.append(live_tokens(responses, stop))
        return cut(stop, pad, responses)

    # TRL calls it once per iteration, and only if responses may end before their budget.
    ppo_trainer.truncate_response = counted
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    # TRL prints to stdout, and the JSON must be the last line there.
    out, sys.stdout = sys.stdout, sys.stderr
    trainer.train()
    sys.stdout = out
    spent = [b - a for a, b in pairwise(clock.times)][1:]
    say(
        {"iteration": spent},
        tokens=tokens[1:] if options["ends"] else [n * options["response"]] * len(spent),
        work={
            "episodes": trainer.args.batch_size,
            "parameters": trained,
        },
        versions={name: version(name) for name in ("trl", "transformers", "torch")},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
