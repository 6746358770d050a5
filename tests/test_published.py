"""The published settings run on stand-ins that have the layout of the hub's files."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import gymnasium
import numpy as np
import pytest
import torch
from conftest import PLAIN
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import rlhf_gym
from agents.sb3 import PPO, build
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError, UnreachableError
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tasks.published import SETTINGS
from rlhf_gym.tokens import continuations, row_lengths

PAD = 50259  # what Ziegler's files are padded with
REVIEW = (
    "I saw this film last night. It was long and dull, and the story went nowhere. "
    "My sister liked the music. The ending was a surprise, and the actors were good. "
)
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, GPT-2's kind, so that every text has ids."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([REVIEW] * 4, vocab_size=320, special_tokens=[END])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=END, bos_token=END, unk_token=END
    )


def shape(family: str, words: int, **options: Any) -> Any:
    common = {"vocab_size": words, "bos_token_id": 0, "eos_token_id": 0}
    small = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 640},
        "gpt_neox": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 640,
        },
        "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    }
    return AutoConfig.for_model(family, **common, **small[family], **options)


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tokenizer) -> Path:
    """Tiny models and data, each under the name and in the layout of the real one."""
    folder = tmp_path_factory.mktemp("hub")
    words = len(tokenizer)
    torch.manual_seed(0)

    def language_model(name: str, family: str, *, with_tokenizer: bool = True) -> None:
        model = AutoModelForCausalLM.from_config(shape(family, words))
        model.save_pretrained(folder / name)
        if with_tokenizer:
            tokenizer.save_pretrained(folder / name)

    def classifier(name: str, family: str, **options: Any) -> None:
        config = shape(family, words, pad_token_id=0, initializer_range=0.5, **options)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    language_model("lvwerra/gpt2-imdb", "gpt2")
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    classifier(
        "lvwerra/distilbert-imdb",
        "distilbert",
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    rows = datasets.Dataset.from_dict(
        {"text": [f"{REVIEW} {i} {REVIEW * (i % 3)}" for i in range(12)], "label": [0, 1] * 6}
    )
    imdb = folder / "stanfordnlp/imdb"
    (imdb / "plain_text").mkdir(parents=True)
    for split in ("train", "test", "unsupervised"):
        rows.to_parquet(imdb / f"plain_text/{split}-00000-of-00001.parquet")
    paths = "\n".join(
        f"  - split: {split}\n    path: plain_text/{split}-*"
        for split in ("train", "test", "unsupervised")
    )
    (imdb / "README.md").write_text(
        f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{paths}\n  default: true\n---\n"
    )

    language_model("cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr", "gpt_neox")
    classifier("cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr", "gpt_neox", num_labels=1)
    post = "SUBREDDIT: r/films\n\nTITLE: one {}\n\nPOST: " + REVIEW + "\n\nTL;DR:"
    queries = datasets.Dataset.from_dict(
        {"query": [post.format(i) for i in range(12)], "query_token": [[1, 2]] * 12}
    )
    tldr = folder / str(SETTINGS["TLDR-v0"].keywords["prompts"])
    (tldr / "data").mkdir(parents=True)
    queries.to_parquet(tldr / "data/train-00000-of-00001.parquet")

    language_model("Dahoas/pythia-125M-static-sft", "gpt_neox", with_tokenizer=False)
    tokenizer.save_pretrained(folder / "EleutherAI/gpt-neox-20b")
    for kind in ("harmless-base", "helpful-base"):
        at = folder / "Anthropic/hh-rlhf" / kind
        at.mkdir(parents=True)
        with gzip.open(at / "train.jsonl.gz", "wt") as file:
            for i in range(6):
                said = f"\n\nHuman: {kind} question {i}?\n\nAssistant:"
                row = {"chosen": f"{said} yes, do.", "rejected": f"{said} no."}
                file.write(json.dumps(row) + "\n")
    classifier("own/reward", "gpt_neox", num_labels=1)

    language_model("openai-community/gpt2", "gpt2")
    for name in ("sentiment", "descriptiveness"):
        at = folder / "vwxyzjn/lm-human-preferences" / name
        at.mkdir(parents=True)
        ids = tokenizer(REVIEW)["input_ids"]
        labels_of = [
            {
                "query": ([*ids[i : i + 40], *[PAD] * 24]),
                **{f"sample{k}": ids[k : k + 24] for k in range(4)},
                "best": i % 4,
            }
            for i in range(12)
        ]
        (at / "offline_5k.json").write_text(json.dumps(labels_of))
    return folder


def options(setting: str, hub: Path) -> dict[str, Any]:
    own = {"reward_model": str(hub / "own/reward")} if SETTINGS[setting].reward_model else {}
    return {"local_dir": str(hub), "device": "cpu", "split": "all", **own}


def make(setting: str, hub: Path, **more: Any) -> Any:
    return gymnasium.make_vec(
        f"rlhf_gym/{setting}", num_envs=4, **{**options(setting, hub), **more}
    ).unwrapped


def wave(env: Any) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Responses of the reference, with what they are paid."""
    torch.manual_seed(0)
    observations, _ = env.reset(seed=0)
    rows = torch.from_numpy(observations[:, : env.prompts.max_tokens])
    actions = sample_responses(
        env.objective.reference, rows, env.max_new_tokens, stop_at_eos=env.stop_at_eos
    ).numpy()
    rewards, infos, _ = env.play(actions)
    return actions, rewards, infos


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_runs_and_can_be_learned(setting, hub):
    env = make(setting, hub)
    _, rewards, infos = wave(env)
    assert np.isfinite(rewards).all()
    assert len(set(infos["response"])) > 1
    learner = build(PPO, env, **PLAIN, seed=0, device="cpu", n_minibatches=2)
    learner.learn(2 * 4 * env.max_new_tokens)
    assert learner.logger.name_to_value["train/ratio_first_max_error"] < 1e-4
    single = gymnasium.make(f"rlhf_gym/{setting}", **options(setting, hub))
    observation, _ = single.reset(seed=0)
    assert single.observation_space.contains(observation)
    assert json.loads(single.spec.to_json())["id"] == f"rlhf_gym/{setting}"


