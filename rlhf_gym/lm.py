"""A causal language model as a distribution over next tokens: the one definition of a log-prob.

Notation: N rows, L columns, M chosen tokens, d the model's width, V the number of usable tokens.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_gym.errors import InputError, UnreachableError
from rlhf_gym.kl import exact_kl
from rlhf_gym.masks import NO_MASK, Limits, Mask
from rlhf_gym.tokens import Sequences, continuations, model_ids, unflatten

logger = logging.getLogger(__name__)

# A no-gradient pass holds at most this many logits.
MAX_LOGITS_PER_PASS = 1 << 25


def disable_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout probability of a model's config to 0.

    With dropout left on, `train()` changes the log-probs and the first PPO ratio is no longer 1.
    """
    for name, value in vars(config).items():
        is_dropout = any(word in name for word in ("dropout", "pdrop", "layerdrop"))
        if is_dropout and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, name, 0.0)


def load_pretrained(
    auto_class: Any,
    name: str,
    *,
    revision: str | None = None,
    attn_implementation: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **config_options: Any,
) -> PreTrainedModel:
    """Load a float32 model by hub name or local path, dropout off, in eval mode.

    Args:
        auto_class: `AutoModelForCausalLM` or another auto class of transformers.
        name: Hub name, or path of a folder that `save_pretrained` wrote.
        revision: Commit or tag on the hub; pin it for work that is to be repeated.
        attn_implementation: As in transformers; None leaves the choice to it.
        ignore_mismatched_sizes: Whether a head of another width is left untrained.
        **config_options: Entries of the model's config to set, such as `num_labels`.

    Raises:
        UnreachableError: The model cannot be loaded.
        InputError: Its weights do not fit its config.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **config_options)
        disable_dropout(config)
        model, loaded = auto_class.from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnreachableError(
            f"cannot load the model {name!r}: {error}\n"
            "Give the path of a folder written by `save_pretrained`, or a hub name that this "
            "machine can reach."
        ) from error
    heads = (
        "score.",
        "classifier.",
        "qa_outputs.",
        "lm_head.",
        "logits_proj.",
        "sequence_summary.",
    )
    torn = [str(key[0]) for key in loaded["mismatched_keys"]]
    torn = [key for key in torn if not key.startswith(heads)]
    if torn:
        raise InputError(
            f"the weights of {name!r} do not fit its config.json: {', '.join(torn[:3])} have "
            "another shape; mend the config, or take the model's own"
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or local path.

    Raises:
        UnreachableError: There is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UnreachableError(f"cannot load a tokenizer from {name!r}: {error}") from error
    # Without its files some classes come up with their special tokens alone.
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens)):
        raise UnreachableError(
            f"{name!r} has no tokenizer files; name the tokenizer that belongs to the model"
        )
    return tokenizer


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: the generation config's, else the config's, the tokenizer's.

    Raises:
        InputError: None of the three names one.
    """
    generation = getattr(model, "generation_config", None)
    for holder in (generation, model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    raise InputError(
        f"the model {model.name_or_path!r} names no eos_token_id; set it in its "
        "generation_config.json, or its responses could never end"
    )


def vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """V: how many of the model's logits the tokenizer can name.

    Models are often padded to a round width; ids past the tokenizer's have no text.

    Raises:
        InputError: The tokenizer has ids that the model cannot embed.
    """
    head = model.get_output_embeddings()
    named = max(tokenizer.get_vocab().values()) + 1
    if named > head.weight.shape[0]:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has ids up to {named - 1}, but the model "
            f"{model.name_or_path!r} has {head.weight.shape[0]} logits; use the tokenizer that "
            "belongs to the model, or resize its embeddings"
        )
    return named


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal LM, its tokenizer, its temperature and its mask: p(token | state).

    Attributes:
        model: Any `AutoModelForCausalLM` whose logits are its head applied to its trunk's last
            hidden state.
        tokenizer: The tokenizer that belongs to it.
        temperature: Divides the logits everywhere: in sampling, in log-probs, in the update.
        vocab_size: V; logits beyond it are dropped before the softmax.
        eos_ids: The ids that end a response.
        mask: Which tokens may be chosen.
        guide: The reference, whose likeliest tokens a top-k or top-p mask allows; None if it is
            this model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    vocab_size: int
    eos_ids: tuple[int, ...]
    mask: Mask = NO_MASK
    guide: "CausalLM | None" = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive, not {self.temperature}")

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0
    ) -> "CausalLM":
        """Wrap a loaded model, after checking that it is one that this project can serve.

        Raises:
            InputError: Its vocabulary does not fit, it has no EOS, the temperature is not
                positive, or its logits are not simply head(trunk).
        """
        _check_head(model)
        return cls(
            model,
            tokenizer,
            float(temperature),
            vocabulary_size(model, tokenizer),
            eos_token_ids(model, tokenizer),
        )

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        temperature: float = 1.0,
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
    ) -> "CausalLM":
        """Load a model and its tokenizer by hub name or local path (see `load_pretrained`).

        `tokenizer` says where the tokenizer lies if not with the model.
        """
        model = load_causal_lm(name, revision=revision, attn_implementation=attn_implementation)
        words = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(name, revision=revision)
        model.to(torch.device(device))  # type: ignore[arg-type]  # decorated in transformers
        return cls.wrap(model, words, temperature)

    def following(self, reference: "CausalLM") -> "CausalLM":
        """This model under the temperature, ends and mask of a reference."""
        return replace(
            self,
            temperature=reference.temperature,
            eos_ids=reference.eos_ids,
            mask=reference.mask,
            guide=reference if reference.mask.follows_reference else None,
        )

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def states(self, sequences: Sequences) -> Tensor:
        """Last hidden state in which each chosen token was chosen, (M, d)."""
        # The last chosen token itself is never a state.
        ids = model_ids(sequences.tokens[:, : max(sequences.width - 1, 1)])
        hidden = trunk(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        rows, columns = sequences.cells()
        return hidden[rows, columns - 1]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, limits: Limits | None = None) -> Tensor:
        """Tempered, masked float32 logits of the usable tokens: (M, d) -> (M, V).

        Args:
            hidden: Last hidden states.
            limits: Of the same M states (`limits`, `next_limits`), where the mask is not static.

        Raises:
            InputError: The mask is not static, and there are no limits.
        """
        if limits is None and not self.mask.is_static:
            raise InputError(
                "what this model may choose differs from state to state: pass the limits of these "
                "states (CausalLM.limits, or next_limits of its guide)"
            )
        return self.mask.ban(self._unmasked_logits(hidden), limits)

    def limits(self, sequences: Sequences, hidden: Tensor | None = None) -> Limits | None:
        """What may be chosen in each of the M states of whole responses.

        Args:
            sequences: N rows; each row's chosen tokens are its whole response.
            hidden: This model's last hidden states there, where they are known: they save a pass
                where it is its own guide.
        """
        if self.mask.is_static:
            return None
        rows, columns = sequences.cells()
        taken, chosen = columns - sequences.starts[rows], sequences.tokens[rows, columns]
        if not self.mask.follows_reference:
            return self.mask.limits(taken)
        guide = self.guide or self
        with torch.no_grad():
            if guide is not self or hidden is None:
                hidden = guide.states(sequences)
        return guide.next_limits(hidden.detach(), taken, chosen)

    def next_limits(
        self, hidden: Tensor, taken: Tensor, chosen: Tensor | None = None
    ) -> Limits | None:
        """What may be chosen in M states, when this model is the guide.

        Args:
            hidden: (M, d) its last hidden states.
            taken: (M,) tokens that the response has already.
            chosen: (M,) the token chosen there, if one was; at the edge of a set it is within.
        """
        if not self.mask.follows_reference:
            return self.mask.limits(taken)
        parts = []
        step = logit_rows(self.vocab_size)
        with torch.no_grad():
            for at in range(0, len(hidden), step):
                some = slice(at, at + step)
                logits = self._unmasked_logits(hidden[some])
                picked = None if chosen is None else chosen[some]
                limits = self.mask.limits(taken[some], logits, picked)
                assert limits is not None
                parts.append(limits)
        return Limits.joined(parts) if parts else None

    def _unmasked_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits[..., : self.vocab_size].float() / self.temperature

    def log_probs_of(self, hidden: Tensor, tokens: Tensor, limits: Limits | None = None) -> Tensor:
        """Log-probs of `tokens` (M,) in the states `hidden` (M, d): (M,) float32."""
        step = len(tokens) if torch.is_grad_enabled() else logit_rows(self.vocab_size)
        parts = []
        for at in range(0, len(tokens), max(step, 1)):
            here = None if limits is None else limits.rows(slice(at, at + step))
            logits = self.logits(hidden[at : at + step], here)
            picked = logits.gather(-1, tokens[at : at + step, None]).squeeze(-1)
            parts.append(picked - logits.logsumexp(-1))
        return torch.cat(parts) if parts else hidden.new_zeros(0)

    def log_probs(self, sequences: Sequences) -> Tensor:
        """Log-prob of every chosen token, (M,), in one pass over whole sequences; no gradient."""
        out = torch.zeros(int(sequences.lengths.sum()), device=self.device)
        with torch.no_grad():
            for part, places in passes(sequences):
                hidden = self.states(part)
                limits = self.limits(part, hidden)
                out[places] = self.log_probs_of(hidden, part.chosen(), limits)
        return out

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors) and tokenizer; plain `generate` then samples as here.

        A top-k or top-p mask is left out: it is the reference's, `generate` knows only its own.
        """
        kept = self.model.generation_config
        generation = copy.deepcopy(kept)
        generation.do_sample, generation.temperature = True, self.temperature
        generation.top_k, generation.top_p = 0, 1.0
        generation.eos_token_id = list(self.eos_ids)
        generation.suppress_tokens = list(self.mask.never) or None
        generation.min_new_tokens = self.mask.min_new_tokens or None
        self.model.generation_config = generation
        try:
            self.model.save_pretrained(folder)
        finally:
            self.model.generation_config = kept
        self.tokenizer.save_pretrained(folder)

    def texts(self, rows: list[list[int]]) -> list[str]:
        """Token ids as text, special tokens left out."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def logit_rows(vocab_size: int) -> int:
    """How many rows of logits a no-gradient pass may hold at a time."""
    return max(1, MAX_LOGITS_PER_PASS // vocab_size)


def embedded(model: PreTrainedModel) -> int:
    """How many token ids a model embeds; at least as many as its tokenizer names."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that a row may have; None where nothing says."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    # RoBERTa and its kin number positions from behind the pad id.
    kin = model.config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
    return int(most) - (int(model.config.pad_token_id or 0) + 1 if kin else 0)


def trunk(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    return model.base_model


def tokens_per_pass(device: torch.device) -> int:
    """Tokens that one no-gradient pass takes: what fits a CPU's cache, or fills a GPU."""
    return 1 << (12 if device.type == "cpu" else 16)


def passes(
    sequences: Sequences, max_tokens: int | None = None
) -> Iterator[tuple[Sequences, Tensor]]:
    """Cut the rows into groups of like length, so that little is spent on padding.

    Args:
        sequences: N rows with M chosen tokens.
        max_tokens: Most tokens of a group, padding included (at least one row a group);
            `tokens_per_pass` if None.

    Yields:
        Some of the rows, and the places (int64) of their chosen tokens among all M.
    """
    max_tokens = max_tokens or tokens_per_pass(sequences.tokens.device)
    totals = (sequences.starts + sequences.lengths).tolist()
    order = sorted(range(len(totals)), key=totals.__getitem__)
    first = torch.cumsum(sequences.lengths, 0) - sequences.lengths
    at = 0
    while at < len(order):
        end = at + 1
        while end < len(order) and (end + 1 - at) * totals[order[end]] <= max_tokens:
            end += 1
        rows = torch.tensor(order[at:end], device=first.device)
        part = sequences.rows(rows)
        within, columns = part.cells()
        yield part, first[rows][within] + columns - part.starts[within]
        at = end


def load_causal_lm(
    name: str, *, revision: str | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A causal LM in float32, dropout off, in eval mode (see `load_pretrained`)."""
    return load_pretrained(
        AutoModelForCausalLM, name, revision=revision, attn_implementation=attn_implementation
    )


def weights_stamp(name: str) -> int:
    """When a local folder's weights were last written (0 for a hub name): part of a cache key."""
    return max((f.stat().st_mtime_ns for f in Path(name).glob("*.safetensors")), default=0)


def shared_causal_lm(
    name: str, revision: str | None, temperature: float, device: str, tokenizer: str | None = None
) -> CausalLM:
    """The process's one frozen copy of a model; environments that name the same one share it."""
    lm = _frozen(name, revision, device, tokenizer, weights_stamp(name))
    return replace(lm, temperature=temperature)


@lru_cache(maxsize=8)
def _frozen(
    name: str, revision: str | None, device: str, tokenizer: str | None, stamp: int
) -> CausalLM:
    lm = CausalLM.load(name, revision=revision, device=device, tokenizer=tokenizer)
    lm.model.requires_grad_(False)
    return lm


def continuation_log_probs(lm: CausalLM, prompts: Tensor, responses: Tensor) -> Tensor:
    """Log-prob of each token of `responses` (N, T) after `prompts` (N, P): (N, T), 0 at PAD."""
    sequences = continuations(prompts, responses).to(lm.device)
    return unflatten(lm.log_probs(sequences), sequences.lengths, responses.shape[1])


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    ids = torch.tensor([[0, 1]], device=model.device)
    whole = model(input_ids=ids, use_cache=False).logits
    parts = model.get_output_embeddings()(
        trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
    )
    if not torch.allclose(whole.float(), parts.float(), atol=1e-4, rtol=1e-4):
        raise InputError(
            f"the model {model.name_or_path!r} ({type(model).__name__}) changes its logits after "
            "its head (a scale or a soft cap), which is not supported; use another family"
        )


def kl_to(
    hidden_p: Tensor, p: CausalLM, hidden_q: Tensor, q: CausalLM, limits: Limits | None = None
) -> Tensor:
    """Exact KL(p ‖ q) over the vocabulary in each state: two (M, d) -> (M,) nats, at least 0."""
    out = []
    step = logit_rows(p.vocab_size)
    for at in range(0, len(hidden_p), step):
        some = slice(at, at + step)
        here = None if limits is None else limits.rows(some)
        log_p = F.log_softmax(p.logits(hidden_p[some], here), -1)
        out.append(exact_kl(log_p, F.log_softmax(q.logits(hidden_q[some], here), -1)))
    return torch.cat(out) if out else hidden_p.new_zeros(0)
