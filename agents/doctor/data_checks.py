"""Checks of the data and the models that an environment was made from.

They are apart from the checks of `examine`, which a training runs too: a user may want to train on
the few prompts that fit, and the environment has warned about the others.
"""

import torch
from torch import Tensor

from agents.doctor.subject import Problem, Subject
from rlhf_gym.data.endings import turn_end
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tasks.prompt_form import form_problems, reward_models
from rlhf_gym.tokens import continuations, pad_rows

GAP = 1.0
"""Most standard deviations of the score by which a response may score higher for having no end."""

POSSIBLE = 1e-6
"""Highest probability of an EOS, over all states of a batch, at which responses cannot end."""


def prompts(subject: Subject) -> Problem | None:
    """Check that at least half of the prompts fit into `max_prompt_tokens`."""
    data = subject.env.prompts
    if data.dropped <= len(data):
        return None
    return Problem(
        "prompts",
        f"{data.dropped} of {len(data) + data.dropped} prompts are dropped, {data.empty} of them "
        f"because they have no tokens and the others because they are longer than "
        f"max_prompt_tokens, which is {data.max_tokens}",
        "raise max_prompt_tokens, or cut texts with prompt_keep='last'; else the policy learns "
        "only from the short prompts",
    )


def weights(subject: Subject) -> Problem | None:
    """Check that all weights are finite, and that no reward model is in training mode."""
    models = {
        "the policy": subject.policy.core.model,
        "the reference": subject.objective.reference.model,
    }
    for reward in reward_models(subject.objective.reward):
        models[f"the reward model {reward.model.name_or_path!r}"] = reward.model
    for who, model in models.items():
        for name, weight in model.state_dict().items():
            if not torch.isfinite(weight).all():
                return Problem(
                    "weights",
                    f"the weight {name} of {who} has a NaN or an infinity",
                    "the training that saved it diverged; take an earlier checkpoint",
                )
    for reward in reward_models(subject.objective.reward):
        if any(module.training for module in reward.model.modules()):
            return Problem(
                "weights",
                f"the reward model {reward.model.name_or_path!r} is in training mode, in which "
                "dropout changes its scores from call to call",
                "call its eval(), or load it with RewardModel.load",
            )
    return None


def form(subject: Subject) -> Problem | None:
    """Check that the prompts are chats or texts as the models expect, in words that they know."""
    objective = subject.objective
    found = form_problems(subject.env.prompts, objective.reference, reward_models(objective.reward))
    if not found:
        return None
    return Problem("form", "; ".join(what for what, _ in found), "; ".join(fix for _, fix in found))


def endings(subject: Subject) -> Problem | None:
    """Check that responses can end, and end as the chat template and the reward model expect."""
    if not subject.env.stop_at_eos:
        return None
    reference = subject.objective.reference
    tokenizer, eos_ids = reference.tokenizer, reference.eos_ids
    stops = f"generation stops at {_named(eos_ids, reference.vocab_size, tokenizer)}"
    fix = "set eos_token_id in the model's generation_config.json"
    if subject.env.prompts.chats:
        ends = turn_end(tokenizer)
        if ends and not set(ends) & set(eos_ids):
            return Problem(
                "endings",
                f"the chat template ends an answer with {tokenizer.decode(ends)!r}, but {stops}: "
                "a policy that ends its turn would go on",
                fix,
            )
    elif tokenizer.eos_token_id not in eos_ids:
        return Problem(
            "endings",
            f"the tokenizer's EOS is {tokenizer.eos_token!r}, with which texts are closed in "
            f"training, but {stops}",
            fix,
        )
    allowed = [i for i in eos_ids if i < reference.vocab_size and i not in reference.mask.never]
    if allowed and not _can_end(subject, allowed):
        return Problem(
            "endings",
            f"{stops}, but no response of the policy ended, and in no state was the probability "
            f"of that above {POSSIBLE}: all responses would run into the budget",
            "take a model that was trained to end its answers (rlhf-gym sft), or set stop_at_eos "
            "to false",
        )
    return _pays_for_no_end(subject)


def _named(ids: tuple[int, ...], size: int, tokenizer: object) -> str:
    names = [repr(tokenizer.convert_ids_to_tokens(i)) if i < size else "no token" for i in ids]  # type: ignore[attr-defined]
    return ", ".join(f"{i} ({name})" for i, name in zip(ids, names, strict=True))


@torch.no_grad()
def _can_end(subject: Subject, eos_ids: list[int]) -> bool:
    """Whether a response of the batch ended, or might have."""
    core = subject.policy.core
    hidden, limits = core.states(subject.sequences), core.limits(subject.sequences)
    likely = torch.softmax(core.logits(hidden, limits), -1)[:, eos_ids].sum(-1)
    return float(likely.max()) > POSSIBLE


def _pays_for_no_end(subject: Subject) -> Problem | None:
    """Check that the reward model does not pay responses for running into the budget."""
    objective = subject.objective
    models = reward_models(objective.reward)
    if not models or not all(model.causal for model in models):
        return None
    finished, cut = _scores_with_and_without_end(subject, objective)
    if len(finished) < 2:
        return None
    gap = float((cut - finished).mean() / finished.std().clamp(min=1e-6))
    if gap <= GAP:
        return None
    return Problem(
        "endings",
        f"the reward model scores a response without its end {gap:.1f} standard deviations higher "
        "than the same response with it: running into the budget is paid",
        "train the reward model with answers of both kinds (rlhf-gym reward-model --unfinished "
        "0.4), or take off something for a missing EOS (shaping: missing_eos_penalty)",
    )


def _scores_with_and_without_end(subject: Subject, objective: Objective) -> tuple[Tensor, Tensor]:
    """Scores by the reward model alone of the batch's responses, closed and open: two (N,)."""
    reward = objective.reward
    reference = objective.reference
    rows = [row[row >= 0].tolist() for row in subject.responses]
    bare = [row[:-1] if row[-1] in reference.eos_ids else row for row in rows]
    # A response that is nothing but its end cannot be scored without it.
    kept = [i for i, row in enumerate(bare) if row]
    end = next(i for i in reference.eos_ids if i < reference.vocab_size)
    plain = Objective(reference, reward, kl_coef=0.0, chats=objective.chats)

    def scores(closing: list[int]) -> Tensor:
        answers = torch.from_numpy(pad_rows([[*bare[i], *closing] for i in kept]))
        sequences = continuations(subject.prompts[kept], answers.to(subject.prompts.device))
        return plain.final_scores(Responses(reference, sequences, chats=objective.chats)).double()

    return scores([end]), scores([])
