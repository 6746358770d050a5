"""A causal language model as a distribution over next tokens: the one definition of a log-prob.

Notation: N rows, L columns, M chosen tokens, d the model's width, V the number of usable tokens.
"""

import copy
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_gym.errors import InputError
from rlhf_gym.kl import exact_kl
from rlhf_gym.lm.architecture import LogitRule, logit_rule, trunk
from rlhf_gym.lm.attention import for_bfloat16
from rlhf_gym.lm.batching import in_chunks, passes, rows_per_chunk
from rlhf_gym.lm.loading import (
    eos_token_ids,
    load_causal_lm,
    load_tokenizer,
    name_eos,
    vocabulary_size,
    weights_stamp,
)
from rlhf_gym.lm.masks import NO_MASK, Limits, Mask
from rlhf_gym.lm.precision import Precision, at_least_float32, autocast
from rlhf_gym.tokens import Sequences, continuations, model_ids, unflatten

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal LM, its tokenizer, its temperature and its mask: p(token | state).

    Attributes:
        model: Any `AutoModelForCausalLM` whose logits are its head applied to its trunk's last
            hidden state, scaled or capped as `rlhf_gym.lm.architecture.LogitRule` says.
        tokenizer: The tokenizer that belongs to it.
        temperature: Divides the logits everywhere: in sampling, in log-probs, in the update.
        vocab_size: V; logits beyond it are dropped before the softmax.
        eos_ids: The ids that end a response.
        stop_at_eos: Whether they do so in its environment. Only what is saved depends on it.
        mask: Which tokens may be chosen.
        guide: The reference, whose likeliest tokens a top-k or top-p mask allows; None if this
            model is the reference.
        precision: Precision of the matrix products; log-probs are always float32.
        reuse_casts: As in `rlhf_gym.lm.precision.autocast`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    vocab_size: int
    eos_ids: tuple[int, ...]
    stop_at_eos: bool = True
    mask: Mask = NO_MASK
    guide: "CausalLM | None" = None
    precision: Precision = "fp32"
    reuse_casts: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive, not {self.temperature}")

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0
    ) -> "CausalLM":
        """Wrap a loaded model, after checking that this project supports it.

        Raises:
            InputError: Its vocabulary does not fit, it has no EOS that is a token, the temperature
                is not positive, or its logits are not those of its head and its `LogitRule`.
        """
        _check_head(model)
        eos_ids = eos_token_ids(model, tokenizer)
        name_eos(tokenizer, eos_ids)
        size = vocabulary_size(model, tokenizer)
        return cls(model, tokenizer, float(temperature), size, eos_ids)

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

        `tokenizer` names the tokenizer if it is not in the model's folder.
        """
        model = load_causal_lm(name, revision=revision, attn_implementation=attn_implementation)
        words = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(name, revision=revision)
        model.to(torch.device(device))  # type: ignore[arg-type]  # decorated in transformers
        return cls.wrap(model, words, temperature)

    def following(self, reference: "CausalLM") -> "CausalLM":
        """This model with the temperature, EOS ids and mask of a reference."""
        return replace(
            self,
            temperature=reference.temperature,
            eos_ids=reference.eos_ids,
            stop_at_eos=reference.stop_at_eos,
            mask=reference.mask,
            guide=reference if reference.mask.follows_reference else None,
        )

    def trainable(self) -> "CausalLM":
        """A copy with its own trainable weights, and the same temperature, EOS ids and mask."""
        model = copy.deepcopy(self.model).requires_grad_(True)
        guide = self if self.mask.follows_reference else None
        return replace(self, model=model, guide=guide)

    @cached_property
    def _rule(self) -> LogitRule:
        return logit_rule(self.model)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def hidden_states(self, ids: Tensor, **inputs: Any) -> Tensor:
        """The trunk's last hidden states: ids (N, L) that it can embed -> (N, L, d) float32.

        Args:
            ids: Token ids.
            **inputs: More inputs of the model's forward pass.
        """
        attention = for_bfloat16(self.model) if self.precision == "bf16" else nullcontext()
        with attention, autocast(self.device, self.precision, reuse_casts=self.reuse_casts):
            hidden = trunk(self.model)(input_ids=ids, **inputs).last_hidden_state
        return at_least_float32(hidden)

    def states(self, sequences: Sequences) -> Tensor:
        """Last hidden state in which each chosen token was chosen, (M, d)."""
        # The state after the last chosen token is not needed, so that token is not fed.
        ids = model_ids(sequences.tokens[:, : max(sequences.width - 1, 1)])
        hidden = self.hidden_states(ids, use_cache=False)
        rows, columns = sequences.cells()
        return hidden[rows, columns - 1]

    def logits(self, hidden: Tensor, limits: Limits | None = None) -> Tensor:
        """Tempered, masked float32 logits of the usable tokens: (M, d) -> (M, V).

        Args:
            hidden: Last hidden states.
            limits: The limits of the same M states (`limits`, `next_limits`), if the mask is not
                static.

        Raises:
            InputError: The mask is not static, and there are no limits.
        """
        if limits is None and not self.mask.is_static:
            raise InputError(
                "the allowed tokens of this model differ between states: pass the limits of these "
                "states (CausalLM.limits, or next_limits of its guide)"
            )
        return self.mask.ban(self._unmasked_logits(hidden), limits)

    def limits(self, sequences: Sequences, hidden: Tensor | None = None) -> Limits | None:
        """What may be chosen in each of the M states of whole responses.

        Args:
            sequences: N rows; each row's chosen tokens are its whole response.
            hidden: This model's last hidden states there, if known; they save a pass if it is its
                own guide.
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
            taken: (M,) number of tokens that the response has already.
            chosen: (M,) the token chosen there, if one was; at the edge of a set it counts as
                allowed.
        """
        if not self.mask.follows_reference:
            return self.mask.limits(taken)
        parts = []
        with torch.no_grad():
            step = rows_per_chunk(self.vocab_size, hidden.device)
            for at in range(0, len(hidden), step):
                some = slice(at, at + step)
                logits = self._unmasked_logits(hidden[some])
                picked = None if chosen is None else chosen[some]
                limits = self.mask.limits(taken[some], logits, picked)
                assert limits is not None
                parts.append(limits)
        return Limits.joined(parts) if parts else None

    def _unmasked_logits(self, hidden: Tensor) -> Tensor:
        with autocast(self.device, self.precision, reuse_casts=self.reuse_casts):
            logits: Tensor = self.model.get_output_embeddings()(hidden)
        # Float32 before the softmax: bfloat16 has 8 bits, so a logit near 20 is off by up to 0.06
        # and a PPO ratio by 6 %.
        usable = self._rule(at_least_float32(logits[..., : self.vocab_size]))
        return usable if self.temperature == 1.0 else usable / self.temperature

    def log_probs_of(self, hidden: Tensor, tokens: Tensor, limits: Limits | None = None) -> Tensor:
        """Log-probs of `tokens` (M,) in the states `hidden` (M, d): (M,) float32."""
        return in_chunks(self._log_probs, self.vocab_size, hidden, tokens, limits)

    def log_probs_and_entropies(
        self, hidden: Tensor, tokens: Tensor, limits: Limits | None = None
    ) -> tuple[Tensor, Tensor]:
        """`log_probs_of`, and the entropy of each state's distribution in nats: two (M,)."""

        def both(hidden: Tensor, tokens: Tensor, limits: Limits | None) -> Tensor:
            log_p = F.log_softmax(self.logits(hidden, limits), -1)
            taken = log_p.gather(-1, tokens[:, None]).squeeze(-1)
            return torch.stack([taken, -(log_p.exp() * log_p).sum(-1)], -1)

        log_probs, entropies = in_chunks(both, self.vocab_size, hidden, tokens, limits).unbind(-1)
        return log_probs, entropies

    def _log_probs(self, hidden: Tensor, tokens: Tensor, limits: Limits | None) -> Tensor:
        # cross_entropy reads the logits half as often, forward and backward, as a log_softmax and a
        # gather do.
        return -F.cross_entropy(self.logits(hidden, limits), tokens, reduction="none")

    def log_probs(self, sequences: Sequences) -> Tensor:
        """Log-prob of every chosen token, (M,), in one pass over whole sequences; no gradient."""
        out = torch.zeros(int(sequences.lengths.sum()), device=self.device)
        with torch.no_grad():
            for part, places in passes(self.model, sequences):
                hidden = self.states(part)
                limits = self.limits(part, hidden)
                out[places] = self.log_probs_of(hidden, part.chosen(), limits)
        return out

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors) and tokenizer, so that plain `generate` samples as we do.

        A policy's top-k or top-p mask is left out, with a warning: it follows the reference, and
        `generate` only knows the model's own likeliest tokens.
        """
        model = self.model
        kept, kept_ends = model.generation_config, model.config.eos_token_id
        model.generation_config = self._generation_config()
        if not self.stop_at_eos:
            # The generation config names no end then; whoever loads the model finds it here.
            model.config.eos_token_id = list(self.eos_ids)
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config, model.config.eos_token_id = kept, kept_ends
        self.tokenizer.save_pretrained(folder)

    def _generation_config(self) -> GenerationConfig:
        """The options with which `generate` samples from this distribution.

        The model's own, such as a repetition penalty or beams, are not used in training either.
        """
        kept, mask = self.model.generation_config, self.mask
        top_k, top_p = mask.top_k or 0, mask.top_p or 1.0
        if self.guide is not None:
            top_k, top_p = 0, 1.0
            if mask.follows_reference:
                logger.warning(
                    "`generate` of the saved model draws from all tokens: the environment's top_k "
                    "and top_p follow its reference, which `generate` does not know"
                )
        # Embeddings are often padded to a round size. Nothing trains those rows, but `generate`
        # would draw from them.
        unnamed = range(self.vocab_size, self.model.get_output_embeddings().weight.shape[0])
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=top_k,
            top_p=top_p,
            bos_token_id=kept.bos_token_id,
            pad_token_id=kept.pad_token_id,
            decoder_start_token_id=kept.decoder_start_token_id,
            eos_token_id=list(self.eos_ids) if self.stop_at_eos else None,
            suppress_tokens=[*mask.never, *unnamed] or None,
            min_new_tokens=mask.min_new_tokens or None,
        )

    def texts(self, rows: list[list[int]]) -> list[str]:
        """Token ids as text, special tokens left out."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or getattr(self.tokenizer, "clean_up_tokenization_spaces", True):
            return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        # The same result in one call of the Rust backend, three times as fast.
        return list(backend.decode_batch(rows, skip_special_tokens=True))


