"""Weights are complete and sound, or loading is refused with the cause."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, BartForSequenceClassification

from agents.sb3.policy.critic import load_critic
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.rewards.reward_model import RewardModel

Weights = dict[str, torch.Tensor]


@pytest.fixture
def changed(save_reward_model, save_lm, tmp_path) -> Callable[..., str]:
    """A copy of a reward model or a language model with its weights changed."""

    def make(change: Callable[[Weights], Weights], kind: str = "reward") -> str:
        source = save_reward_model() if kind == "reward" else save_lm("llama")
        folder = tmp_path / f"changed-{kind}"
        shutil.copytree(source, folder)
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return str(folder)

    return make


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda w: {k: v for k, v in w.items() if not any(part in k for part in parts)}


def spoiled(value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        key = next(k for k in sorted(weights) if "mlp" in k)
        weights[key].flatten()[3] = value
        return weights

    return change


def load_reward(folder: str) -> Any:
    return RewardModel.load(folder)


def load_policy(folder: str) -> Any:
    return CausalLM.load(folder)


def load_backbone(folder: str) -> Any:
    return RewardModel.from_backbone(folder)


@pytest.mark.parametrize(
    ("kind", "load", "lost"),
    [
        ("reward", load_reward, "score"),
        ("reward", load_reward, "layers.0.mlp.up_proj"),
        ("reward", load_backbone, "layers.0.mlp.up_proj"),
        ("lm", load_backbone, "layers.0.self_attn"),
        ("lm", load_policy, "layers.0.self_attn"),
    ],
)
def test_a_missing_weight_is_named(changed, kind, load, lost):
    folder = changed(without(lost), kind)
    with pytest.raises(InputError, match=rf"lacks weights of a .*random: .*{lost}"):
        load(folder)


def test_a_critics_trunk_is_whole(changed, save_lm):
    policy = CausalLM.load(save_lm("llama"))
    folder = changed(without("layers.0.mlp"), "reward")
    with pytest.raises(InputError, match=r"lacks weights of a .*layers\.0\.mlp"):
        load_critic(folder, policy, revision=None, attn_implementation=None)


def test_a_new_head_may_be_new(changed):
    folder = changed(without("score"), "reward")
    assert torch.isfinite(RewardModel.from_backbone(folder).scores(torch.tensor([[4, 5]]))).all()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize(("kind", "load"), [("reward", load_reward), ("lm", load_policy)])
def test_weights_saved_through_a_wrapper_are_told(changed, kind, load, prefix):
    def wrapped(weights: Weights) -> Weights:
        return {prefix + key: value for key, value in weights.items()}

    with pytest.raises(InputError, match="saved through a wrapper"):
        load(changed(wrapped, kind))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "load"), [("reward", load_reward), ("lm", load_policy)])
def test_a_weight_that_is_not_finite_is_named(changed, kind, load, value):
    with pytest.raises(InputError, match=r"the weight .*mlp.* has a NaN or an infinity"):
        load(changed(spoiled(value), kind))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"junk" + b[4:]])
def test_a_damaged_file_is_told(changed, damage):
    folder = changed(lambda w: w)
    file = Path(folder) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match="are damaged"):
        load_reward(folder)


def test_pickles_are_not_loaded(changed):
    folder = Path(changed(lambda w: w))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"with safetensors"):
        load_reward(str(folder))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
def test_adapters_alone_are_told_from_a_model(save_lm, tmp_path):
    peft = pytest.importorskip("peft")
    lm = AutoModelForCausalLM.from_pretrained(save_lm("llama"))
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(lm, config).save_pretrained(tmp_path / "lora")
    for load in (load_policy, load_reward, load_backbone):
        with pytest.raises(InputError, match=r"adapters of a model alone .*merge_and_unload"):
            load(str(tmp_path / "lora"))


def test_paths_that_are_no_models_are_told(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(InputError, match="is a file; give the folder"):
        load_policy(str(file))
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(InputError, match="there is no such folder"):
            load_policy(name)


def test_an_encoder_decoder_is_no_backbone(tmp_path):
    config = BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, num_labels=1,
    )  # fmt: skip
    BartForSequenceClassification(config).save_pretrained(tmp_path / "bart")
    for load in (load_reward, load_backbone, load_policy):
        with pytest.raises(InputError, match=r"is an encoder-decoder \(bart\)"):
            load(str(tmp_path / "bart"))
