"""Gets the log-sum-exp (the logarithm of the softmax's denominator), which vLLM's attention backend does not return."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvllm.engine.touch import Patch

if TYPE_CHECKING:
    from torch import Tensor


class LogSumExp:
    """The log-sum-exp of the last call of `flash_attn_varlen_func` made while `wanted` was set."""

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
    "attention over packed survivors is merged with the backend's output by its log-sum-exp",
    "vLLM's backends return the log-sum-exp",
    wrap=with_log_sum_exp,
)
