"""One end of a response: what a reward model learns as the end is what it meets."""

import json
from itertools import product

import pytest
import torch
from conftest import V, make_config
from test_encoding import make, reward_model, rows
from tokenizers import AddedToken, decoders
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_gym.data.encoding import continued_ids, prompt_ids, prompt_text
from rlhf_gym.data.endings import closing_ids, end_of_policy
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.data.prompts import PLAIN_TEMPLATE
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.objective import Objective
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import encode_comparisons
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.tokens import PAD, continuations, pad_rows
from rlhf_gym.training.sft_data import load_examples, prepare

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> b\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
ASKED = [{"role": "user", "content": "a"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "c d"}]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose template closes an answer with <|im_end|> and one more token."""
    tokenizer = make("plain")
    tokenizer.add_tokens(
        [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_template_says_how_an_answer_in_a_chat_ends():
    tokenizer = chat_tokenizer()
    end, after = tokenizer("<|im_end|> b")["input_ids"]
    assert closing_ids(tokenizer, chat=True) == [end, after]
    assert closing_ids(tokenizer, chat=False) == [tokenizer.eos_token_id]
    # A policy ends with the one of these at which its generation stops.
    assert end_of_policy(tokenizer, (3, end), chat=True) == end
    assert end_of_policy(tokenizer, (2, 3), chat=True) is None
    assert end_of_policy(tokenizer, (3, end), chat=False) is None
    assert end_of_policy(tokenizer, (2,), chat=False) == 2
    # Templates that write nothing after an answer leave it to the EOS.
    for template in (PLAIN_TEMPLATE, "{{ messages[0]['content'] }}", "{{ raise_exception('x') }}"):
        tokenizer.chat_template = template
        assert closing_ids(tokenizer, chat=True) == [tokenizer.eos_token_id]
    assert closing_ids(make("endless"), chat=False) == []


def test_a_reward_model_meets_the_end_that_it_learned():
    """Whichever EOS a policy chose, by ids and by text."""
    words = chat_tokenizer()
    end, after = closing_ids(words, chat=True)
    size = len(words)
    config = make_config("llama", vocab_size=size)
    model = AutoModelForCausalLM.from_config(config)
    lm = CausalLM(model, words, 1.0, size, (3, 4, end))
    asked = prompt_ids(ASKED, words, lm.eos_ids)
    text = prompt_ids("a b", words, lm.eos_ids)
    chosen = [[7, 3], [7, 4], [7, end], [7, 8]]
    for prompt, chats, closing in (
        (text, {}, [3]),
        (asked, {tuple(asked): ASKED}, [end, after]),
    ):
        sequences = continuations(torch.tensor([prompt] * 4), torch.from_numpy(pad_rows(chosen)))
        responses = Responses(lm, sequences, chats=chats)
        reward, read = reward_model("plain", causal=True), []
        reward.tokenizer = words
        reward.member_scores = lambda tokens, read=read: (
            read.append(tokens) or torch.zeros(len(tokens), 1)
        )
        Objective(lm, reward, kl_coef=0.1, chats=chats).final_scores(responses)
        finished = [*prompt, 7, *closing]
        assert rows(read[0]) == [finished, finished, finished, [*prompt, 7, 8]]
        # What it learned from an answer that is text, and from one that was sampled.
        asks = ASKED if chats else "a b"
        learned, _ = encode_comparisons([Comparison(asks, ("c", "d"), best=0)], reward, None)
        assert learned[0].rows[0] == finished
        ids = (tuple(prompt), ((7, end), (7, 8)))
        reasons = ("stop", "length")
        sampled = Comparison(asks, ("c", "c d"), best=0, ids=ids, finish_reasons=reasons)
        learned, fit = encode_comparisons([sampled], reward, None)
        assert (learned[0].rows, fit.retokenised) == ([finished, [*prompt, 7, 8]], 0)
        # Without finish reasons the EOS ids that the model knows tell.
        reward.model.config.eos_token_id = [3, end]
        learned, fit = encode_comparisons(
            [Comparison(asks, ("c", "c d"), best=0, ids=ids)], reward, None
        )
        assert (learned[0].rows, fit.retokenised) == ([finished, [*prompt, 7, 8]], 0)


def test_a_share_of_the_answers_is_learned_without_an_end():
    reward = reward_model("plain", causal=True)
    texts = [f"{'a ' * n}{word}".strip() for n in range(40) for word in "bcd"]
    pairs = [
        Comparison("a", (one, other), best=0)
        for one, other in zip(texts[::2], texts[1::2], strict=True)
    ]

    def ends(share: float) -> list[bool]:
        encoded, _ = encode_comparisons(pairs, reward, None, unfinished=share)
        return [ids[-1] == 3 for row in encoded for ids in row.candidates]

    assert all(ends(0.0))
    assert not any(ends(1.0))
    some = ends(0.4)
    assert 0.3 < some.count(False) / len(some) < 0.5
    assert some == ends(0.4), "a hash of the answer decides"
    # Sampled ones say by themselves how they ended.
    cut = Comparison("a", ("b", "c"), best=0, finish_reasons=("length", "stop"))
    encoded, _ = encode_comparisons([cut], reward, None)
    assert [ids[-1] == 3 for ids in encoded[0].candidates] == [False, True]


@pytest.mark.parametrize("text", ["<s> a b", "a b"])
@pytest.mark.parametrize("kind", ["plain", "opens", "closes"])
def test_special_tokens_that_a_text_has_are_not_added_again(kind, text):
    tokenizer = make(kind)
    bos = [2] if kind in ("opens", "closes") or "<s>" in text else []
    assert prompt_ids(text, tokenizer, (3,)) == [*bos, 5, 6]
    start, candidates = Comparison(text, (" c d </s>", " d"), best=0).encode(tokenizer)
    assert start == [*bos, 5, 6]
    assert candidates == [[7, 8, 3], [8, 3]]


def test_fine_tuning_ends_an_answer_once(tmp_path):
    tokenizer = chat_tokenizer()
    end = closing_ids(tokenizer, chat=True)[0]
    size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(make_config("llama", vocab_size=size))
    lm = CausalLM(model, tokenizer, 1.0, size, (3, end))
    file = tmp_path / "sft.jsonl"
    lines = [
        [*ASKED, {"role": "assistant", "content": text}]
        for text in ("c", "c <|im_end|>", "c </s>", "c <|im_end|> b")
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    data = prepare(lm, load_examples(str(file), tokenizer, lm.eos_ids, held_out=0.0), 16)
    # The template's end is one at which generation stops, so the policy learns this one.
    assert {example.response_ids for example in data.train} == {(7, end)}


def test_a_chat_that_ends_with_the_assistants_message_is_continued():
    tokenizer = chat_tokenizer()
    assert prompt_text(BEGUN, tokenizer).endswith("<|im_start|> assistant c d")
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert prompt_text(BEGUN, tokenizer).endswith("\n\nAssistant: c d")
    start, (rest,) = continued_ids(BEGUN, [" a"], tokenizer, (3,))
    assert (start[-2:], rest) == ([7, 8], [5])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"  # does not show the answer
    with pytest.raises(InputError, match="refuses"):
        prompt_text(BEGUN, tokenizer)


@pytest.mark.parametrize(
    "prompt,response",
    [("a b ", "c d"), ("a ", "b"), ("a b", "c"), ("a b", " c"), ("a", "")],
)
def test_prompt_and_response_read_as_one_text(prompt, response):
    tokenizer = make("spaced")
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)
    start, (rest,) = continued_ids(prompt, [response], tokenizer, (3,))
    assert start == prompt_ids(prompt, tokenizer, (3,))
    assert tokenizer.decode([*start, *rest]) == prompt + response


def test_a_templates_last_space_belongs_to_the_answer():
    tokenizer = make("spaced")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ ' b ' if add_generation_prompt }}"
    whole = tokenizer("a b c d")["input_ids"]
    for answer in ("c d", " c d"):
        start, (rest,) = continued_ids(ASKED, [answer], tokenizer, (3,))
        assert start == prompt_ids(ASKED, tokenizer, (3,)) == whole[:2]
        assert rest == whole[2:]


def test_a_border_that_cannot_be_is_said_once(caplog):
    tokenizer = make("plain")  # splits at spaces, so "b" + "c" is one unknown word
    for _ in range(2):
        continued_ids("a b", ["c"], tokenizer, (3,))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "'a <unk>' as one text, but 'a b c'" in said[0]


def test_a_reward_function_gets_the_messages_of_a_chat():
    words = chat_tokenizer()
    size = len(words)
    model = AutoModelForCausalLM.from_config(make_config("llama", vocab_size=size))
    lm = CausalLM(model, words, 1.0, size, (3,))
    asked, text = prompt_ids(ASKED, words, (3,)), prompt_ids("a b", words, (3,))
    seen = []

    def reward(prompts, responses):
        seen.append((prompts, responses))
        return [0.0] * len(responses)

    sequences = continuations(
        torch.from_numpy(pad_rows([asked, text])), torch.tensor([[7, 3], [8, PAD]])
    )
    Objective(lm, reward, kl_coef=0.1, chats={tuple(asked): ASKED}).settle(sequences, None)
    assert seen == [([ASKED, "a b"], [" c", " d"])]


def test_a_model_whose_end_is_no_token_is_refused():
    tokenizer = make("endless")
    model = AutoModelForCausalLM.from_config(make_config("llama"))
    model.generation_config.eos_token_id = [V + 5]
    with pytest.raises(InputError, match=r"end at the ids \[\d+\].* none could end"):
        CausalLM.wrap(model, tokenizer)
    # A tokenizer that names no EOS closes answers with the model's.
    model.generation_config.eos_token_id = [3, V + 5]
    lm = CausalLM.wrap(model, tokenizer)
    _, candidates = Comparison("a", (" b", " c"), best=0).encode(lm.tokenizer)
    assert candidates == [[6, 3], [7, 3]]


def scored_rows(lm, reward, sequences, chats):
    read = []
    reward.member_scores = lambda tokens: read.append(tokens) or torch.zeros(len(tokens), 1)
    responses = Responses(lm, sequences, chats=chats)
    Objective(lm, reward, kl_coef=0.1, chats=chats).final_scores(responses)
    return rows(read[0])


def chat_lm():
    words = chat_tokenizer()
    config = make_config("llama", vocab_size=len(words))
    model = AutoModelForCausalLM.from_config(config)
    end = closing_ids(words, chat=True)[0]
    return CausalLM(model, words, 1.0, len(words), (3, end))


def test_a_reward_model_reads_chats_by_its_own_template_with_the_same_tokens():
    lm = chat_lm()
    asked = prompt_ids(ASKED, lm.tokenizer, lm.eos_ids)
    reward = reward_model("plain", causal=True)
    reward.tokenizer = chat_tokenizer()
    reward.tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}b"
    own = prompt_ids(ASKED, reward.tokenizer, ())
    assert own != asked
    sequences = continuations(torch.tensor([asked] * 2), torch.tensor([[7, 3], [7, 8]]))
    # Its template writes " b" after an answer, which is the end that it learned.
    end = reward.closing(chat=True)
    found = scored_rows(lm, reward, sequences, {tuple(asked): ASKED})
    assert found == [[*own, 7, *end], [*own, 7, 8]]
    learned, _ = encode_comparisons(
        [Comparison(ASKED, ("c", "c d"), best=0, finish_reasons=("stop", "length"))], reward, None
    )
    assert learned[0].rows == found
    ids = (tuple(asked), ((7, 3), (7, 8)))
    sampled = Comparison(ASKED, ("c", "c d"), 0, ids=ids, finish_reasons=("stop", "length"))
    learned, _ = encode_comparisons([sampled], reward, None)
    assert learned[0].rows == found


def test_an_end_that_does_not_fit_into_the_context_is_refused():
    lm = chat_lm()
    asked = prompt_ids(ASKED, lm.tokenizer, lm.eos_ids)
    reward = reward_model("plain", causal=True)
    reward.tokenizer = chat_tokenizer()
    sequences = continuations(torch.tensor([asked]), torch.tensor([[7, 3]]))
    reward.model.config.max_position_embeddings = len(asked) + 3
    assert len(scored_rows(lm, reward, sequences, {tuple(asked): ASKED})[0]) == len(asked) + 3
    reward.model.config.max_position_embeddings = len(asked) + 2
    with pytest.raises(InputError, match=f"are {len(asked) + 3} tokens to the reward model"):
        scored_rows(lm, reward, sequences, {tuple(asked): ASKED})


def test_an_answer_that_stopped_loses_no_token_of_its_text():
    reward = reward_model("plain", causal=True)
    ids = ((5, 6), ((8, 5), (5, 8)))  # recorded without their EOS
    sampled = Comparison("a b", ("d a", "a d"), 0, ids=ids, finish_reasons=("stop", "stop"))
    learned, fit = encode_comparisons([sampled], reward, None)
    assert fit.retokenised == 0
    assert learned[0].candidates == [[8, 5, 3], [5, 8, 3]]


def test_ids_of_another_tokenizer_are_no_policys_either():
    tokenizer = make("plain")
    for ids in (
        ((5, 6), ((90, 3), (7, 3))),
        ((5, 6), ((8, 3), (8, 3))),
        ((7, 7), ((7, 3), (8, 3))),
    ):
        stranger = Comparison("a b", ("c", "d"), best=0, ids=ids)
        own = stranger.with_own_ids(tokenizer, V)
        assert own.ids is None
        assert own.encode(tokenizer) == ([5, 6], [[7, 3], [8, 3]])
    sampled = Comparison("a b", ("c", "d"), best=0, ids=((5, 6), ((7, 3), (8,))))
    assert sampled.with_own_ids(tokenizer, V) is sampled
    cut = Comparison("a b", ("c", "d"), best=0, finish_reasons=("length", "stop"))
    assert cut.encode(tokenizer).responses == [[7], [8, 3]]


def test_prompts_of_the_same_ids_are_one_prompt():
    tokenizer = make("plain")
    texts = ["a b", "a b ", " a b", "b", "a  b"]
    whole = PromptDataset.from_texts(texts, tokenizer, (3,), 9)
    assert whole.ids == ((5, 6), (6,))
    # Whichever way a prompt is written, it is on one side.
    many = [f"{' ' * (i % 3)}{' '.join(t)}" for i in range(3) for t in product("abcd", repeat=3)]
    train, held_out = (
        set(PromptDataset.from_texts(many, tokenizer, (3,), 9, split=side, held_out=0.5).ids)
        for side in ("train", "held_out")
    )
    assert len(train | held_out) == 64
    assert not train & held_out
