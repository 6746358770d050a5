"""A listwise reward model: P(y_i | x) = softmax over the K candidates of a comparison.

Works with any `AutoModelForSequenceClassification(num_labels=1)`. Its `logit` explains choices; the
`score` = gain · logit + bias is what an environment pays (see `rlhf_gym.rewards.score_scale`).

The logit of plain transformers plus the bias is our score for single unpadded rows whose pad id is
not their EOS id. Otherwise transformers takes the last id other than the pad id for the last token,
and so misses an EOS that has the pad id (GPT-2's tokenizer is often padded with its EOS).

Notation: N comparisons, K_n candidates in comparison n, B rows in all, L columns, M heads (one,
unless the model is an ensemble of heads on one trunk).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_gym.data.encoding import Encoded, joined_ids, prompt_ids, read_ids
from rlhf_gym.data.endings import closing_ids
from rlhf_gym.data.prompts import Prompt
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import context_length, trunk
from rlhf_gym.lm.batching import by_length, pass_cost, passes, tokens_per_pass
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.rewards.classifiers import (
    label_probability,
    linear_head,
    load_classifier,
    new_classifier,
    reward_column,
)
from rlhf_gym.rewards.score_scale import ScoreScale, multiply, standardising
from rlhf_gym.rewards.shared_prompts import (
    last_states,
    last_states_after,
    repeat_prompts,
    sharing_pays,
)
from rlhf_gym.tokens import PAD, Sequences, model_ids, row_lengths


class RewardModel(nn.Module):
    """A sequence classifier, scored at the last real token of each row.

    Args:
        model: The classifier. If its head is a linear layer named `score` on a causal trunk
            (GPT-2, Llama, Qwen, Pythia, OPT …) the last real token is found from the rows'
            lengths; any other classifier (BERT …) is called as a whole with an attention mask.
        tokenizer: The tokenizer that belongs to it.
        label: For a classifier with several labels: the one that is the reward, by name or index.
        probability: Pay the label's probability instead of its logit (a softmax, or a sigmoid if
            several labels can be true at once).

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
        self.scale = ScoreScale.of(model.config)
        self.probability = probability
        self.column = reward_column(model, len(self.scale.gains), label)

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
        model = load_classifier(name, revision)
        tokenizer = load_tokenizer(name, revision=revision)
        loaded = cls(model, tokenizer, label=label, probability=probability)
        return loaded.to(device).eval()

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
        """Put a new head on a causal LM, or on the trunk of any classifier (see `new_classifier`).

        Args:
            name: Hub name or local path of the backbone.
            revision: Commit or tag on the hub.
            device: Where to put the model.
            heads: M; several heads are an ensemble.
            tokenizer: Name or path of the tokenizer, if it is not in the backbone's folder.

        Raises:
            InputError: There is not at least one head, or weights other than the head's do not fit.
        """
        model = new_classifier(name, revision, heads)
        words = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(name, revision=revision)
        return cls(model, words).to(device)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def causal(self) -> bool:
        """Whether it reads token after token, and is scored at the last one."""
        return isinstance(getattr(self.model, "score", None), nn.Linear)

    @property
    def heads(self) -> int:
        """M."""
        return 1 if self.column is not None else len(self.scale.gains)

    @property
    def head(self) -> nn.Linear:
        """The last layer, with one output for each label."""
        return linear_head(self.model)

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and response may have together; None if nothing says."""
        return context_length(self.model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of rows of token ids: (B, L) right-padded with PAD -> (B, M) float32."""
        out = torch.zeros(len(tokens), self.heads, device=self.device)
        lengths, most = row_lengths(tokens).tolist(), tokens_per_pass(tokens.device)
        # Rows of similar length together: a padded token costs as much as a real one.
        for group in by_length(lengths, most, pass_cost(self.model)):
            rows = torch.tensor(group, device=tokens.device)
            out[rows] = self._as_logits(self._raw(tokens[rows]))
        return out

    def compare(
        self, prompts: Tensor, candidates: Tensor, sizes: Tensor, *, share: bool = True
    ) -> Tensor:
        """Logits of the candidates of N prompts; each prompt is computed once if that pays.

        Equal to `forward` on the joined rows (to 1e-5 in float32), gradient included.

        Args:
            prompts: (N, P) right-padded with PAD.
            candidates: (B, C) right-padded with PAD, prompt after prompt.
            sizes: (N,) int64, number of candidates of each prompt; B = sizes.sum().
            share: Whether prompts may be shared.

        Returns:
            (B, M) float32.
        """
        if not share or not self.shares(prompts, candidates):
            return self._as_logits(self._raw(repeat_prompts(prompts, candidates, sizes)))
        states = last_states_after(self.model, prompts, candidates, sizes)
        return self._as_logits(self._score(states))

    def shares(self, prompts: Tensor, candidates: Tensor) -> bool:
        """Whether `compare` computes each of these prompts once."""
        return self.causal and sharing_pays(self.model, prompts, candidates)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Mean logit over the heads, no gradient: (B, L) -> (B,)."""
        return self(tokens).mean(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def member_scores(self, tokens: Tensor) -> Tensor:
        """Gain · logit + bias by each head, no gradient: (B, L) -> (B, M) float32."""
        if self.probability:
            outputs = torch.cat([self._raw(part) for part in tokens.split(64)])
            return label_probability(self.model, outputs, self.column or 0)[:, None]
        return self.scale.scores(self(tokens))

    def scores(self, tokens: Tensor) -> Tensor:
        """The score: (B, L) -> (B,) float32, no gradient."""
        return self.pooled(self.member_scores(tokens))

    @torch.no_grad()
    def scores_along(self, sequences: Sequences) -> Tensor:
        """The score of each response as if it ended at each of its chosen tokens, (M,) float32.

        Raises:
            InputError: It is not a causal trunk with one head; only that scores all in one pass.
        """
        if not self.causal or self.heads > 1 or self.probability:
            raise InputError(
                f"{self.model.name_or_path!r} cannot score unfinished responses in one pass; that "
                "needs a causal trunk with one head, and its logit as reward"
            )
        out = torch.zeros(int(sequences.lengths.sum()), device=self.device)
        for part, places in passes(self.model, sequences):
            # Causal attention: the state at token t equals that of the response cut after t.
            hidden = trunk(self.model)(input_ids=model_ids(part.tokens), use_cache=False)
            rows, columns = part.cells()
            raw = self._score(hidden.last_hidden_state[rows, columns]).float()
            column = 0 if self.column is None else self.column
            out[places] = raw[:, column] + self.scale.biases.to(self.device)
        return out

    def pooled(self, scores: Tensor) -> Tensor:
        """Mean score of the heads: (B, M) -> (B,); a `RewardEnsemble` may pool differently."""
        return scores.mean(1)

    def _raw(self, tokens: Tensor) -> Tensor:
        """The classifier's own outputs: (B, L) -> (B, number of labels) float32."""
        tokens = tokens[:, : max(int(row_lengths(tokens).max()), 1)]
        if self.causal:
            # Not the classifier's own forward: it finds the last token by the pad id.
            return self._score(last_states(self.model, tokens)).float()
        mask = (tokens != PAD).long()
        raw: Tensor = self.model(input_ids=model_ids(tokens), attention_mask=mask).logits
        return raw.float()

    def _as_logits(self, raw: Tensor) -> Tensor:
        if self.column is not None:
            return raw[:, self.column, None].float()
        return self.scale.logits(raw.float())

    def encode_all(
        self, prompt: Prompt, responses: Sequence[str], finished: Sequence[bool]
    ) -> Encoded:
        """Ids of a prompt, text or chat messages by its own template, and of responses to it.

        A causal trunk reads them token after token; any other classifier reads one text with the
        special tokens of its tokenizer.

        Args:
            prompt: Text or chat messages.
            responses: Texts.
            finished: For each response whether it ended by itself. A causal trunk then reads its
                end too (see `rlhf_gym.data.endings`).
        """
        if self.causal:
            return read_ids(prompt, responses, self.tokenizer, finished)
        return joined_ids(prompt, responses, self.tokenizer)

    def encode(self, prompt: Prompt, response: str, *, finished: bool = False) -> list[int]:
        """Ids of a prompt and one response as one row (see `encode_all`)."""
        return self.encode_all(prompt, [response], [finished]).rows[0]

    def chat_ids(self, prompt: Prompt) -> list[int] | None:
        """A chat prompt's ids by its own template; None if it has none, or the prompt is text."""
        if isinstance(prompt, str) or not self.tokenizer.chat_template:
            return None
        return prompt_ids(prompt, self.tokenizer, closing_ids(self.tokenizer, chat=False))

    def closing(self, *, chat: bool) -> list[int]:
        """The end with which it reads a finished response; empty if it reads none.

        Args:
            chat: Whether the prompt is chat messages.
        """
        return closing_ids(self.tokenizer, chat=chat) if self.causal else []

    @property
    def prompt_forms(self) -> frozenset[str]:
        """The forms of the prompts that it learned from, "chats" and "texts"; empty if unknown."""
        return frozenset(getattr(self.model.config, "reward_prompts", None) or ())

    @prompt_forms.setter
    def prompt_forms(self, forms: Iterable[str]) -> None:
        self.model.config.reward_prompts = sorted(forms)

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that its config, its tokenizer or its chat template names as an end."""
        named = self.model.config.eos_token_id
        ids = {named} if isinstance(named, int) else set(named or ())
        return frozenset(ids.union(*(self.closing(chat=kind)[:1] for kind in (False, True))))

    def normalise(self, tokens: Tensor) -> None:
        """Set gain and bias so that scores of these rows (B, L) have mean 0 and variance 1.

        Raises:
            InputError: The logits do not vary, so no gain could make their variance 1.
        """
        gains, means = self._standardising(tokens)
        self.set_gain(gains, -means * gains)

    def start_at(self, tokens: Tensor) -> None:
        """Scale an untrained head so that its logits on these rows (B, L) have variance 1.

        Every backbone then starts equally far from certainty. The mean of the logits cancels in
        every choice, so it only goes into the bias.

        Raises:
            InputError: The logits do not vary.
        """
        gains, means = self._standardising(tokens)
        multiply(self.head, gains)
        self.set_gain(self.scale.gains, -means * gains * self.scale.gains)

    def set_gain(self, gain: Tensor | float, bias: Tensor | float) -> None:
        """Pay gain · logit + bias from now on; logits do not change."""
        self.scale = self.scale.rescaled(gain, bias, self.head)
        self.scale.write(self.model.config)

    @torch.no_grad()
    def _standardising(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.column is not None:
            raise InputError("a classifier with several labels keeps its own scale")
        return standardising(self(tokens))

    def _score(self, states: Tensor) -> Tensor:
        """The head of a causal trunk: (…, d) -> (…, number of labels)."""
        return cast(Tensor, cast(nn.Linear, self.model.score)(states))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model (safetensors), config with gain and bias, and tokenizer."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
