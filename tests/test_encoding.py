"""One encoder for everybody: the ids of prompt + response, wherever they are read."""

import json

import pytest
import torch
from conftest import V, make_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs.resets import named_prompts
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.objective import Objective
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import encode_comparisons
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD, continuations
from rlhf_gym.training.sft_data import load_examples

WORDS = ["<unk>", "<pad>", "<s>", "</s>", "▁", *"abcdu", *(f"▁{letter}" for letter in "abcdu")]
TEMPLATE = (
    "{% for m in messages %}u {{ m['content'] }}{% endfor %}{{ ' b' if add_generation_prompt }}"
)
CHAT = [{"role": "user", "content": "a"}]
RESPONSES = (" c d", "c", "", " d </s>")

# By tokenizer and form of the prompt: the prompt's tokens, and those of each response after it.
CONTINUED = {
    ("plain", "text"): ("a b", ["c d", "c", "", "d </s>"]),
    ("plain", "chat"): ("u a b", ["c d", "c", "", "d </s>"]),
    ("opens", "text"): ("<s> a b", ["c d", "c", "", "d </s>"]),
    ("opens", "chat"): ("u a b", ["c d", "c", "", "d </s>"]),
    # An EOS of the text's own is kept, and the tokenizer adds no second one.
    ("closes", "text"): ("<s> a b", ["c d", "c", "", "d </s>"]),
    ("closes", "chat"): ("u a b", ["c d", "c", "", "d </s>"]),
    ("spaced", "text"): ("▁a ▁b", ["▁c ▁d", "c", "", "▁d ▁ </s>"]),
    ("spaced", "chat"): ("▁u ▁a ▁b", ["▁c ▁d", "c", "", "▁d ▁ </s>"]),
    ("endless", "text"): ("a b", ["c d", "c", "", "d </s>"]),
    ("endless", "chat"): ("u a b", ["c d", "c", "", "d </s>"]),
}
# The same as one text, as a model that is not causal reads it.
JOINED = {
    ("plain", "text"): ["a b c d", "a <unk>", "a b", "a b d </s>"],
    ("plain", "chat"): ["u a b c d", "u a <unk>", "u a b", "u a b d </s>"],
    ("opens", "text"): ["<s> a b c d", "<s> a <unk>", "<s> a b", "<s> a b d </s>"],
    ("opens", "chat"): ["<s> u a b c d", "<s> u a <unk>", "<s> u a b", "<s> u a b d </s>"],
    ("closes", "text"): [
        *("<s> a b c d </s>", "<s> a <unk> </s>", "<s> a b </s>", "<s> a b d </s>")
    ],
    ("closes", "chat"): [
        *("<s> u a b c d </s>", "<s> u a <unk> </s>", "<s> u a b </s>", "<s> u a b d </s>")
    ],
    ("spaced", "text"): ["▁a ▁b ▁c ▁d", "▁a ▁b c", "▁a ▁b", "▁a ▁b ▁d ▁ </s>"],
    ("spaced", "chat"): ["▁u ▁a ▁b ▁c ▁d", "▁u ▁a ▁b c", "▁u ▁a ▁b", "▁u ▁a ▁b ▁d ▁ </s>"],
    ("endless", "text"): ["a b c d", "a <unk>", "a b", "a b d </s>"],
    ("endless", "chat"): ["u a b c d", "u a <unk>", "u a b", "u a b d </s>"],
}
CASES = pytest.mark.parametrize("kind,form", CONTINUED, ids="-".join)


