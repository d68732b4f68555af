from __future__ import annotations

import pytest

from kvllm.methods.streaming_llm import StreamingLLM
from tests.methods.windows import random_window


@pytest.mark.parametrize(
    "num_sink_tokens, num_kept, expected",
    [
        (4, 6, [0, 1, 2, 3, 22, 23]),
        (0, 3, [21, 22, 23]),
        (4, 4, [0, 1, 2, 3]),
        (4, 2, [0, 1]),
        (99, 3, [0, 1, 2]),
    ],
)
def test_the_first_and_the_newest_are_kept(num_sink_tokens, num_kept, expected):
    kept = StreamingLLM(num_sink_tokens=num_sink_tokens).compress(random_window(num_tokens=24), num_kept)
    assert kept.indices.tolist() == [[expected, expected]] * 2


def test_options():
    with pytest.raises(ValueError, match="num_sink_tokens=-1: must be an integer >= 0"):
        StreamingLLM(num_sink_tokens=-1)
