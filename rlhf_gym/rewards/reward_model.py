"""A listwise reward model: P(y_i | x) = softmax over the K candidates of a comparison.

Any `AutoModelForSequenceClassification(num_labels=1)` serves. Its `logit` explains choices; the
`score` = gain · logit + bias is what an environment pays. The gain is folded into the head and
the bias kept in the config, so both survive `save_pretrained`, and plain transformers' logit plus
the config's bias is our score (for single unpadded rows whose pad id is not their EOS id:
elsewhere transformers looks for the last id that is not pad, and misses an EOS that equals it).

Notation: N comparisons, K_n candidates in comparison n, B rows in all, L columns, M heads (one,
unless the model is an ensemble of heads on one trunk).
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_gym.data.prompts import Prompt, continued_ids, prompt_text
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import trunk
from rlhf_gym.lm.batching import by_length, layer_operations, pass_cost, passes, tokens_per_pass
from rlhf_gym.lm.loading import load_pretrained, load_tokenizer, weights_stamp
from rlhf_gym.rewards.shared_prompts import last_states, last_states_after, repeated, shares_prefix
from rlhf_gym.tokens import PAD, Sequences, model_ids, row_lengths

# A shared prompt costs a second call of the trunk: it must spare a tenth of the work.
MAX_SHARE = 0.9


class RewardModel(nn.Module):
    """A sequence classifier, scored at the last real token of each row.

    Args:
        model: The classifier. Where its head is a linear layer named `score` over a causal trunk
            (GPT-2, Llama, Qwen, Pythia, OPT …) the last real token is found from the rows'
            lengths; any other classifier (BERT …) is called whole with an attention mask.
        tokenizer: The tokenizer that belongs to it.
        label: The label that is the reward, by name or index, of a classifier with several.
        probability: Pay the label's probability instead of its logit (a softmax, or a sigmoid
            where the labels do not exclude each other).

    Raises:
        InputError: The model has several labels and `label` is none of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str | int | None = None,
        probability: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        gains = torch.tensor(getattr(model.config, "reward_gain", 1.0)).float().reshape(-1)
        biases = torch.tensor(getattr(model.config, "reward_bias", 0.0)).float().reshape(-1)
        self.gains, self.biases = gains, biases
        self.probability = probability
        self.column: int | None = None
        if model.config.num_labels != len(gains):
            self.column = _label_index(model, label)
        elif label is not None:
            if len(gains) > 1:
                raise InputError(
                    f"{model.name_or_path!r} is an ensemble of {len(gains)} heads; it has no labels"
                )
            _label_index(model, label)  # a single label may be named, if it is its name

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        label: str | int | None = None,
        probability: bool = False,
    ) -> "RewardModel":
        """Load a trained reward model by hub name or local path.

        Raises:
            InputError: It cannot be loaded, has several labels and none is named, or has no
                trained head.
        """
        model = load_pretrained(AutoModelForSequenceClassification, name, revision=revision)
        architectures = model.config.architectures or []
        if not any("ForSequenceClassification" in kind for kind in architectures):
            raise InputError(
                f"{name!r} is a {' or '.join(architectures) or 'model'} without a reward head; "
                "train one on it first: scripts/train_reward_model.py --backbone " + name
            )
        tokenizer = load_tokenizer(name, revision=revision)
        return cls(model, tokenizer, label=label, probability=probability).to(device)

    @classmethod
    def from_backbone(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        heads: int = 1,
        tokenizer: str | None = None,
    ) -> "RewardModel":
        """Put a fresh head on a causal LM, or on the trunk of any classifier.

        The head's weights have standard deviation 1/√(d+1) and its bias is 0 (Stiennon et al.
        2020), so a new model's logits spread by about 1. Several heads are an ensemble. `tokenizer`
        says where the tokenizer lies if not with the model.

        Raises:
            InputError: There is not at least one head, or weights other than the head's do not fit.
        """
        if heads < 1:
            raise InputError(f"a reward model has at least one head, not {heads}")
        model = load_pretrained(
            AutoModelForSequenceClassification,
            name,
            revision=revision,
            ignore_mismatched_sizes=True,
            num_labels=heads,
            problem_type=None,
        )
        head = _head(model)
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        plain: Any = (1.0, 0.0) if heads == 1 else ([1.0] * heads, [0.0] * heads)
        model.config.reward_gain, model.config.reward_bias = plain
        words = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(name, revision=revision)
        return cls(model, words).to(device)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def causal(self) -> bool:
        """Whether it reads token after token, and is scored at the last one."""
        return isinstance(getattr(self.model, "score", None), nn.Linear)

    @property
    def heads(self) -> int:
        """M."""
        return 1 if self.column is not None else len(self.gains)

    @property
    def head(self) -> nn.Linear:
        """The last layer, with one output for each label."""
        return _head(self.model)

    @property
    def gain(self) -> float | list[float]:
        """The gain; a list where there are several heads."""
        return _plain(self.gains)

    @property
    def bias(self) -> float | list[float]:
        """The bias; a list where there are several heads."""
        return _plain(self.biases)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of rows of token ids: (B, L) right-padded with PAD -> (B, M) float32."""
        out = torch.zeros(len(tokens), self.heads, device=self.device)
        lengths, most = row_lengths(tokens).tolist(), tokens_per_pass(tokens.device)
        for group in by_length(lengths, most, pass_cost(self.model)):
            rows = torch.tensor(group, device=tokens.device)
            out[rows] = self._as_logits(self._raw(tokens[rows]))
        return out

    def compare(
        self, prompts: Tensor, candidates: Tensor, sizes: Tensor, *, share: bool = True
    ) -> Tensor:
        """Logits of the candidates of N prompts, each prompt computed once where that pays.

        Equal to `forward` on the joined rows (to 1e-5 in float32), gradient included.

        Args:
            prompts: (N, P) right-padded with PAD.
            candidates: (B, C) right-padded with PAD, prompt after prompt.
            sizes: (N,) int64, candidates of each prompt; B = sizes.sum().
            share: Whether prompts may be shared at all.

        Returns:
            (B, M) float32.
        """
        if not share or not self.shares(prompts, candidates):
            return self._as_logits(self._raw(repeated(prompts, candidates, sizes)))
        states = last_states_after(self.model, prompts, candidates, sizes)
        return self._as_logits(_score(self.model)(states))

    def shares(self, prompts: Tensor, candidates: Tensor) -> bool:
        """Whether `compare` computes each of these prompts once."""
        if not self.causal:
            return False
        n, p = prompts.shape
        b, c = candidates.shape
        # Once shared, a candidate's tokens look at all columns; a plain row's at half of them.
        plain = layer_operations(self.model, b * (p + c), b * (p + c) ** 2 / 2)
        shared = layer_operations(self.model, n * p + b * c, n * p**2 / 2 + b * c * (p + c))
        empty = bool((row_lengths(prompts) == 0).any() or (row_lengths(candidates) == 0).any())
        return shared <= MAX_SHARE * plain and not empty and shares_prefix(self.model)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Mean logit over the heads, no gradient: (B, L) -> (B,)."""
        return self(tokens).mean(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def member_scores(self, tokens: Tensor) -> Tensor:
        """Gain · logit + bias by each head, no gradient: (B, L) -> (B, M) float32."""
        if self.probability:
            return torch.cat([self._probability(part) for part in tokens.split(64)])[:, None]
        logits: Tensor = self(tokens)
        return self.gains.to(self.device) * logits + self.biases.to(self.device)

    def scores(self, tokens: Tensor) -> Tensor:
        """The score: (B, L) -> (B,) float32, no gradient."""
        return self.pooled(self.member_scores(tokens))

    @torch.no_grad()
    def scores_along(self, sequences: Sequences) -> Tensor:
        """The score of each response as if it ended at each of its chosen tokens, (M,) float32.

        Raises:
            InputError: It is no causal trunk with one head, which alone scores all in one pass.
        """
        if not self.causal or self.heads > 1 or self.probability:
            raise InputError(
                f"{self.model.name_or_path!r} cannot score unfinished responses in one pass: that "
                "takes a causal trunk with one head, and its logit as reward"
            )
        out = torch.zeros(int(sequences.lengths.sum()), device=self.device)
        for part, places in passes(self.model, sequences):
            hidden = trunk(self.model)(input_ids=model_ids(part.tokens), use_cache=False)
            rows, columns = part.cells()
            raw = _score(self.model)(hidden.last_hidden_state[rows, columns]).float()
            column = 0 if self.column is None else self.column
            out[places] = raw[:, column] + self.biases.to(self.device)
        return out

    def pooled(self, scores: Tensor) -> Tensor:
        """One score of the heads': (B, M) -> (B,); an ensemble may pool otherwise."""
        return scores.mean(1)

    def _raw(self, tokens: Tensor) -> Tensor:
        """What the classifier itself says: (B, L) -> (B, number of labels) float32."""
        tokens = tokens[:, : max(int(row_lengths(tokens).max()), 1)]
        if self.causal:
            return cast(Tensor, _score(self.model)(last_states(self.model, tokens))).float()
        mask = (tokens != PAD).long()
        raw: Tensor = self.model(input_ids=model_ids(tokens), attention_mask=mask).logits
        return raw.float()

    def _probability(self, tokens: Tensor) -> Tensor:
        raw = self._raw(tokens)
        # A single label, or several that do not exclude each other, are a yes or no each.
        each = self.model.config.problem_type == "multi_label_classification" or raw.shape[1] == 1
        said = raw.sigmoid() if each else raw.softmax(-1)
        return said[:, self.column or 0]

    def _as_logits(self, raw: Tensor) -> Tensor:
        if self.column is not None:
            return raw[:, self.column, None].float()
        return raw.float() / self.gains.to(raw.device)

    def encode(self, prompt: Prompt, response: str) -> list[int]:
        """Ids of a prompt, text or chat messages by its own template, and a response.

        A causal trunk reads them token after token, closed by its EOS; any other classifier reads
        one text with the special tokens of its tokenizer.
        """
        if not self.causal:
            return list(self.tokenizer(prompt_text(prompt, self.tokenizer) + response)["input_ids"])
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        start, (rest,) = continued_ids(prompt, [response], self.tokenizer, eos)
        return [*start, *rest, *eos]

    def normalise(self, tokens: Tensor) -> None:
        """Set gain and bias so that scores of these rows (B, L) have mean 0 and variance 1.

        Raises:
            InputError: The logits do not vary, so no gain could make their variance 1.
        """
        gains, means = self._spread(tokens)
        self.set_gain(gains, -means * gains)

    @torch.no_grad()
    def start_at(self, tokens: Tensor) -> None:
        """Scale an untrained head so that its logits on these rows (B, L) have variance 1.

        So every backbone starts as far from certainty as any other; their mean does not matter to
        a choice, and goes into the bias.
        """
        gains, means = self._spread(tokens)
        head = self.head
        head.weight.mul_(gains[:, None].to(self.device))
        if head.bias is not None:
            head.bias.mul_(gains.to(self.device))
        self.set_gain(self.gains, -means * gains * self.gains)

    def _spread(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.column is not None:
            raise InputError("a classifier with several labels keeps its own scale")
        with torch.no_grad():
            logits = self(tokens).double().cpu()
        spread = logits.std(0, correction=0)
        if not bool((spread > 1e-6).all()):
            raise InputError(
                f"the reward model gives {len(tokens)} responses the same logit (standard "
                f"deviation {float(spread.min()):.1e}); train it longer, or on more comparisons"
            )
        return (1 / spread).float(), logits.mean(0).float()

    @torch.no_grad()
    def set_gain(self, gain: Tensor | float, bias: Tensor | float) -> None:
        """Pay gain · logit + bias from now on; the gain is folded into the head."""
        gains = torch.as_tensor(gain).float().reshape(-1).expand_as(self.gains).clone()
        biases = torch.as_tensor(bias).float().reshape(-1).expand_as(self.biases).clone()
        head = self.head
        factor = (gains / self.gains).to(self.device)
        head.weight.mul_(factor[:, None])
        if head.bias is not None:
            head.bias.mul_(factor)
        self.gains, self.biases = gains, biases
        self.model.config.reward_gain, self.model.config.reward_bias = self.gain, self.bias

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model (safetensors), config with gain and bias, and tokenizer."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def shared_reward_model(
    name: str,
    revision: str | None,
    device: str,
    label: str | int | None = None,
    probability: bool = False,
) -> RewardModel:
    """The process's one frozen copy of a reward model."""
    return _frozen(name, revision, device, label, probability, weights_stamp(name))


@lru_cache(maxsize=16)
def _frozen(
    name: str,
    revision: str | None,
    device: str,
    label: str | int | None,
    probability: bool,
    stamp: int,
) -> RewardModel:
    model = RewardModel.load(
        name, revision=revision, device=device, label=label, probability=probability
    )
    return model.requires_grad_(False).eval()


def _score(model: PreTrainedModel) -> nn.Linear:
    return cast(nn.Linear, model.score)


def _head(model: PreTrainedModel) -> nn.Linear:
    wide = model.config.num_labels
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == wide]
    if not heads:
        raise InputError(f"{type(model).__name__} has no linear head with {wide} outputs")
    return heads[-1]


def _plain(values: Tensor) -> float | list[float]:
    return float(values) if len(values) == 1 else [float(v) for v in values]


def _label_index(model: PreTrainedModel, label: str | int | None) -> int:
    names = {int(i): str(name) for i, name in (model.config.id2label or {}).items()}
    for i, name in names.items():
        if label in (i, name):
            return i
    wanted = "none is named" if label is None else f"{label!r} is none of them"
    raise InputError(
        f"the classifier {model.name_or_path!r} has the labels {', '.join(names.values())}; "
        f"{wanted}: say which one is the reward (reward_label)"
    )