def test_imdb_continues_the_end_of_half_a_review(hub, tokenizer):
    env = make("IMDB-v0", hub)
    _, _, infos = wave(env)
    assert ((infos["score"] > 0) & (infos["score"] < 1)).all()
    assert max(map(len, env.prompts.ids)) == 64
    review = f"{REVIEW} 2 {REVIEW * 2}"
    words = review.split(" ")
    half = tokenizer(" ".join(words[: len(words) // 2]))["input_ids"]
    assert tuple(half[-64:]) in env.prompts.ids
    fixed = make("IMDB-v0", hub, min_new_tokens=48)
    actions, _, infos = wave(fixed)
    assert (row_lengths(actions) == 48).all()
    assert set(infos["finish_reason"]) == {"length"}


def test_ones_own_parts_leave_behind_what_described_the_published_ones(hub):
    env = make("IMDB-v0", hub, reward_model=str(hub / "own/reward"))
    assert not env.objective.reward.probability
    env = make("TLDR-v0", hub, prompts=str(hub / "stanfordnlp/imdb"))  # column "text" is found
    assert len(env.prompts) > 1
    several = [str(hub / "own/reward"), "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"]
    assert len(make("TLDR-v0", hub, reward_model=several).objective.reward.members) == 2


def test_tldr_replaces_the_score_of_what_does_not_end(hub):
    env = make("TLDR-v0", hub, max_new_tokens=8)
    assert env.objective.reference.temperature == 0.7
    _, _, infos = wave(env)
    for score, reason in zip(infos["score"], infos["finish_reason"], strict=True):
        assert (score == -1.0) == (reason == "length")
    assert "length" in infos["finish_reason"]


def test_hh_takes_the_prompt_of_a_dialogue_and_scores_the_first_turn(hub, tokenizer):
    env = make("HH-v0", hub)
    texts = {tokenizer.decode(ids) for ids in env.prompts.ids}
    assert len(texts) == 12
    assert all(text.endswith("?\n\nAssistant:") for text in texts)
    replies = [" good.\n\nHuman: awful awful", " good.", " awful.", " awful.\n\nHuman: good good"]
    ids = [tokenizer(reply)["input_ids"][:40] for reply in replies]
    env = make("HH-v0", hub, reward_model="rlhf_gym.rewards.human:compound", max_new_tokens=40)
    env.reset(seed=0, options={"prompt_index": 0})
    rows = np.array([[*row, 0, *[-1] * (39 - len(row))] for row in ids])
    _, infos, _ = env.play(rows, np.zeros(rows.shape))
    assert infos["score"][0] > 0 > infos["score"][2]
    assert infos["score"][3] < 0
    # Where the agent begins to speak for the human, the reward model does not listen.
    seen = env.objective.cuts[0](_settled(env, rows))
    assert [text.strip() for text in seen.texts] == ["good.", "good.", "awful.", "awful."]


def _settled(env: Any, rows: np.ndarray) -> Any:
    return Responses(
        env.objective.reference,
        continuations(torch.from_numpy(env._tokens), torch.from_numpy(rows)),
    )


def test_a_folder_without_a_tokenizer_is_not_taken_for_one_that_has(hub):
    with pytest.raises(UnreachableError, match="no tokenizer files"):
        load_tokenizer(str(hub / "Dahoas/pythia-125M-static-sft"))
    model = RewardModel.from_backbone(
        str(hub / "Dahoas/pythia-125M-static-sft"),
        tokenizer=str(hub / "EleutherAI/gpt-neox-20b"),
    )
    assert len(model.tokenizer) > 256


def test_cut_prompts_keep_their_bos_and_their_side(tokenizer):
    class Opening:
        """A tokenizer that opens each text with id 7."""

        bos_token_id = 7
        all_special_ids = (7,)

        def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
            if isinstance(text, str):
                return {"input_ids": [7, *map(int, text.split())]}
            return {"input_ids": [self(one)["input_ids"] for one in text]}

    texts = ["1 2 3 4 5", "9 3 4 5", "3 4 5", "1 2"]
    last = PromptDataset.from_texts(texts, Opening(), (), 4, keep="last")
    assert last.ids == ((7, 3, 4, 5), (7, 1, 2))
    first = PromptDataset.from_texts(texts, Opening(), (), 3, keep="first")
    assert first.ids == ((7, 1, 2), (7, 9, 3), (7, 3, 4))
    alike = [f"{i} 3 4 5" for i in range(100)]  # once they are cut
    found = []
    for side in ("train", "held_out"):
        try:
            found += PromptDataset.from_texts(
                alike, Opening(), (), 4, keep="last", split=side, held_out=0.5
            ).ids
        except InputError:  # the other side has it
            continue
    assert found == [(7, 3, 4, 5)]
    one_word = PromptDataset.from_texts(["5"], Opening(), (), 4, share=0.5)
    assert one_word.ids == ((7, 5),)


@pytest.mark.parametrize("setting", ["Sentiment-v0", "Descriptiveness-v0"])
def test_ziegler_takes_the_very_ids_and_24_tokens(setting, hub, tokenizer):
    env = make(setting, hub)
    ids = tokenizer(REVIEW)["input_ids"]
    assert tuple(ids[:40]) in env.prompts.ids
    assert not any(PAD in row for row in env.prompts.ids)
    actions, _, infos = wave(env)
    assert (row_lengths(actions) == 24).all()
    stop = tokenizer(".")["input_ids"][0]
    found = (actions[:, 16:] == stop).any(1)
    np.testing.assert_array_equal(infos["score"] == -1.0, ~found)
    assert not found.all()


def test_each_setting_is_registered_with_words_that_text_v0_knows(hub):
    names = {name for name in gymnasium.registry if name.startswith("rlhf_gym/")}
    assert {f"rlhf_gym/{name}" for name in SETTINGS} <= names
    assert rlhf_gym.__version__
    for setting in SETTINGS.values():
        assert "arXiv" in setting.source
        json.dumps(setting.keywords)


@pytest.mark.parametrize("setting", ["HH-v0", "Sentiment-v0", "Descriptiveness-v0"])
def test_a_reward_model_of_ones_own_is_asked_for(setting, hub):
    with pytest.raises(InputError, match=r"train_reward_model\.py --data .* --run-dir"):
        gymnasium.make(f"rlhf_gym/{setting}", local_dir=str(hub))


def test_where_no_hub_is_reached_the_error_says_what_to_fetch(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("rlhf_gym.lm.loading.load_pretrained", unreachable)
    with pytest.raises(UnreachableError) as caught:
        gymnasium.make("rlhf_gym/IMDB-v0")
    said = str(caught.value)
    assert "hf download lvwerra/gpt2-imdb --local-dir hub/lvwerra/gpt2-imdb" in said
    assert "stanfordnlp/imdb --repo-type dataset --revision e6281661" in said
    assert "local_dir='hub'" in said
    # What is there already need not be fetched, and what the user named is the user's.
    few = tmp_path / "few"
    (few / "lvwerra").mkdir(parents=True)
    (few / "lvwerra/gpt2-imdb").symlink_to(hub / "lvwerra/gpt2-imdb")
    with pytest.raises(UnreachableError) as caught:
        gymnasium.make("rlhf_gym/IMDB-v0", local_dir=str(few), reward_model="nothing")
    said = str(caught.value)
    assert said.count("hf download") == 1
    assert "stanfordnlp/imdb" in said
    with pytest.raises(InputError, match="is not a folder"):
        gymnasium.make("rlhf_gym/IMDB-v0", local_dir=str(tmp_path / "nowhere"))


def unreachable(auto_class: Any, name: str, **_: Any) -> Any:
    raise UnreachableError(f"cannot load the model {name!r}: no hub can be reached")


def test_files_of_hub_datasets_are_pinned(monkeypatch):
    asked: dict[str, Any] = {}

    def load_dataset(kind: str, **options: Any) -> list[dict[str, str]]:
        asked.update(options, kind=kind)
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_rows("hf://datasets/owner/name/some/file.json", revision="abc")
    assert found[0][1] == {"text": "x"}
    assert asked["data_files"] == "hf://datasets/owner/name@abc/some/file.json"
    assert asked["kind"] == "json"


@pytest.mark.parametrize(
    ("option", "value"), [("prompt_share", 0.0), ("prompt_share", 1.5), ("prompt_keep", "middle")]
)
def test_bad_cuts_of_prompts_are_refused(hub, option, value):
    with pytest.raises(InputError, match=option):
        make("IMDB-v0", hub, **{option: value})
