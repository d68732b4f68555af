"""`kvllm generate` and `kvllm demo` apart from the engine, which has its own tests."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvllm.cli import demo
from kvllm.cli.generate import Generation, encode
from kvllm.config import KvConfig


def generation(token_ids: list[int], prompt_token_ids: list[int] | None = None, peak: int = 10) -> Generation:
    return Generation(
        prompt_token_ids=prompt_token_ids or [1, 2, 3],
        token_ids=token_ids,
        text="",
        num_windows_compressed=2,
        peak_kv_blocks=peak,
        stock_kv_blocks=40,
        block_size=32,
        seconds=2.0,
        tokens_per_second=len(token_ids) / 2,
    )


def printed(renderable: object) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_json_holds_what_the_issue_of_a_run_needs() -> None:
    written = json.loads(generation([5, 6]).to_json())
    assert written["token_ids"] == [5, 6]
    assert set(written) >= {
        "text", "num_windows_compressed", "peak_kv_blocks", "stock_kv_blocks", "tokens_per_second"
    }  # fmt: skip


def test_table_shows_the_saving() -> None:
    shown = printed(generation([5] * 600).table())
    assert "600 in 2.0 s" in shown and "300.0" in shown and "40: 75% saved" in shown


def test_encode_uses_the_chat_template_where_there_is_one(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chat, plain = encode(tokenizer, "Hi", None), encode(tokenizer, "Hi", False)
    assert tokenizer.decode(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(plain) == "Hi"
    tokenizer.chat_template = None
    assert encode(tokenizer, "Hi", None) == plain
    with pytest.raises(ValueError, match="--no-chat"):
        encode(tokenizer, "Hi", True)


def test_demo_compares_token_by_token() -> None:
    comparison = demo.compare(generation([1, 2, 3, 4, 5]), generation([1, 2, 9, 4, 8]), {"kara": 0.9})
    assert (comparison.num_same, comparison.share_identical) == (2, 0.6)
    same = demo.compare(generation([1, 2]), generation([1, 2]), {})
    assert (same.num_same, same.share_identical) == (2, 1.0)
    shown = printed(demo.table(generation([1, 2, 3, 4, 5], peak=40), generation([1, 2, 9, 4, 8], peak=17), comparison))
    assert "60.0%" in shown and "90.0%" in shown and "17" in shown


def test_demo_sees_that_a_text_repeats_itself() -> None:
    loop, varied = generation([1, 2, 3, 4] * 100), generation(list(range(400)))
    assert demo.compare(loop, loop, {}).share_distinct == 4 / 393
    assert demo.compare(varied, varied, {}).share_distinct == 1.0


def test_demo_passes_the_users_choice_on() -> None:
    flags = demo.as_flags({"retention_ratio": 0.5, "method_options": {"a": 1}, "seed": 3})
    assert flags == ["--retention-ratio", "0.5", "--method-options", '{"a": 1}', "--kv-seed", "3"]


def test_a_failed_run_shows_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLLM_TRACEBACK", "")
    with pytest.raises(ValueError, match="failed with exit code 2"):
        demo.run_generate(["generate", "model"])  # no prompt


def test_replay_agreement_counts_from_the_first_compression(model_dir: Path) -> None:
    # 3 prompt tokens fill a block of 32; window 64, buffer 32: the first compression is due at 128 tokens.
    config = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5)
    text = [(7 * i) % 1000 + 20 for i in range(140)]
    assert demo.replay_agreement(model_dir, generation(text[:120]), [config]) == {}
    agreement = demo.replay_agreement(model_dir, generation(text), [config, replace(config, method="random")])
    assert set(agreement) == {"kara", "random"} and all(0 < share <= 1 for share in agreement.values())
    assert demo.replay_agreement(model_dir, generation(text), [KvConfig(retention_ratio=1.0)]) == {}


def test_the_module_runs_as_a_program() -> None:
    import subprocess

    done = subprocess.run([sys.executable, "-m", "kvllm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kvllm ")
