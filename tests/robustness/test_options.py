"""Any value of a compression option is either accepted or refused with a message that names the option."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.layout import Geometry
from kvllm.methods import checked_config, methods
from kvllm.options import options_of
from tests.robustness import LONG, examples

FIELDS = sorted(options_of(KvConfig))
numbers = st.one_of(
    st.integers(-3, 5000), st.sampled_from([16, 32, 64, 128, 256, 512, 1024, 1 << 40]), st.floats(), st.booleans()
)
anything = st.recursive(
    st.none() | numbers | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
likely = st.one_of(
    numbers,
    st.sampled_from(["window", "budget", "0.2-0.5,1.0", "0.5-0.2", "1.0,,", "nan", ""]),
    st.sampled_from(sorted(methods())),
    anything,
)
options = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), likely, max_size=5)
relaxed = settings(
    max_examples=examples(150, 20_000),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not LONG,
)


@relaxed
@given(options, st.sampled_from([1, 16, 32, 48]))
def test_options_work_or_are_refused_by_name(given_options: dict[str, Any], block_size: int) -> None:
    try:
        config = checked_config(given_options)
        Geometry.from_config(config, block_size)
    except UsageError as e:
        assert str(e) and any(str(name) in str(e) for name in (*given_options, *FIELDS))
        return
    assert checked_config(json.loads(json.dumps(config.to_dict()))) == config
    for ratio in config.all_ratios[:50]:
        assert 0 < ratio <= 1 and config.allows_ratio(ratio)


@relaxed
@given(
    st.floats(0.05, 0.99), st.sampled_from([16, 32, 48, 64, 256]), st.sampled_from([0, 8, 64, 100]),
    st.sampled_from([0, 64, 96, 512]), st.integers(1, 600), st.integers(1, 3000),
)  # fmt: skip
def test_a_layout_never_holds_more_than_its_peak(
    ratio: float, window: int, buffer: int, history: int, prompt: int, generated: int
) -> None:
    """Invariants of section 3 for any sizes: what is held is at most the text, and at most `peak_blocks`."""
    try:
        config = KvConfig(
            retention_ratio=ratio, window_size=window, buffer_size=buffer or 8, history_size=history, query_stride=8
        )
        geometry = Geometry.from_config(config, 16)
    except UsageError:
        return
    assert geometry is not None
    total = prompt + generated
    held = geometry.physical_len(prompt, total)
    assert 0 < held <= total and geometry.max_chunk(prompt, total) > 0
    assert -(-geometry.physical_len(prompt, total - 1) // 16) <= geometry.peak_blocks(prompt, total)
    most = geometry.max_tokens_that_fit(prompt, geometry.peak_blocks(prompt, total))
    assert most >= total


@pytest.mark.parametrize("value", ["0.5", True, None, float("nan"), [], {}])
def test_a_ratio_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="retention_ratio"):
        checked_config({"retention_ratio": value})
