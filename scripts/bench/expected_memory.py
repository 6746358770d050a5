"""How much memory an iteration of PPO on a shared trunk ought to take, from its shape alone."""

from typing import Any

FLOAT = 4  # bytes


def expected_bytes(
    config: Any, parameters: int, *, rows: int, prompt: int, response: int, logits: int
) -> int:
    """Four copies of the parameters, reference, reward model and what a micro-batch keeps.

    The copies are the weights, their gradient and Adam's two moments. A layer of width d, whose
    feed-forward network is f wide, keeps 8 d floats a token around attention (inputs and outputs
    of the norms, queries, keys, values, what attention gives, the residual) and twice f in the
    network, four times with a gate. The head keeps three times V floats a response token: logits,
    their softmax, its gradient; or as much of them as are computed at a time.

    Args:
        config: Of the model, as transformers has it.
        parameters: Of the policy.
        rows: Responses of a micro-batch.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
        logits: Most logits that are computed at a time.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    gated = config.model_type != "gpt2"
    inner = config.intermediate_size if gated else 4 * width
    tokens = rows * (prompt + response - 1)
    kept = tokens * layers * (8 * width + (4 if gated else 2) * inner)
    head = 3 * min(rows * response * config.vocab_size, logits)
    return FLOAT * (4 * parameters + 2 * parameters + kept + head)
