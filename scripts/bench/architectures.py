"""Benchmark of sampling for families of models, next to transformers' `generate`.

`python scripts/bench/architectures.py --output docs/results/architectures-cpu.json` makes a small
random model of each family, and lets this project and `generate` sample from it in turn: the same
prompts of different lengths, the same number of tokens, float32. It prints the median seconds,
their ratio and how the model was decoded, checks the log-probs of every token against full forward
passes, and writes JSON. Run it on a machine without other load.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import measured_on
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import rlhf_gym
from agents.cli.command import device, run
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM, continuation_log_probs
from rlhf_gym.lm.decoding.method import decoding_method
from rlhf_gym.lm.decoding.sampling import Sampled, sample_with_log_probs
from rlhf_gym.tokens import pad_rows, row_lengths
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.process import prepare_process

VOCAB = 512
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {**GROUPED, "sliding_window": 4096},
    "mistral-short": {"model_type": "mistral", **GROUPED, "sliding_window": 32},
    "gemma3": {
        "model_type": "gemma3_text",
        **GROUPED,
        "sliding_window": 32,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    },
    "qwen3_next": {
        **GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
    },
    "mamba2": {"state_size": 32, "head_dim": 32, "num_heads": 8, "n_groups": 1, "chunk_size": 32},
    "bloom": {},
}
TOLERANCE = 1e-5
"""Largest difference to a full forward pass, in nats per token, in float32 on a CPU."""


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Families to time, from this script's table."""
    rows: int = 48
    """Responses that are sampled together."""
    prompt: tuple[int, int] = (16, 32)
    """Fewest and most tokens of a prompt."""
    response: int = 128
    """Tokens of each response."""
    repeats: int = 7
    """Timed turns of each system; one more is a warm-up."""
    device: str = "auto"
    """Where to run: auto, cpu or cuda."""
    output: Path = Path("runs/bench_architectures.json")
    """JSON file to write."""


def main(config: Config) -> None:
    """Time all families; print a table and write the JSON file."""
    unknown = set(config.families) - set(FAMILIES)
    if unknown:
        raise InputError(f"unknown families {sorted(unknown)}; choose from {sorted(FAMILIES)}")
    prepare_process()
    where = device(config.device)
    results = [measure(config, name, where) for name in config.families]
    versions = {name: version(name) for name in ("torch", "transformers")}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        config.output,
        {
            "families": results,
            "measured_on": measured_on(where),
            "versions": {
                "python": sys.version.split()[0],
                "rlhf_gym": rlhf_gym.__version__,
                **versions,
            },
        },
    )
    table = Table(title=f"sampling {config.rows} responses of {config.response} tokens, medians")
    for heading in ("family", "method", "rlhf_gym, s", "generate, s", "generate ÷ rlhf_gym"):
        table.add_column(heading)
    for row in results:
        seconds = (f"{row[who]['median']:.3f}" for who in ("rlhf_gym", "generate"))
        table.add_row(row["family"], row["method"], *seconds, f"{row['ratio']:.2f}")
    Console().print(table)


def measure(config: Config, name: str, where: str) -> dict[str, Any]:
    """Time one family in both systems, which take turns."""
    lm = make_model(name, where)
    fewest, most = config.prompt
    rng = np.random.default_rng(0)
    lengths = rng.integers(fewest, most + 1, config.rows)
    drawn = [rng.integers(2, VOCAB, n).tolist() for n in lengths]
    prompts = torch.from_numpy(pad_rows(drawn, most)).to(where)
    method = decoding_method(lm, most + config.response)
    ours: list[float] = []
    theirs: list[float] = []
    sampled = None
    for turn in range(config.repeats + 1):
        seconds, sampled = timed(lambda: ours_once(lm, prompts, config.response), where)
        generated, _ = timed(lambda: generate_once(lm.model, prompts, config.response), where)
        if turn:
            ours.append(seconds)
            theirs.append(generated)
    assert sampled is not None
    expected = continuation_log_probs(lm, prompts, sampled.responses)
    gap = float((sampled.log_probs - expected).abs().max())
    if where == "cpu" and gap > TOLERANCE:
        raise InputError(f"the log-probs of {name} differ from a full forward pass by {gap:.2g}")
    medians = {"rlhf_gym": ours, "generate": theirs}
    return {
        "family": name,
        "config": FAMILIES[name],
        "rows": config.rows,
        "prompt": list(config.prompt),
        "response": config.response,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "method": method,
        "largest_log_prob_difference": gap,
        **{
            who: {"median": statistics.median(seconds), "seconds": seconds}
            for who, seconds in medians.items()
        },
        "ratio": statistics.median(theirs) / statistics.median(ours),
    }


def make_model(name: str, where: str) -> CausalLM:
    """Return a random model of a family, with a tokenizer of numbers."""
    torch.manual_seed(0)
    options = {**COMMON, "model_type": name, **FAMILIES[name]}
    model_type = options.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    raw = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="t1", pad_token="t0")
    return CausalLM.wrap(model.eval().to(where), tokenizer)


def timed(work: Callable[[], Any], where: str) -> tuple[float, Any]:
    """Return the seconds that some work took, and its result."""
    begun = time.perf_counter()
    found = work()
    if where == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, found


def ours_once(lm: CausalLM, prompts: Tensor, budget: int) -> Sampled:
    """Sample whole responses with this project; log-probs are part of the result."""
    return sample_with_log_probs(lm, prompts, budget, stop_at_eos=False)


@torch.no_grad()
def generate_once(model: PreTrainedModel, prompts: Tensor, budget: int) -> Tensor:
    """Sample the same number of tokens with `generate`, prompts padded on the left."""
    lengths = row_lengths(prompts)
    columns = torch.arange(prompts.shape[1], device=prompts.device)
    at = columns - (prompts.shape[1] - lengths)[:, None]
    # Without an EOS, `generate` neither checks for it nor masks its logit.
    model.generation_config.eos_token_id = None
    out: Tensor = model.generate(
        prompts.gather(1, at.clamp(min=0)),
        attention_mask=(at >= 0).long(),
        max_new_tokens=budget,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=0,
    )
    return out


if __name__ == "__main__":
    run(main, Config, __doc__)
