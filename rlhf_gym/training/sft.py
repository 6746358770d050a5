"""Supervised fine-tuning (SFT): a causal LM learns to give the responses of a data set.

The loss of an update is the mean of -log p(token | state) over all its response tokens, EOS
included; prompts and padding have none. Several examples share a row ("packing"): positions
restart with each, which is how transformers' attention masks know that they must not see one
another.

Notation: N rows, L columns, V the number of usable tokens.
"""

import inspect
import logging
import math
import shutil
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rlhf_gym.errors import InputError
from rlhf_gym.lm import MAX_TOKENS_PER_PASS, CausalLM
from rlhf_gym.prompts import Prompt, is_held_out, prompt_ids
from rlhf_gym.prompts import _dataset_rows as dataset_rows
from rlhf_gym.prompts import _field as field
from rlhf_gym.tokens import Sequences, model_ids, pad_rows, row_sums
from rlhf_gym.training.progress import RichProgress

logger = logging.getLogger(__name__)