def make(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer over `WORDS`.

    It is "plain", "opens" each text with a BOS, "closes" it with an EOS too, is "spaced" as Llama
    2's (each text opens with a space), or "endless" (it has no EOS).
    """
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    if kind == "spaced":
        merges = [("▁", letter) for letter in "abcdu"]
        raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
        prepend, spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        raw.normalizer = normalizers.Sequence([prepend, spaces])
    else:
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = {"opens": "<s> $A", "closes": "<s> $A </s>"}.get(kind)
    if single is not None:
        special = [("<s>", 2), ("</s>", 3)]
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    eos = {} if kind == "endless" else {"eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", unk_token="<unk>", **eos
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(tokens: str) -> list[int]:
    return [WORDS.index(token) for token in tokens.split()]


def expected(kind: str, form: str, *, closed: bool) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt and of each response, closed by one EOS of the tokenizer or not."""
    tokenizer = make(kind)
    prompt, responses = CONTINUED[kind, form]
    eos = [tokenizer.eos_token_id] if closed and tokenizer.eos_token_id is not None else []
    rows = [ids(text) for text in responses]
    return ids(prompt), [row if row[-1:] == eos else [*row, *eos] for row in rows]


def prompt_of(form: str) -> str | list[dict[str, str]]:
    return "a b" if form == "text" else CHAT


def reward_model(kind: str, *, causal: bool) -> RewardModel:
    if causal:
        config = make_config("llama", num_labels=1)
    else:
        config = AutoConfig.for_model(
            "distilbert", vocab_size=V, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=1
        )
    return RewardModel(AutoModelForSequenceClassification.from_config(config), make(kind))


def rows(tokens: torch.Tensor) -> list[list[int]]:
    return [row[row != PAD].tolist() for row in tokens]


@CASES
def test_a_comparison_is_closed_by_the_eos(kind, form):
    comparison = Comparison(prompt_of(form), RESPONSES, best=0)
    assert comparison.encode(make(kind)) == expected(kind, form, closed=True)


def test_sampled_ids_are_kept():
    sampled = ((2, 5, 6), ((7, 8, 3), (8,)))  # the second was cut by the budget
    comparison = Comparison("a b", (" c d", " d"), best=0, ids=sampled)
    assert comparison.encode(make("plain")) == ([2, 5, 6], [[7, 8, 3], [8]])
    for causal in (True, False):
        encoded, fit = encode_comparisons([comparison], reward_model("plain", causal=causal), None)
        assert encoded[0].rows == [[2, 5, 6, 7, 8, 3], [2, 5, 6, 8]]
        assert fit.whole == 1


@CASES
def test_a_causal_reward_model_reads_the_same(kind, form):
    model = reward_model(kind, causal=True)
    prompt, responses = expected(kind, form, closed=True)
    whole = [[*prompt, *response] for response in responses]
    read = [model.encode(prompt_of(form), text, finished=True) for text in RESPONSES]
    assert read == whole
    comparison = Comparison(prompt_of(form), RESPONSES, best=0)
    (encoded,), _ = encode_comparisons([comparison], model, None)
    assert (encoded.prompt, encoded.candidates) == (prompt, responses)
    # Without their ends, whether a text named one or not.
    eos = model.closing(chat=False)
    bare = [row[: len(row) - len(eos)] for row in responses]
    (encoded,), _ = encode_comparisons([comparison], model, None, unfinished=1.0)
    assert (encoded.prompt, encoded.candidates) == (prompt, bare)
    assert [model.encode(prompt_of(form), text) for text in RESPONSES] == [
        [*prompt, *row] for row in bare
    ]


@CASES
def test_another_classifier_reads_one_text(kind, form):
    model = reward_model(kind, causal=False)
    whole = [ids(text) for text in JOINED[kind, form]]
    assert [model.encode(prompt_of(form), text) for text in RESPONSES] == whole
    comparison = Comparison(prompt_of(form), RESPONSES, best=0)
    (encoded,), _ = encode_comparisons([comparison], model, None)
    assert (encoded.prompt, encoded.candidates) == ([], whole)


@CASES
def test_fine_tuning_closes_later(kind, form, tmp_path):
    file = tmp_path / "examples.jsonl"
    shown = [text for text in RESPONSES if text]  # an empty response is bad input there
    lines = [json.dumps({"prompt": prompt_of(form), "response": text}) for text in shown]
    file.write_text("\n".join(lines))
    prompt, responses = expected(kind, form, closed=False)
    examples = load_examples(str(file), make(kind), (3,))
    assert [list(example.prompt_ids) for example in examples] == [prompt] * len(shown)
    assert [list(example.response_ids) for example in examples] == [r for r in responses if r]


@CASES
def test_a_prompt_alone_is_never_closed(kind, form):
    tokenizer = make(kind)
    prompt, _ = expected(kind, form, closed=False)
    dataset = PromptDataset.from_texts([prompt_of(form)], tokenizer, (3,), 9)
    assert dataset.ids == (tuple(prompt),)
    lm = CausalLM(AutoModelForCausalLM.from_config(make_config("llama")), tokenizer, 1.0, V, (3,))
    named = named_prompts({"prompt": prompt_of(form)}, 1, dataset, lm)
    assert named == [tuple(prompt)]
    # An EOS that is the text's own stays.
    own = PromptDataset.from_texts(["a </s>"], make("plain"), (3,), 9)
    assert own.ids == ((5, 3),)


@pytest.mark.parametrize("causal", [True, False])
@CASES
def test_the_objective_reads_text_with_the_reward_models_tokenizer(kind, form, causal):
    """The policy's tokenizer is another; what the reward model reads is what it encodes itself."""
    words = make("opens")
    words.add_tokens(["extra"])
    config = make_config("llama", vocab_size=len(words))
    lm = CausalLM(AutoModelForCausalLM.from_config(config), words, 1.0, len(words), (3,))
    asked = words("a b")["input_ids"]
    chats = {tuple(asked): CHAT} if form == "chat" else {}
    replies = [words(text, add_special_tokens=False)["input_ids"] for text in (" c d", " d")]
    prompts = torch.tensor([asked] * 2)
    chosen = continuations(prompts, torch.tensor([replies[0], [*replies[1], 3]]))
    responses = Responses(lm, chosen, chats=chats)
    model = reward_model(kind, causal=causal)
    read = []
    model.member_scores = lambda tokens: read.append(tokens) or torch.zeros(len(tokens), 1)
    Objective(lm, model, kl_coef=0.1, chats=chats).final_scores(responses)
    assert responses.texts == [" c d", " d"]
    ended = [False, True]
    whole = [
        model.encode(prompt_of(form), text, finished=closed)
        for text, closed in zip(responses.texts, ended, strict=True)
    ]
    assert rows(read[0]) == whole


def test_the_objective_keeps_the_ids_where_the_tokenizer_is_the_policys():
    words = make("plain")
    lm = CausalLM(AutoModelForCausalLM.from_config(make_config("llama")), words, 1.0, V, (3,))
    sampled = torch.tensor([[7, 3], [0, PAD]])  # an unknown word would not survive as text
    responses = Responses(lm, continuations(torch.tensor([[5, 6], [5, 6]]), sampled))
    model, read = reward_model("plain", causal=True), []
    model.member_scores = lambda tokens: read.append(tokens) or torch.zeros(len(tokens), 1)
    Objective(lm, model, kl_coef=0.1).final_scores(responses)
    assert rows(read[0]) == [[5, 6, 7, 3], [5, 6, 0]]