def shared_causal_lm(
    name: str, revision: str | None, temperature: float, device: str, tokenizer: str | None = None
) -> CausalLM:
    """The process's one frozen copy of a model, shared by environments that name the same one."""
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
    # We apply the head ourselves, to chosen states only, and know what Gemma 2 (a soft cap), Cohere
    # and Granite (a scale) do to the logits after it. We would miss anything else.
    whole = model(input_ids=ids, use_cache=False).logits
    states = trunk(model)(input_ids=ids, use_cache=False)
    if "last_hidden_state" not in states:
        raise InputError(
            f"the model {model.name_or_path!r} ({type(model).__name__}) does not give its hidden "
            "states apart from its head, which is not supported; use another family"
        )
    parts = logit_rule(model)(model.get_output_embeddings()(states.last_hidden_state))
    if not torch.allclose(whole.float(), parts.float(), atol=1e-4, rtol=1e-4):
        raise InputError(
            f"the model {model.name_or_path!r} ({type(model).__name__}) changes its logits after "
            "its head in a way that is not supported; use another family"
        )


def kl_to(
    hidden_p: Tensor, p: CausalLM, hidden_q: Tensor, q: CausalLM, limits: Limits | None = None
) -> Tensor:
    """Exact KL(p ‖ q) over the vocabulary in each state: two (M, d) -> (M,) nats, at least 0."""

    def work(hidden_p: Tensor, hidden_q: Tensor, limits: Limits | None) -> Tensor:
        log_p = F.log_softmax(p.logits(hidden_p, limits), -1)
        return exact_kl(log_p, F.log_softmax(q.logits(hidden_q, limits), -1))

    return in_chunks(work, p.vocab_size, hidden_p, hidden_q, limits)
