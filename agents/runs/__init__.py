"""Run a training, a comparison of algorithms, or all of RLHF from comparisons to report."""

from agents.runs.comparison import compare
from agents.runs.comparison_options import ComparisonOptions
from agents.runs.journey import run_journey
from agents.runs.journey_options import JourneyOptions
from agents.runs.labelling import label_samples
from agents.runs.training import Trained, train

__all__ = [
    "ComparisonOptions",
    "JourneyOptions",
    "Trained",
    "compare",
    "label_samples",
    "run_journey",
    "train",
]
