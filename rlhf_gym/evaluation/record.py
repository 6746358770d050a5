"""Evaluate a policy on an environment, and record the results in a folder."""

import json
from pathlib import Path
from typing import Any

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.drawing import Drawn
from rlhf_gym.evaluation.policies import evaluate
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.utils.files import write_json, write_text
from rlhf_gym.utils.progress import progress_bar, transformers_quiet

N_SAMPLES = 24


def evaluate_policy(
    policy: CausalLM | str | Path,
    env: TokenVectorEnv,
    *,
    episodes: int = 2304,
    prompts: int = 48,
    reference_samples: int = 128,
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a policy on an environment's prompts, compared with the reference and the optimum.

    Args:
        policy: The policy, or a folder that `from_pretrained` can load, or a hub name.
        env: The environment, which has the objective, the prompts and the gold scorer. Make it with
            ``split="held_out"`` for prompts that no training has seen.
        episodes: Responses of the policy over all prompts. Each prompt gets episodes // prompts.
        prompts: Number of prompts. If the environment has fewer, all are used.
        reference_samples: Responses of the reference to each prompt. They determine how precise the
            estimate of J* is.
        seed: Seed of the choice of prompts and of the responses.
        run_dir: Folder for evaluation.json (the figures) and samples.jsonl (responses of policy and
            reference, side by side). None writes nothing.
        progress: Whether to show progress on stderr.

    Returns:
        The figures (see `rlhf_gym.evaluation.policies.summarise`), `split`: which prompts they
        were measured on, and `prompts`: how many of these the environment kept and dropped.

    Raises:
        InputError: There are too few prompts or samples, the environment is wrapped, or the
            policy's vocabulary is not the reference's.
    """
    check_sizes(episodes, prompts, reference_samples)
    if not isinstance(env, TokenVectorEnv):
        raise InputError(f"{env} is not a TokenVectorEnv; evaluate on one without wrappers")
    check_prompts(env)
    n_prompts, n_policy = min(prompts, len(env.prompts)), episodes // prompts
    total = n_prompts * (n_policy + reference_samples)
    with transformers_quiet():
        if not isinstance(policy, CausalLM):
            policy = CausalLM.load(str(policy), device=env.objective.reference.device)
        with progress_bar("evaluating responses", total, shown=progress) as advance:
            figures, from_policy, from_reference = evaluate(
                policy,
                env.objective,
                env.prompts,
                max_new_tokens=env.max_new_tokens,
                stop_at_eos=env.stop_at_eos,
                n_prompts=n_prompts,
                n_policy=n_policy,
                n_reference=reference_samples,
                gold=env.gold,
                seed=seed,
                progress=advance,
            )
    figures["split"] = env.prompts.split
    figures["prompts"] = env.prompts.counts
    if run_dir is not None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rows = samples(from_policy, from_reference)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(folder / "samples.jsonl", "".join(lines))
        write_json(folder / "evaluation.json", figures)
    return figures


def check_prompts(env: TokenVectorEnv) -> None:
    """Raise an InputError if an environment has too few prompts for an evaluation."""
    if len(env.prompts) >= 2:
        return
    split = env.prompts.split
    other = {
        "all": "",
        "train": ", lower held_out, or use all of them with split='all'",
        "held_out": ", raise held_out, or use all of them with split='all'",
    }
    dropped = f" ({env.prompts.dropped} more do not fit)" if env.prompts.dropped else ""
    raise InputError(
        f"an evaluation needs at least two prompts, and split {split!r} has only "
        f"{len(env.prompts)}{dropped}: give more prompts{other[split]}"
    )


def check_sizes(episodes: int, prompts: int, reference_samples: int) -> None:
    """Raise an InputError if an evaluation of these sizes has too few prompts or responses."""
    if prompts < 2 or episodes < prompts or reference_samples < 1:
        raise InputError(
            "prompts must be at least 2, episodes at least prompts, reference_samples at least 1"
        )


def samples(policy: Drawn, reference: Drawn) -> list[dict[str, Any]]:
    """Return the first responses of policy and reference to some prompts, side by side."""
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
