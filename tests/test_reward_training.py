"""Reward models: shared prompts are exact, micro-batches change nothing, no prompt leaks."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EOS, V
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_gym.data.prompts import PLAIN_TEMPLATE
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.reward_models import evaluate_reward_model
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import (
    EncodedComparison,
    candidate_rows,
    encode_comparisons,
)
from rlhf_gym.preferences.likelihood import ChoiceSets, choice_loss
from rlhf_gym.preferences.splits import folds, prompt_groups, split_comparisons
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.rewards.shared_prompts import can_share_prompts, last_states_after, repeat_prompts
from rlhf_gym.tokens import PAD, pad_rows
from rlhf_gym.training.reward_training import RewardTraining, microbatches, train_reward_model


def make_comparisons(n: int = 24, seed: int = 0) -> list[EncodedComparison]:
    """Comparisons with K of 2 to 4 whose best candidate begins with token 9."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt = rng.integers(4, V, size=int(rng.integers(5, 12))).tolist()
        k = int(rng.integers(2, 5))
        candidates = [
            [*rng.integers(10, V, size=int(rng.integers(1, 5))).tolist(), EOS] for _ in range(k)
        ]
        best = int(rng.integers(k))
        candidates[best][0] = 9
        comparison = Comparison(
            f"prompt {i}",
            tuple(f"{i} {j}" for j in range(k)),
            best=best,
            ids=(tuple(prompt), tuple(map(tuple, candidates))),
        )
        out.append(EncodedComparison(prompt, candidates, comparison.choices(), comparison))
    return out


def tensors(comparisons) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(pad_rows([c.prompt for c in comparisons])),
        torch.from_numpy(pad_rows([row for c in comparisons for row in c.candidates])),
        torch.tensor([len(c.candidates) for c in comparisons]),
    )


def fresh(path: str, seed: int = 0, **options) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel.from_backbone(path, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "opt", "bloom"])
def test_shared_prompts_give_the_same_logits_and_gradient(save_lm, family):
    model = fresh(save_lm(family))
    prompts, candidates, sizes = tensors(make_comparisons(6))
    assert can_share_prompts(model.model, 64)
    assert model.shares(prompts, candidates)
    seen = []
    for share in (True, False):
        model.zero_grad()
        logits = model.compare(prompts, candidates, sizes, share=share)
        torch.sin(3 * logits).sum().backward()
        seen.append(
            (logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    (shared, shared_gradient), (plain, gradient) = seen
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model(repeat_prompts(prompts, candidates, sizes)), plain, atol=1e-5, rtol=1e-5
    )
    assert len(gradient) == len(shared_gradient) > 5
    for ours, theirs in zip(shared_gradient, gradient, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_models_with_more_than_plain_attention_repeat_their_prompts(save_lm, family):
    model = fresh(save_lm(family))
    prompts, candidates, sizes = tensors(make_comparisons(4))
    assert not model.shares(prompts, candidates)
    plain = model(repeat_prompts(prompts, candidates, sizes))
    torch.testing.assert_close(
        model.compare(prompts, candidates, sizes), plain, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("gpt2", None),
        ("opt", None),
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ],
)
def test_shared_prompts_never_step_beyond_the_context(save_lm, tmp_path, family, rope):
    """A long prompt with short answers next to a short prompt with long ones, context 64."""
    path = shutil.copytree(save_lm(family), tmp_path / "model")
    if rope:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    model = fresh(str(path))
    prompts = torch.full((2, 60), 5)
    prompts[1, 20:] = PAD
    candidates = torch.randint(4, V, (4, 40), generator=torch.Generator().manual_seed(0))
    candidates[:2, 4:] = PAD
    sizes = torch.tensor([2, 2])
    owners = torch.tensor([0, 0, 1, 1])
    rows = [
        [*p[p != PAD].tolist(), *c[c != PAD].tolist()]
        for p, c in zip(prompts[owners], candidates, strict=True)
    ]
    plain = torch.cat([model(torch.tensor([row])) for row in rows]).detach()
    shared = model.model.score(last_states_after(model.model, prompts, candidates, sizes)).detach()
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)


def test_a_short_prompt_is_not_worth_sharing(save_lm):
    model = fresh(save_lm())
    rows = torch.ones(1, 2, dtype=torch.int64), torch.ones(4, 30, dtype=torch.int64)
    assert not model.shares(*rows)
    assert model.shares(rows[1][:1], rows[0].expand(4, 2))


