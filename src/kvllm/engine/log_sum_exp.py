"""What vLLM's attention backend knows and does not hand out: the logarithm of its softmax's denominator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvllm.engine.touch import Patch

if TYPE_CHECKING:
    from torch import Tensor


class LogSumExp:
    """Of the last call of `flash_attn_varlen_func` that was made while it was `wanted`."""

    wanted = False
    value: Tensor | None = None

    def take(self) -> Tensor:
        """[num_heads, num_tokens] float32"""
        value, self.value = self.value, None
        assert value is not None
        return value


LOG_SUM_EXP = LogSumExp()


def with_log_sum_exp(original: Callable[..., Any]) -> Callable[..., Any]:
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        if not LOG_SUM_EXP.wanted:
            return original(*args, **kwargs)
        output, LOG_SUM_EXP.value, *_ = original(*args, return_softmax_lse=True, **kwargs)
        return output

    return flash_attn_varlen_func


# Applied only where survivors are packed.
PATCH = Patch(
    "vllm.v1.attention.backends.flash_attn",
    "flash_attn_varlen_func(*args, **kwargs)",
    "the log-sum-exp of attention over prompt and tail, into which that over packed survivors is merged",
    "vLLM's backends hand out the log-sum-exp",
    wrap=with_log_sum_exp,
)
