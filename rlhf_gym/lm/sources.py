"""Where a model or a tokenizer is: a local folder or a hub name; and why it cannot be loaded."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from rlhf_gym.errors import InputError, UnreachableError
from rlhf_gym.utils.files import read_json
from rlhf_gym.utils.hub import no_hub

ADAPTER = "adapter_config.json"
"""What peft writes in place of a model's config.json."""

UNLOADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
    StrictDataclassError,
)
"""What transformers raises if a config, a tokenizer or weights are missing or broken."""


def check_source(name: str, *, what: str = "the model") -> None:
    """Check that a name is not a path to something else than a model.

    Args:
        name: The name.
        what: What is to be loaded, for the message.

    Raises:
        InputError: It is a path that does not exist, a file, or a folder with adapters alone.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise InputError(f"{name!r} is a file; give the folder that `save_pretrained` wrote")
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise InputError(f"cannot load {what} {name!r}: there is no such folder")
        return
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file() and what == "the model":
        base = read_json(path / ADAPTER).get("base_model_name_or_path")
        raise InputError(
            f"{name!r} has the adapters of a model alone (peft, base model {base!r}). Merge them "
            "and save the whole model: peft's AutoPeftModel…from_pretrained(folder)"
            ".merge_and_unload().save_pretrained(new folder)"
        )


def source_options(name: str, revision: str | None) -> dict[str, Any]:
    """Keywords with which transformers looks for a name.

    Code that comes with a model is never run, and where no hub can be reached nobody waits for it.
    """
    is_local = Path(name).exists()
    return {
        "revision": revision,
        "trust_remote_code": False,
        "local_files_only": not is_local and no_hub() is not None,
    }


def refusal(name: str, error: Exception, *, what: str = "the model") -> InputError:
    """The error for a name that transformers cannot load.

    Args:
        name: The name.
        error: What transformers raised.
        what: What was to be loaded.
    """
    if "trust_remote_code" in str(error):
        return InputError(
            f"{name!r} needs code of its own (auto_map in its config), and code that "
            "comes with a model is never run here (trust_remote_code is always False); take a "
            "model of a family that transformers has, or convert it to one"
        )
    reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    if isinstance(error, OSError) and not Path(name).exists():
        why = no_hub()
        reason = reason if why is None else f"it is not on this machine, and {why}"
    return UnreachableError(
        f"cannot load {what} {name!r}: {reason}\n"
        "Give the path of a folder written by `save_pretrained` (with safetensors), or a hub name "
        "that this machine can reach."
    )
