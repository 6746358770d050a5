"""Expected memory of a PPO iteration with a shared trunk, computed from its shape."""

from typing import Any

FLOAT = 4  # bytes


def expected_bytes(
    config: Any, parameters: int, *, rows: int, prompt: int, response: int, logits: int
) -> int:
    """Return the expected memory in bytes.

    It is the sum of four copies of the policy's parameters (weights, gradient, Adam's two moments),
    the reference, the reward model, and the activations of a micro-batch that the backward pass
    needs. A layer of width d with a feed-forward network of width f keeps these floats per token:
    8 d around attention (inputs and outputs of the norms, queries, keys, values, output of the
    attention, residual) and 2 f in the network, or 4 f if it has a gate. The head keeps 3 V floats
    per response token (logits, their softmax, its gradient), for the logits of one chunk at most.

    Args:
        config: The model's configuration from transformers.
        parameters: Number of the policy's parameters.
        rows: Responses in a micro-batch.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
        logits: Maximum number of logits that are computed at once.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    gated = config.model_type != "gpt2"
    inner = config.intermediate_size if gated else 4 * width
    tokens = rows * (prompt + response - 1)
    kept = tokens * layers * (8 * width + (4 if gated else 2) * inner)
    head = 3 * min(rows * response * config.vocab_size, logits)
    return FLOAT * (4 * parameters + 2 * parameters + kept + head)