def trained(path: str, folder: Path, comparisons, **options) -> RewardModel:
    model = fresh(path)
    settings = {"epochs": 2.0, "batch_size": 8, "learning_rate": 1e-2, **options}
    train_reward_model(model, comparisons, RewardTraining(**settings), checkpoint_dir=folder)
    return model


def test_a_training_of_one_update_learns(save_lm, tmp_path):
    comparisons = make_comparisons(6)
    path = save_lm()
    model = trained(path, tmp_path / "one", comparisons, epochs=1.0, batch_size=8)
    assert distance(model, fresh(path)) > 1e-3


def distance(a: RewardModel, b: RewardModel) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"share_prompts": False},
        {"gradient_checkpointing": True},
    ],
    ids=["repeated prompts", "checkpointing"],
)
def test_what_saves_memory_or_time_changes_nothing(save_lm, tmp_path, options):
    path, comparisons = save_lm(), make_comparisons()
    # SGD-like comparison: Adam's first steps divide rounding errors by tiny gradients.
    plain = trained(path, tmp_path / "a", comparisons, learning_rate=1e-3)
    other = trained(path, tmp_path / "b", comparisons, learning_rate=1e-3, **options)
    start = fresh(path)
    assert distance(plain, start) > 1e-3
    assert distance(plain, other) < 2e-4


@pytest.mark.parametrize("max_tokens", [30, 90, 10_000])
def test_micro_batches_leave_the_gradient_of_a_step_alone(
    save_lm, tmp_path, monkeypatch, max_tokens
):
    """Adam and clipping would hide a wrong scale, so the gradient is looked at before the step."""
    comparisons = make_comparisons(13)
    model = fresh(save_lm())
    prompts, candidates, sizes = tensors(comparisons)
    sets = ChoiceSets.of([c.choices for c in comparisons], sizes.tolist())
    choice_loss(model.compare(prompts, candidates, sizes)[:, 0], sets).mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    seen: list[list[torch.Tensor]] = []

    def note(parameters, *args, **kwargs):
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return torch.zeros(())

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", lambda self, *a, **k: note(*a))
    options = RewardTraining(batch_size=13, microbatch_tokens=max_tokens)
    train_reward_model(model, comparisons, options, checkpoint_dir=tmp_path)
    assert (
        len(list(microbatches(comparisons, max_tokens))) == {30: 13, 90: 8, 10_000: 1}[max_tokens]
    )
    (found,) = seen
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_training_learns_what_people_chose(save_lm, tmp_path):
    comparisons, held_out = make_comparisons(800), make_comparisons(200, seed=1)
    path = save_lm()
    before = evaluate_reward_model(fresh(path), held_out)
    model = trained(path, tmp_path, comparisons, learning_rate=3e-3, epochs=3.0)
    after = evaluate_reward_model(model, held_out)
    assert after["accuracy"]["value"] > 0.7 > before["accuracy"]["value"]
    assert after["nll"]["value"] < 0.8 < before["nll"]["value"]
    assert after["accuracy_pairwise"]["low"] > 0.6


def test_early_stopping_goes_back_to_the_best(save_lm, tmp_path):
    """The validation labels contradict the training labels: learning can only hurt."""
    train = make_comparisons(64)
    contrary = [
        EncodedComparison(c.prompt, c.candidates, contrary_choice(c), c.comparison) for c in train
    ]
    path, model = save_lm(), fresh(save_lm())
    options = RewardTraining(epochs=20.0, batch_size=8, learning_rate=1e-2, patience=2)
    train_reward_model(model, train, options, validation=contrary, checkpoint_dir=tmp_path)
    stopped = evaluate_reward_model(model, train)["nll"]["value"]
    full = trained(path, tmp_path / "full", train, epochs=20.0)
    assert evaluate_reward_model(full, train)["nll"]["value"] < 0.5 * stopped
    (state_file,) = tmp_path.glob("checkpoint-*/trainer_state.json")
    state = json.loads(state_file.read_text())
    sizes = [len(c.candidates) for c in contrary]
    rows = candidate_rows(contrary)
    sets = ChoiceSets.of([c.choices for c in contrary], sizes)
    kept = float(choice_loss(model.logits(rows), sets).mean())
    assert kept == pytest.approx(state["best_metric"], abs=1e-5)
    with pytest.raises(InputError, match="needs validation"):
        train_reward_model(model, train, options, checkpoint_dir=tmp_path / "none")


