"""Exact FlashAttention for CuPy, PyTorch, JAX and NumPy arrays, from CUDA sources compiled at run time."""

from cuflash.api import attention, explain
from cuflash.api_backward import attention_backward
from cuflash.explanation import Explanation
from cuflash.kv_cache import attention_kv_cache
from cuflash.mask_summary import MaskSummary
from cuflash.merge import merge_attention
from cuflash.varlen import attention_varlen, attention_varlen_backward

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "MaskSummary",
    "__version__",
    "attention",
    "attention_backward",
    "attention_kv_cache",
    "attention_varlen",
    "attention_varlen_backward",
    "explain",
    "merge_attention",
]
