"""Benchmark of transformers' `generate`, run by bench/speed.py in a separate process.

`python scripts/bench/system_generate.py FOLDER` prints a JSON line in the format of `work.say`. It
only samples; it does not train.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM
from work import begin, live_tokens, say

from rlhf_gym.utils.process import prepare_process


@torch.no_grad()
def main(folder: Path) -> None:
    """Sample the timed waves, after one as a warm-up."""
    options = json.loads((folder / "options.json").read_text())
    begin(options)
    prepare_process()
    device, budget, n = options["device"], options["response"], options["episodes"]
    load = {"dtype": torch.bfloat16 if options["precision"] == "bf16" else torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder / "reference", **load).to(device).eval()
    prompts = torch.tensor(json.loads((folder / "prompts.json").read_text()), device=device)
    eos = model.generation_config.eos_token_id
    if not options["ends"]:  # without an EOS, generate neither checks for it nor masks its logit
        model.generation_config.eos_token_id = None
    seconds, tokens = [], []
    for i in range(options["iterations"] + 1):
        rows = prompts[torch.arange(i * n, (i + 1) * n) % len(prompts)]
        begun = time.perf_counter()
        out = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=budget,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=0,
        )
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            seconds.append(time.perf_counter() - begun)
            said = out[:, options["prompt"] :]
            tokens.append(live_tokens(said, eos) if options["ends"] else n * budget)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    work = {"episodes": n, "parameters": 0}
    say({"sample": seconds, "iteration": seconds}, tokens=tokens, work=work, versions=versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