def test_a_resumed_run_has_no_more_patience_than_one_never_stopped(save_lm, tmp_path):
    train = make_comparisons(64)
    contrary = [
        EncodedComparison(c.prompt, c.candidates, contrary_choice(c), c.comparison) for c in train
    ]
    path = save_lm()
    options = RewardTraining(epochs=20.0, batch_size=8, learning_rate=1e-2, patience=3)
    whole = fresh(path)
    train_reward_model(
        whole, train, options, validation=contrary, checkpoint_dir=tmp_path / "whole"
    )
    stopped = fresh(path)
    with stopping(stopped, 7), pytest.raises(KeyboardInterrupt):
        train_reward_model(
            stopped, train, options, validation=contrary, checkpoint_dir=tmp_path / "stopped"
        )
    again = fresh(path)
    train_reward_model(
        again,
        train,
        options,
        validation=contrary,
        checkpoint_dir=tmp_path / "stopped",
        resume=True,
    )
    assert distance(again, whole) == 0.0


@contextmanager
def stopping(model: RewardModel, after: int) -> Iterator[None]:
    """Interrupt the training after `after` forward passes of the head."""
    left = after

    def count(*_) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    hook = model.head.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def contrary_choice(c: EncodedComparison):
    worst = (c.comparison.best + 1) % len(c.candidates)
    everyone = tuple(range(len(c.candidates)))
    return [(everyone, tuple(float(i == worst) for i in everyone))]


def test_adapters_train_little_and_are_merged(save_lm, tmp_path):
    path = save_lm()
    start, model = fresh(path), trained(path, tmp_path / "c", make_comparisons(64), lora_rank=2)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in start.named_parameters()]
    moved = {
        name: (p - q).detach()
        for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True)
    }
    ranks = [int(torch.linalg.matrix_rank(d, atol=1e-6)) for n, d in moved.items() if "proj" in n]
    assert max(ranks) == 2
    assert min(ranks) > 0
    assert float(moved["model.score.weight"].abs().max()) > 0
    assert float(moved["model.model.embed_tokens.weight"].abs().max()) == 0
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    row = torch.tensor([[2, 5, 6, EOS]])
    with torch.no_grad():
        assert float(plain(input_ids=row).logits) == pytest.approx(
            float(model.scores(row)), abs=1e-5
        )


def test_a_head_with_a_bias_is_trained_beside_the_adapters(save_lm, tmp_path):
    config = BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    torch.manual_seed(0)
    model = RewardModel(BertForSequenceClassification(config), load_tokenizer(save_lm()))
    before = model.head.weight.detach().clone()
    options = RewardTraining(epochs=1.0, batch_size=8, learning_rate=1e-2, lora_rank=2)
    train_reward_model(model, make_comparisons(16), options, checkpoint_dir=tmp_path)
    assert isinstance(model.head, torch.nn.Linear)
    assert float((model.head.weight.detach() - before).abs().max()) > 1e-3


def test_options_out_of_range_are_refused():
    for bad in ({"batch_size": 0}, {"lora_rank": 0}, {"microbatch_tokens": 0}, {"patience": 0}):
        (name,) = bad
        with pytest.raises(InputError, match=name):
            RewardTraining(**bad)


def test_weights_that_do_not_fit_are_no_start(save_lm, tmp_path):
    shutil.copytree(save_lm(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] + 8}))
    with pytest.raises(InputError, match="do not fit its config"):
        RewardModel.from_backbone(str(tmp_path / "model"))
    with pytest.raises(InputError, match="at least one head"):
        RewardModel.from_backbone(save_lm(), heads=0)


def test_bf16_learns_too(save_lm, tmp_path):
    comparisons = make_comparisons(64)
    model = trained(save_lm(), tmp_path, comparisons, bf16=True, epochs=6.0)
    assert next(model.parameters()).dtype == torch.float32
    assert evaluate_reward_model(model, comparisons)["accuracy"]["value"] > 0.7


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_stopped_and_resumed_is_never_stopped(save_lm, tmp_path, lora_rank):
    path, comparisons = save_lm(), make_comparisons(32)
    options = RewardTraining(epochs=3.0, batch_size=4, learning_rate=1e-2, lora_rank=lora_rank)
    whole = fresh(path)
    train_reward_model(whole, comparisons, options, checkpoint_dir=tmp_path / "whole")
    stopped = fresh(path)
    with stopping(stopped, 15), pytest.raises(KeyboardInterrupt):
        train_reward_model(stopped, comparisons, options, checkpoint_dir=tmp_path / "stopped")
    again = fresh(path)
    train_reward_model(
        again, comparisons, options, checkpoint_dir=tmp_path / "stopped", resume=True
    )
    assert distance(again, whole) == 0.0
    assert distance(again, fresh(path)) > 0.0
    if lora_rank is None:  # with adapters, the stopped model has other tensors
        assert distance(stopped, whole) > 0.0


