from __future__ import annotations

from kvllm.methods.recent import Recent
from tests.methods.windows import random_window


def test_the_newest_stay_for_every_head():
    window = random_window(num_tokens=24, num_kv_heads=2)
    assert Recent().compress(window, 5).indices.tolist() == [[list(range(19, 24))] * 2] * 2
