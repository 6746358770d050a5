"""A stranger's model is loaded, fine-tuned, saved and loaded again with the same log-probs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUDGET, PROMPTS, ModelActor, draw_responses
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_gym.lm.causal_lm import CausalLM, continuation_log_probs
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import pad_rows
from rlhf_gym.training.sft_data import load_examples
from rlhf_gym.training.sft_run import fine_tune

Maker = Callable[[Path, Any], None]


def plain(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)


def sharded(folder: Path, model: Any) -> None:
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3


def bfloat16(folder: Path, model: Any) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)


def merged_adapters(folder: Path, model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.merge_and_unload().save_pretrained(folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            found |= {key: weights.get_tensor(key) for key in weights.keys()}
    return found


def log_probs(lm: CausalLM) -> torch.Tensor:
    prompts = [lm.tokenizer(text)["input_ids"] for text in PROMPTS] * 3
    rows = torch.from_numpy(pad_rows(prompts))
    return continuation_log_probs(lm, rows, torch.from_numpy(draw_responses(len(rows), BUDGET)))


def by_transformers(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return log_probs(CausalLM.wrap(model, AutoTokenizer.from_pretrained(folder)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("make", [plain, sharded, bfloat16, merged_adapters])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loaded_is_saved(save_lm, tmp_path, make, family, tied):
    source = save_lm(family, tie_word_embeddings=tied)
    theirs = tmp_path / "theirs"
    make(theirs, AutoModelForCausalLM.from_pretrained(source))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(source) / file, theirs / file)
    lm = CausalLM.load(str(theirs))
    torch.testing.assert_close(log_probs(lm), by_transformers(theirs), atol=1e-5, rtol=1e-5)
    assert (
        lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    ) == tied
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"prompt": p, "response": "a b c"} for p in PROMPTS * 2]))
    before = log_probs(lm)
    examples = load_examples(str(data), lm.tokenizer, lm.eos_ids, held_out=0.0)
    options = {"max_tokens": 16, "learning_rate": 1e-3, "epochs": 2.0, "progress": False}
    fine_tune(lm, examples, run_dir=tmp_path / "run", **options)
    learnt = log_probs(lm)
    assert float((learnt - before).abs().max()) > 1e-3
    ours = tmp_path / "run" / "policy"
    # The weights are saved as they were trained, in float32, whatever they were on the disk.
    weights = stored(ours)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert json.loads((ours / "config.json").read_text())["dtype"] == "float32"
    assert ("lm_head.weight" in weights) == (not tied)
    torch.testing.assert_close(log_probs(CausalLM.load(str(ours))), learnt, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(by_transformers(ours), learnt, atol=1e-5, rtol=1e-5)
    scores = RewardModel.from_backbone(str(ours)).scores(torch.tensor([[4, 5, 6]]))
    assert torch.isfinite(scores).all()


def test_a_policy_of_bfloat16_weights_acts_as_they_say(save_lm, tmp_path):
    source = save_lm("llama")
    bfloat16(tmp_path, AutoModelForCausalLM.from_pretrained(source))
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    rounded = CausalLM.load(str(tmp_path))
    whole = CausalLM.load(source)
    gap = float((log_probs(rounded) - log_probs(whole)).abs().max())
    assert 0 < gap < 0.5  # 8 bits for each weight
    assert rounded.model.dtype == torch.float32
    actor = ModelActor(rounded)
    assert actor.log_prob(pad_rows([[2, 4]], 3), torch.tensor([5]).numpy()).dtype == "float32"
