"""`kvllm generate` apart from the engine, which has its own tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kvllm.cli.generate import Generation, encode


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


def test_the_module_runs_as_a_program() -> None:
    import subprocess

    done = subprocess.run([sys.executable, "-m", "kvllm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kvllm ")
