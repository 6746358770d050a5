"""Checks of the data that an environment was made from.

They are apart from the checks of `examine`, which a training runs too: a user may want to train on
the few prompts that fit, and the environment has warned about the others.
"""

from agents.doctor.subject import Problem, Subject


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
