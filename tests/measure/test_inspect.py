"""What `kvllm inspect` shows is what the reference keeps, and its page opens in a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvllm.__main__ import app
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.layout import Geometry
from kvllm.measure.eval.traces import Trace, write_traces
from kvllm.measure.inspect.page import page
from kvllm.measure.inspect.record import Event, record
from kvllm.reference import Request, feed
from tests.reference.models import text, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK_SIZE, PROMPT, HEADS = 4, 10, 2
SIZES: dict[str, Any] = {
    "window_size": 16, "buffer_size": 8, "query_stride": 4, "retention_ratio": 0.5, "method": "recent",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "window": {},
    "kara": {"method": "kara"},
    "history": {"history_size": 16},
    "budget": {"policy": "budget", "budget_size": 16, "budget_interval": 8},
    "prompt": {"prompt_budget": 8},
}


def events_of(case: str, num_tokens: int = 90) -> tuple[KvConfig, list[Event]]:
    config = KvConfig(**SIZES | CASES[case])
    return config, record(tiny_model("llama"), text(num_tokens), PROMPT, config, BLOCK_SIZE)


def held(events: list[Event], num_tokens: int) -> torch.Tensor:
    """[num_layers, num_tokens]: heads that hold each token at the end, -1 where nothing was compressed."""
    total = torch.full((2, num_tokens), -1)
    for event in events:
        for span in event.spans:
            total[:, span.start : span.start + span.heads.shape[1]] = span.heads.to(total.dtype)
    return total


@pytest.mark.parametrize("case", CASES)
def test_as_many_heads_hold_tokens_as_the_layout_says(case: str) -> None:
    config, events = events_of(case)
    geometry = Geometry.from_config(config, BLOCK_SIZE)
    assert geometry is not None and len(events) >= 3
    for count in range(1, len(events) + 1):
        end = events[count - 1].window[1]
        assert end == geometry.tail_start(PROMPT, count)
        total = held(events[:count], 90)
        assert (total[:, end:] == -1).all()
        first = geometry.protected_len(PROMPT)
        assert (total[:, first:end].sum(dim=1) == HEADS * geometry.survivors(count)).all()
        cut = total[:, :first]
        assert (cut.sum(dim=1) == HEADS * 8).all() if case == "prompt" else (cut == -1).all()


def test_recent_keeps_the_newest_half_of_each_window() -> None:
    _, events = events_of("window")
    for event in events:
        (span,) = event.spans
        assert span.start == event.window[0]
        assert span.heads.tolist() == [[0] * 8 + [HEADS] * 8] * 2
        assert event.percentile.tolist() == pytest.approx([i / 15 for i in range(16)])


def test_recording_changes_nothing() -> None:
    config = KvConfig(**SIZES | CASES["kara"])
    request = Request(tiny_model("llama"), PROMPT, config, BLOCK_SIZE)
    feed(request, text(90))
    _, events = events_of("kara")
    for event, kept in zip(events, request.kept, strict=True):
        counts = torch.zeros(2, 16, dtype=torch.int64)
        counts.scatter_add_(1, kept.flatten(1), torch.ones_like(kept.flatten(1)))
        assert torch.equal(event.spans[0].heads.long(), counts)


def test_the_command_shows_a_trace(model_dir: Path, tmp_path: Path) -> None:
    traces, file = tmp_path / "traces.jsonl", tmp_path / "page.html"
    write_traces(traces, [Trace("a", text(60), 5), Trace("b", text(130), 20)])
    options = ["--window-size", "32", "--buffer-size", "16", "--retention-ratio", "0.5", "--output", str(file)]
    command = ["inspect", str(model_dir), "--trace", str(traces), *options]
    result = CliRunner().invoke(app, [*command, "--trace-id", "b"])
    assert result.exit_code == 0, result.output
    data = data_of(file.read_text())
    assert len(data["tokens"]) == 130 and data["numPrompt"] == 20 and data["numHeads"] == 3
    assert [event["window"] for event in data["events"]] == [[32, 64], [64, 96]]
    heads = [sum(base64.b64decode(span["heads"])) for event in data["events"] for span in event["spans"]]
    assert heads == [30 * 3 * 16] * 2
    for wrong, message in ((["--trace-id", "c"], "has a, b"), (["--max-tokens", "40"], "the text has 45 tokens")):
        with pytest.raises(UsageError, match=message):
            CliRunner().invoke(app, [*command, *wrong], catch_exceptions=False)
    for uneven in (["--retention-ratio", '{"0-14": 0.6, "15-29": 0.5}'], ["--method", "pyramidkv"]):
        with pytest.raises(UsageError, match="groups of layers keep different numbers of tokens, .* Use one ratio"):
            CliRunner().invoke(app, [*command, *uneven, "--block-size", "4"], catch_exceptions=False)
    with pytest.raises(UsageError, match="give exactly one of --prompt"):
        CliRunner().invoke(app, [*command, "--prompt", "Hello"], catch_exceptions=False)


def data_of(made: str) -> dict[str, Any]:
    match = re.search(r'type="text/plain">([\w+/=]+)</script>', made)
    assert match
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


def make_page(case: str) -> str:
    _, events = events_of(case)
    tokens = [f" t{i}" for i in range(88)] + ["</script>", "<b>"]
    return page(tokens, PROMPT, HEADS, events, {"model": "<tiny>", "ratio": 0.5})


def test_the_page_holds_everything_and_loads_nothing() -> None:
    made = make_page("window")
    assert not re.search(r"(src|href)=|url\(|https?://|@import|fetch\(", made)
    data = data_of(made)
    assert data["tokens"][-1] == "<b>" and data["numPrompt"] == PROMPT and len(data["events"]) == 4
    heads = base64.b64decode(data["events"][0]["spans"][0]["heads"])
    assert list(heads) == ([0] * 8 + [HEADS] * 8) * 2


@pytest.mark.skipif(not shutil.which("chromium"), reason="opens the page in Chromium, which is not installed")
@pytest.mark.parametrize("case", ["window", "prompt"])
def test_the_page_opens_in_a_browser(case: str, tmp_path: Path) -> None:
    kept = 53 if case == "prompt" else 50  # of the text behind the prompt; of 12 tokens of the prompt 8 stay
    file = tmp_path / "page.html"
    file.write_text(make_page(case))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    dom = subprocess.run(
        [*command, "--virtual-time-budget=10000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    assert 'data-ready="yes"' in dom and "4 of 4, at token" in dom and f"{kept}% kept" in dom
    assert len(re.findall(r"<span data-i=", dom)) == 90
    assert len(re.findall(r'<div data-l="\d', dom)) == 2 * 4
    gone = set(map(int, re.findall(r'<span data-i="(\d+)" class="gone"', dom)))
    windows = {i for start in (12, 28, 44, 60) for i in range(start, start + 8)}
    assert gone == (windows | set(range(4)) if case == "prompt" else windows)
    assert "&lt;b&gt;" in dom, "tokens are text, never markup"
