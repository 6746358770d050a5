"""Human comparisons: the file format, its readers, the listwise likelihood, encoding."""

from rlhf_gym.preferences.comparison import Comparison, write_comparisons
from rlhf_gym.preferences.formats import read_comparisons

__all__ = ["Comparison", "read_comparisons", "write_comparisons"]
