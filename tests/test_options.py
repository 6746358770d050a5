"""Options on the command line are read as they are meant, and checked before hours are spent."""

import json
import re
from dataclasses import replace

import pytest
from test_scripts import load_script

from rlhf_gym.errors import InputError


def test_values_are_json_or_pythons_constants_or_text():
    from agents.runs.setup import parse_values

    texts = {"a": "1e-3", "b": "False", "c": "true", "d": "None", "e": '["x"]', "f": "Falsey"}
    assert list(parse_values(texts).values()) == [1e-3, False, True, None, ["x"], "Falsey"]


def test_another_run_is_told_by_the_options_that_differ(tmp_path):
    from agents.runs.setup import begin_run, check_same_run

    def config(rate: float, **keywords: str) -> dict[str, object]:
        own = {"learning_rate": rate, "kl_coef": None}
        places = {"run_dir": tmp_path / "here", "device": f"cuda:{rate}"}
        return {"seed": 0, "env_kwargs": keywords, "algorithm_options": own, **places}

    begin_run(tmp_path, config(1, kl_coef="0.1"))
    check_same_run(tmp_path, config(1, kl_coef="0.1"), resume=True)
    with pytest.raises(InputError) as raised:
        check_same_run(tmp_path, config(2, split="all"), resume=True)
    assert (
        "a run with env_kwargs.kl_coef = 0.1, not (no such option), env_kwargs.split = (no such "
        "option), not all, learning_rate = 1, not 2; give"
    ) in str(raised.value)
    # Of a folder of another script's, a few are enough.
    (tmp_path / "config.json").write_text(json.dumps({f"o{i}": i for i in range(30)}))
    with pytest.raises(InputError, match="and 28 more; give") as raised:
        check_same_run(tmp_path, config(1), resume=True)
    assert len(str(raised.value)) < 500


def test_a_count_that_is_tuned_stays_a_count():
    from agents.runs import comparison_options

    tuned = {"ppo": "n_epochs", "sb3_trpo": "target_kl"}
    config = comparison_options.ComparisonOptions(
        algorithms=tuple(tuned), rates=(1.0,), tuned=tuned
    )
    found = [
        comparison_options.multiple(config, "ppo", rate)["n_epochs"]
        for rate in (0.1, 0.4, 1.2, 1.3, 3)
    ]
    assert found == [1, 1, 2, 3, 6]
    assert all(isinstance(n, int) for n in found)
    assert comparison_options.multiple(config, "sb3_trpo", 0.5) == {"target_kl": 0.005}
    no_choice = replace(config, tuned={"ppo": "critic_warmup"}, options={"ppo.critic_warmup": "0"})
    with pytest.raises(InputError, match="critic_warmup of ppo is 0"):
        comparison_options.check_options(no_choice)


WRONG = [
    ("critic", "sharde", "'sharde' is not one of auto, shared, separate, reward_model"),
    ("kl_control", "adaptiv", "'adaptiv' is not one of fixed, adaptive, lagrangian"),
    ("n_epochs", "two", "'two' is not a whole number"),
    ("n_epochs", "2.5", "2.5 is not a whole number"),
    ("anneal", "no", "'no' is not True or False"),
    ("kl_loss", "k4", "'k4' is not one of exact, k2, k3 or None"),
    ("gamme", "1", "ppo has no option 'gamme'"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_options_are_checked_before_anything_is_trained(tmp_path, name, value, message):
    study_ppo = load_script("studies/ppo.py")
    from agents.cli import compare

    where = {"run_dir": tmp_path / "run", "device": "cpu"}
    one = compare.Config(algorithms=("ppo",), options={f"ppo.{name}": value}, **where)
    with pytest.raises(InputError, match=re.escape(f"--options ppo.{name}: {message}")):
        compare.main(one)
    study = study_ppo.Config(options={name: value}, variants=("default",), **where)
    with pytest.raises(InputError, match=re.escape(f"--options {name}: {message}")):
        study_ppo.main(study)
    assert not any(tmp_path.iterdir())


def test_every_variant_of_the_study_fits_its_algorithm():
    study_ppo = load_script("studies/ppo.py")
    from agents.runs.experiments import with_options

    for variant in study_ppo.VARIANTS:
        whole = with_options(variant.algorithm, study_ppo.options(study_ppo.Config(), variant))
        assert with_options(variant.algorithm, vars(whole)) == whole, "its defaults fit too"


def test_options_that_fit_are_taken_as_they_are_meant():
    from agents.runs import comparison_options

    said = "learning_rate 1 anneal False critic_lambda None clip_range_vf 0.2 n_epochs 3".split()
    texts = {f"ppo.{name}": text for name, text in zip(said[::2], said[1::2], strict=True)}
    config = comparison_options.ComparisonOptions(algorithms=("ppo",), options=texts)
    comparison_options.check_options(config)
    assert comparison_options.own_options(config, "ppo") == {
        "learning_rate": 1, "anneal": False, "critic_lambda": None, "clip_range_vf": 0.2,
        "n_epochs": 3,
    }  # fmt: skip
    none_at_all = replace(config, options={"ppo.n_waves": "0"})
    with pytest.raises(InputError, match="n_waves must be at least 1, not 0"):
        comparison_options.check_options(none_at_all)
