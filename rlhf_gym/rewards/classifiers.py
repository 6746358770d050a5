"""transformers' sequence classifiers: loaded, given a new head, and asked for their labels."""

import math

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_gym.errors import InputError
from rlhf_gym.lm.loading import load_config, load_pretrained
from rlhf_gym.rewards.score_scale import ScoreScale


def load_classifier(name: str, revision: str | None) -> PreTrainedModel:
    """A trained classifier by hub name or local path.

    Raises:
        InputError: It cannot be loaded, or is a model without a trained head.
    """
    # Of a model that never had a head the message is another than of one that has lost it.
    architectures = load_config(name, revision=revision).architectures or []
    if not any("ForSequenceClassification" in kind for kind in architectures):
        raise InputError(
            f"{name!r} is a {' or '.join(architectures) or 'model'} without a reward head; "
            "train one on it first: scripts/train_reward_model.py --backbone " + name
        )
    return load_pretrained(AutoModelForSequenceClassification, name, revision=revision)


def new_classifier(backbone: str, revision: str | None, heads: int) -> PreTrainedModel:
    """A causal LM, or the trunk of any classifier, with a new head of `heads` outputs.

    The head's weights have standard deviation 1/√(d+1) and its bias is 0, so a new model's logits
    spread by about 1. Source: Stiennon et al. 2020 (arXiv 2009.01325).

    Raises:
        InputError: There is not at least one head, weights other than the head's do not fit, or
            transformers has no classifier of this family.
    """
    if heads < 1:
        raise InputError(f"a reward model needs at least one head, not {heads}")
    config = load_config(backbone, revision=revision)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"transformers has no sequence classifier of the family {config.model_type!r}, so "
            f"{backbone!r} cannot be the backbone of a reward model; use a backbone of another "
            "family, or a function as the reward"
        )
    model = load_pretrained(
        AutoModelForSequenceClassification,
        backbone,
        revision=revision,
        new_head=True,
        num_labels=heads,
        problem_type=None,
    )
    head = linear_head(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    # The backbone may be a reward model; its scale belonged to its old head.
    ScoreScale.plain(heads).write(model.config)
    return model


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer, with one output for each label.

    Raises:
        InputError: There is none.
    """
    wide = model.config.num_labels
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == wide]
    if not heads:
        raise InputError(f"{type(model).__name__} has no linear head with {wide} outputs")
    return heads[-1]


def reward_column(model: PreTrainedModel, heads: int, label: str | int | None) -> int | None:
    """The output that is the reward; None if each output is a head with its own gain and bias.

    Args:
        model: The classifier.
        heads: Number of heads that its config has gains for.
        label: The label that is the reward, by name or index; needed if there are several.

    Raises:
        InputError: There are several labels and none is named, or there is no such label.
    """
    if model.config.num_labels != heads:
        return _label_index(model, label)
    if label is not None:
        if heads > 1:
            raise InputError(
                f"{model.name_or_path!r} is an ensemble of {heads} heads; it has no labels"
            )
        _label_index(model, label)  # a single label may be named, if that is its name
    return None


def label_probability(model: PreTrainedModel, outputs: Tensor, column: int) -> Tensor:
    """Probability of one label from a classifier's outputs: (B, number of labels) -> (B,)."""
    # A single label, or several that do not exclude each other, are a yes or no each.
    multi_label = model.config.problem_type == "multi_label_classification"
    each = multi_label or outputs.shape[1] == 1
    return (outputs.sigmoid() if each else outputs.softmax(-1))[:, column]


def _label_index(model: PreTrainedModel, label: str | int | None) -> int:
    names = {int(i): str(name) for i, name in (model.config.id2label or {}).items()}
    for i, name in names.items():
        if label in (i, name):
            return i
    wanted = "none is named" if label is None else f"{label!r} is none of them"
    raise InputError(
        f"the classifier {model.name_or_path!r} has the labels {', '.join(names.values())}; "
        f"{wanted}: say which one is the reward (reward_label)"
    )
