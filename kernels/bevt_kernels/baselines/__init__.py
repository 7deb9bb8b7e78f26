"""What others offer for each op, in its strongest fair form: the rivals of benchmarks, checked by tests.

Each has the op's inputs and results, and is differentiable in what the op is. One module an op, one table a module, by
the name that a benchmark's row carries.
"""

from bevt_kernels.baselines.common import Baseline
from bevt_kernels.baselines.conv3x3 import CONV3X3
from bevt_kernels.baselines.linear import LINEAR
from bevt_kernels.baselines.linear_argmax import LINEAR_ARGMAX
from bevt_kernels.baselines.masked_linear_cross_entropy import MASKED_LINEAR_CROSS_ENTROPY
from bevt_kernels.baselines.window_attention import WINDOW_ATTENTION

__all__ = ["CONV3X3", "LINEAR", "LINEAR_ARGMAX", "MASKED_LINEAR_CROSS_ENTROPY", "WINDOW_ATTENTION", "Baseline"]