def test_an_untrained_head_starts_with_logits_of_variance_one(save_lm):
    model = fresh(save_lm())
    rows = candidate_rows(make_comparisons(40))
    before = model.logits(rows)
    assert abs(float(before.std()) - 1) > 0.05
    model.start_at(rows)
    logits = model.logits(rows)
    assert float(logits.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    assert float(model.scores(rows).mean()) == pytest.approx(0.0, abs=1e-5)
    assert model.scale.gain == 1.0
    # The order of the candidates is what it was.
    assert torch.equal(before.argsort(), logits.argsort())


def test_any_classifier_is_a_start(save_lm, tmp_path):
    from transformers import AutoModelForSequenceClassification as Classifier

    from rlhf_gym.lm.loading import load_tokenizer

    path = save_lm()
    three = Classifier.from_pretrained(path, num_labels=3)
    three.save_pretrained(tmp_path)
    load_tokenizer(path).save_pretrained(tmp_path)
    model = fresh(str(tmp_path))
    assert model.model.config.num_labels == 1
    assert model.model.score.weight.shape[0] == 1
    theirs = three.model.embed_tokens.weight
    assert torch.equal(model.model.model.embed_tokens.weight, theirs)


def test_too_long_dialogues_lose_whole_turns_for_all_candidates_alike(save_lm):
    model = fresh(save_lm())
    model.tokenizer.chat_template = PLAIN_TEMPLATE
    messages = [
        {"role": "user", "content": "a b c"},
        {"role": "assistant", "content": "d e"},
        {"role": "user", "content": "f"},
    ]
    chat = Comparison(messages, ("g", "h i j"), best=0)
    short = Comparison(messages[2:], ("g", "h i j"), best=0)
    (whole,), fit = encode_comparisons([chat], model, None)
    assert (fit.whole, fit.cut, fit.dropped) == (1, 0, 0)
    (cut,), fit = encode_comparisons([chat], model, whole.width - 1, too_long="cut_turns")
    assert (fit.whole, fit.cut, fit.dropped) == (0, 1, 0)
    (expected,), _ = encode_comparisons([short], model, None)
    assert (cut.prompt, cut.candidates) == (expected.prompt, expected.candidates)
    assert cut.candidates == whole.candidates
    kept, fit = encode_comparisons([chat, short], model, expected.width)
    assert len(kept) == 1
    assert fit.dropped == 1
    with pytest.raises(InputError, match="all 1 comparisons exceed"):
        encode_comparisons([short], model, 2, too_long="cut_turns")


def test_nearly_equal_prompts_are_one_prompt():
    pairs = []
    for i in range(20):
        words = [f"p{i}w{j}" for j in range(40)]
        near = [w if j not in (10, 30) else "changed" for j, w in enumerate(words)]  # J = 0.73
        far = [w if j % 5 else "changed" for j, w in enumerate(words)]  # J < 0.3
        pairs += [" ".join(words), " ".join(near), " ".join(far)]
    keys = prompt_groups(pairs)
    assert keys[0::3] == keys[1::3]
    assert not set(keys[0::3]) & set(keys[2::3])
    assert len(set(keys)) == 40
    prompts = pairs[:3]
    keys = prompt_groups(prompts)
    # The key depends on the prompts alone, not on their order.
    assert prompt_groups(prompts[::-1]) == keys[::-1]


def test_a_dialogue_and_its_continuation_are_one_prompt():
    start = "\n\nHuman: tell me about the sea please\n\nAssistant:"
    longer = start + " it is wide\n\nHuman: and deep?\n\nAssistant:"
    messages = [
        {"role": "user", "content": "tell me about the sea please"},
        {"role": "assistant", "content": "it is wide"},
        {"role": "user", "content": "and deep?"},
    ]
    other = "\n\nHuman: something else\n\nAssistant:"
    keys = prompt_groups([start, longer, messages[:1], messages, other, "tell me a story"])
    assert len({*keys[:4]}) == 1
    assert len({*keys}) == 3


def test_splits_and_folds_keep_a_prompt_on_one_side():
    base = [" ".join(f"p{i}w{j}" for j in range(30)) for i in range(60)]
    near = [text.replace("w29", "changed") for text in base]
    comparisons = [Comparison(p, ("a", "b"), best=0) for p in [*base, *near, *base]]
    train, test = split_comparisons(comparisons, 0.3)
    assert len(train) + len(test) == 180
    assert 20 < len(test) < 100
    heads = [{c.prompt.split()[0] for c in side} for side in (train, test)]
    assert heads[0] & heads[1] == set()
    found = folds(comparisons, 5)
    assert found[:60] == found[60:120] == found[120:]
    assert set(found) == {0, 1, 2, 3, 4}


def test_an_encoder_reads_the_sampled_ids_and_other_texts_anew(load_lm, tmp_path):
    lm = load_lm("llama")
    config = AutoConfig.for_model(
        "distilbert", vocab_size=V, dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=1
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    model = RewardModel.from_backbone(str(tmp_path))
    ids = ((2, 4, 5), ((6, 7, 3), (8, 3)))
    sampled = Comparison("a b", (" c d", " e"), best=0, ids=ids)
    encoded, _ = encode_comparisons([sampled], model, None)
    assert [list(row) for row in encoded[0].rows] == [[2, 4, 5, 6, 7, 3], [2, 4, 5, 8, 3]]
    # Ids that do not spell the prompt are another tokenizer's: the text is read.
    stranger = replace(sampled, ids=((2, 9, 9), ids[1]))
    encoded, _ = encode_comparisons([stranger], model, None)
    assert [list(row) for row in encoded[0].rows] == [
        model.encode("a b", " c d"),
        model.encode("a b", " e"),
    ]


def test_a_causal_model_reads_no_ids_of_another_tokenizer(save_reward_model):
    model = RewardModel.load(save_reward_model())
    ids = ((2, 4, 5), ((6, 7, 3), (8, 3)))
    sampled = Comparison("a b", (" c d", " e"), best=0, ids=ids)
    encoded, _ = encode_comparisons([sampled], model, None)
    assert (encoded[0].prompt, encoded[0].candidates) == ([2, 4, 5], [[6, 7, 3], [8, 3]])
    for other in (((2, 4, 5), ((9, 9, 3), (8, 3))), ((2, 9, 9), ids[1]), ((2, 900), ids[1])):
        encoded, fit = encode_comparisons([replace(sampled, ids=other)], model, None)
        assert encoded[0].rows == [
            model.encode("a b", text, finished=True) for text in (" c d", " e")
        ]
        assert (fit.whole, fit.retokenised) == (1, 1)
        assert "1 re-tokenised" in str(fit)
    # A text may name its special tokens.
    named = replace(sampled, prompt="<s> a b", candidates=("c d </s>", "e </s>"))
    encoded, fit = encode_comparisons([named], model, None)
    assert (encoded[0].candidates, fit.retokenised) == ([[6, 7, 3], [8, 3]], 0)


def test_a_chat_that_the_template_refuses_is_said(save_reward_model):
    model = RewardModel.load(save_reward_model())
    model.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    chat = Comparison([{"role": "system", "content": "a"}], (" c", " d"), best=0)
    with pytest.raises(InputError, match=r"refuses .* no system role"):
        encode_comparisons([chat], model, None)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: every text opens with a space of its own."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "▁", "▁a", "▁b", "▁c", "▁d", "a", "b", "c", "d"]
    raw = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", letter) for letter in "abcd"],
            unk_token="<unk>",
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_a_candidate_is_tokenised_as_what_continues_its_prompt():
    tokenizer = spaced_tokenizer()
    name = tokenizer.convert_ids_to_tokens
    prompt, candidates = Comparison("a b", (" c d", "c"), best=0).encode(tokenizer)
    assert name(prompt) == ["▁a", "▁b"]
    assert [name(ids) for ids in candidates] == [["▁c", "▁d", "</s>"], ["c", "</s>"]]
    assert name(tokenizer(" c d")["input_ids"]) == ["▁", "▁c", "▁d"]  # by itself
    tokenizer.chat_template = "{{ messages[0]['content'] }} b"
    chat = Comparison([{"role": "user", "content": "a"}], (" c", " d"), best=0)
    prompt, candidates = chat.encode(tokenizer)
    assert name(prompt) == ["▁a", "▁b"]
    assert [name(ids) for ids in candidates] == [["▁c", "</s>"], ["▁d", "</s>"]]
