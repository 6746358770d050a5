"""A listwise reward model: P(y_i | x) = softmax over the K candidates of a comparison.

Any `AutoModelForSequenceClassification(num_labels=1)` serves. Its `logit` explains choices; the
`score` = gain · logit + bias is what an environment pays. The gain is folded into the head and
the bias kept in the config, so both survive `save_pretrained`, and plain transformers' logit plus
the config's bias is our score (for single unpadded rows whose pad id is not their EOS id:
elsewhere transformers looks for the last id that is not pad, and misses an EOS that equals it).

Notation: N comparisons, K_n candidates in comparison n, B rows in all, L columns.
"""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_gym.errors import InputError
from rlhf_gym.lm import (
    load_pretrained,
    load_tokenizer,
    tokens_per_pass,
    trunk,
    weights_stamp,
)
from rlhf_gym.tokens import PAD, model_ids, row_lengths


class RewardModel(nn.Module):
    """A sequence classifier with one label, scored at the last real token of each row.

    Args:
        model: The classifier. Where its head is a linear layer named `score` over a causal trunk
            (GPT-2, Llama, Qwen, Pythia, OPT …) the last real token is found from the rows'
            lengths; any other classifier (BERT …) is called whole with an attention mask.
        tokenizer: The tokenizer that belongs to it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.gain = float(getattr(model.config, "reward_gain", 1.0))
        self.bias = float(getattr(model.config, "reward_bias", 0.0))

    @classmethod
    def load(
        cls, name: str, *, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> "RewardModel":
        """Load a trained reward model by hub name or local path.

        Raises:
            InputError: It cannot be loaded, has more than one label, or has no trained head.
        """
        model = load_pretrained(AutoModelForSequenceClassification, name, revision=revision)
        architectures = model.config.architectures or []
        if not any("ForSequenceClassification" in kind for kind in architectures):
            raise InputError(
                f"{name!r} is a {' or '.join(architectures) or 'model'} without a reward head; "
                "train one on it first: scripts/train_reward_model.py --backbone " + name
            )
        if model.config.num_labels != 1:
            raise InputError(
                f"the reward model {name!r} has {model.config.num_labels} labels; one is needed"
            )
        return cls(model, load_tokenizer(name, revision=revision)).to(device)

    @classmethod
    def from_backbone(
        cls, name: str, *, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> "RewardModel":
        """Put a fresh head on a causal LM (or on a classifier's trunk).

        The head's weights have standard deviation 1/√(d+1) and its bias is 0 (Stiennon et al.
        2020), so a new model's logits spread by about 1.
        """
        model = load_pretrained(
            AutoModelForSequenceClassification, name, revision=revision, num_labels=1
        )
        head = _head(model)
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        model.config.reward_gain, model.config.reward_bias = 1.0, 0.0
        return cls(model, load_tokenizer(name, revision=revision)).to(device)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of rows of token ids: (B, L) right-padded with PAD -> (B,) float32."""
        out = torch.zeros(len(tokens), device=self.device)
        step = max(1, tokens_per_pass(tokens.device) // max(tokens.shape[1], 1))
        # Rows of like length together, so that little is spent on padding.
        for rows in torch.argsort(row_lengths(tokens)).split(step):
            out[rows] = self._logits(tokens[rows])
        return out

    def _logits(self, tokens: Tensor) -> Tensor:
        lengths = row_lengths(tokens)
        tokens = tokens[:, : max(int(lengths.max()), 1)]
        head = getattr(self.model, "score", None)
        if isinstance(head, nn.Linear):
            hidden = trunk(self.model)(input_ids=model_ids(tokens), use_cache=False)
            rows = torch.arange(len(tokens), device=tokens.device)
            raw = head(hidden.last_hidden_state[rows, lengths - 1])
        else:
            mask = (tokens != PAD).long()
            raw = self.model(input_ids=model_ids(tokens), attention_mask=mask).logits
        return raw[:, 0].float() / self.gain  # type: ignore[no-any-return]

    def logits(self, tokens: Tensor) -> Tensor:
        """The same without gradient: (B, L) -> (B,)."""
        with torch.no_grad():
            return self(tokens)  # type: ignore[no-any-return]

    def scores(self, tokens: Tensor) -> Tensor:
        """Gain · logit + bias of rows of token ids: (B, L) -> (B,) float32, no gradient."""
        return self.gain * self.logits(tokens) + self.bias

    def encode(self, prompt_ids: list[int], response: str) -> list[int]:
        """Ids of a prompt followed by a response given as text, closed by this tokenizer's EOS."""
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        return [*prompt_ids, *ids, *([] if eos is None else [eos])]

    @torch.no_grad()
    def normalise(self, tokens: Tensor) -> None:
        """Set gain and bias so that scores of these rows (B, L) have mean 0 and variance 1.

        Raises:
            InputError: The logits do not vary, so no gain could make their variance 1.
        """
        logits = self.logits(tokens).double()
        spread = float(logits.std(correction=0))
        if not spread > 1e-6:
            raise InputError(
                f"the reward model gives {len(tokens)} sampled responses the same logit (standard "
                f"deviation {spread:.1e}); train it longer, or on more comparisons"
            )
        self.set_gain(1 / spread, -float(logits.mean()) / spread)

    @torch.no_grad()
    def set_gain(self, gain: float, bias: float) -> None:
        """Pay gain · logit + bias from now on; the gain is folded into the head."""
        head = _head(self.model)
        head.weight.mul_(gain / self.gain)
        if head.bias is not None:
            head.bias.mul_(gain / self.gain)
        self.gain, self.bias = gain, bias
        self.model.config.reward_gain, self.model.config.reward_bias = gain, bias

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model (safetensors), config with gain and bias, and tokenizer."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def shared_reward_model(name: str, revision: str | None, device: str) -> RewardModel:
    """The process's one frozen copy of a reward model."""
    return _frozen(name, revision, device, weights_stamp(name))


@lru_cache(maxsize=8)
def _frozen(name: str, revision: str | None, device: str, stamp: int) -> RewardModel:
    return RewardModel.load(name, revision=revision, device=device).requires_grad_(False).eval()


def _head(model: PreTrainedModel) -> nn.Linear:
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not heads:
        raise InputError(f"{type(model).__name__} has no linear head with one output")
    return heads[-1]


def choice_log_probs(logits: Tensor, sizes: Tensor) -> Tensor:
    """Log P(y_i | x_n) of every candidate: softmax over the candidates of its own comparison.

    Args:
        logits: (B,) of all candidates, comparison after comparison.
        sizes: (N,) int64, K_n of each comparison; B = sizes.sum().

    Returns:
        (B,) log-probabilities.
    """
    rows = torch.repeat_interleave(sizes)
    peak = torch.full((len(sizes),), -torch.inf, dtype=logits.dtype, device=logits.device)
    peak = peak.scatter_reduce(0, rows, logits.detach(), "amax")
    shifted = logits - peak[rows]
    total = torch.zeros_like(peak).index_add(0, rows, shifted.exp())
    return shifted - total.log()[rows]


def listwise_loss(logits: Tensor, sizes: Tensor, chosen: Tensor) -> Tensor:
    """−log P(chosen | x_n) of each comparison; its mean is the loss, equal to maximum likelihood.

    With K = 2 it is Bradley–Terry: −log σ(logit_chosen − logit_rejected).

    Args:
        logits: (B,) of all candidates, comparison after comparison.
        sizes: (N,) int64, K_n of each comparison.
        chosen: (N,) int64, index of the chosen candidate within its comparison.

    Returns:
        (N,) nats. Source: Ziegler et al. 2019, equation 1.
    """
    first = torch.cumsum(sizes, 0) - sizes
    return -choice_log_probs(logits, sizes)[first + chosen]
