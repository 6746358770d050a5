"""An evaluation, written into a folder."""

import json
from pathlib import Path
from typing import Any

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.policies import Drawn, evaluate
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.utils.files import write_json, write_text
from rlhf_gym.utils.progress import progress_bar

N_SAMPLES = 24


def measure(
    env: TokenVectorEnv,
    policy: CausalLM,
    run_dir: Path,
    *,
    n_prompts: int,
    n_policy: int,
    n_reference: int,
    seed: int,
) -> dict[str, Any]:
    """Evaluate on the environment's prompts and write evaluation.json and samples.jsonl."""
    n_prompts = min(n_prompts, len(env.prompts))
    if n_prompts < 2:
        raise InputError(
            "at least two held-out prompts are needed: give more prompts, or raise `held_out`"
        )
    with progress_bar("evaluating responses", n_prompts * (n_policy + n_reference)) as advance:
        figures, from_policy, from_reference = evaluate(
            policy,
            env.objective,
            env.prompts,
            max_new_tokens=env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
            n_prompts=n_prompts,
            n_policy=n_policy,
            n_reference=n_reference,
            gold=env.gold,
            seed=seed,
            progress=advance,
        )
    rows = samples(from_policy, from_reference)
    write_text(
        run_dir / "samples.jsonl",
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    )
    write_json(run_dir / "evaluation.json", figures)
    return figures


def samples(policy: Drawn, reference: Drawn) -> list[dict[str, Any]]:
    """The first response of both to some prompts, side by side."""
    return [
        {
            "prompt": policy.prompts[i],
            "reference": reference.texts[i][0],
            "policy": policy.texts[i][0],
            "reference_score": reference.scores[i, 0],
            "policy_score": policy.scores[i, 0],
            "reference_gold": None if reference.gold is None else reference.gold[i, 0],
            "policy_gold": None if policy.gold is None else policy.gold[i, 0],
        }
        for i in range(min(N_SAMPLES, len(policy.prompts)))
    ]
