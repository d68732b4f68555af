from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvllm.__main__ import app
from kvllm.config import PRESETS, KvConfig
from kvllm.errors import UsageError
from kvllm.measure.eval.traces import Trace, read_traces
from kvllm.measure.tune import run as command
from kvllm.measure.tune.choose import Candidate, candidates, choose, measure, pareto, serve_flags, split
from kvllm.measure.tune.texts import one_text, read_texts
from tests.measure.commands import kvllm
from tests.reference.models import VOCAB_SIZE, text, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Words:
    """A tokenizer of bytes, whose chat template marks what the user says."""

    chat_template = "some"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCAB_SIZE for c in text]}

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        return self("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")


def candidate(saving: float, *losses: float) -> Candidate:
    names = [f"t{i}" for i in range(len(losses))]
    config = KvConfig(retention_ratio=round(1 / (1 + saving), 4))
    return Candidate(config, saving, dict(zip(names, losses, strict=True)), dict.fromkeys(names, 10))


def test_conversations_prompts_and_traces_are_texts():
    words = Words()
    asked = [{"role": "user", "content": "ab"}]
    prompt = words("<user>ab<assistant>")["input_ids"]
    answered = [*asked, {"role": "assistant", "reasoning_content": "hm", "content": "c"}]
    assert one_text({"messages": answered}, "1", words) == Trace("1", prompt + words("hmc")["input_ids"], len(prompt))
    assert one_text({"prompt": "ab", "answer": "xy"}, "1", words) == Trace("1", prompt + words("xy")["input_ids"], 19)
    assert one_text({"messages": asked}, "1", words) == one_text({"prompt": "ab"}, "1", words) == prompt
    trace = {"id": "t", "token_ids": [1, 2, 3], "num_prompt_tokens": 2}
    assert one_text(trace, "1", words) == Trace("t", [1, 2, 3], 2)
    assert one_text({"text": "ab"}, "1", words) is None


def test_content_may_be_a_list_of_parts():
    words, parts = Words(), [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked, answer = {"role": "user", "content": parts}, {"role": "assistant", "content": parts}
    plain = one_text({"messages": [asked | {"content": "ab"}, answer | {"content": "ab"}]}, "1", words)
    assert one_text({"messages": [asked, answer]}, "1", words) == plain


@pytest.mark.parametrize("row, message", [
    ({"messages": ["hi"]}, "messages: 'hi'; must be"),
    ({"messages": [{"content": "hi"}]}, "messages: .*; must be"),
    ({"messages": [{"role": "user", "content": 5}]}, "content: 5; must be a string, or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content: .*; must be a string, or a list"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages: the assistant's alone; put"),
    ({"prompt": "a", "answer": 5}, "answer=5: must be a string"),
    ({"token_ids": 5, "num_prompt_tokens": 1}, "token_ids is not a list of integers; give traces"),
    ({"token_ids": [1, 2], "num_prompt_tokens": "1"}, "num_prompt_tokens is not an integer; give traces"),
    ({"token_ids": [1, 2], "num_prompt_tokens": 2}, "trace 2: has 2 tokens, but a prompt of 2"),
])  # fmt: skip
def test_an_invalid_line_is_refused_with_its_number(tmp_path, row, message):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=f"texts.jsonl, line 2: {message}"):
        read_texts(path, tiny_model("llama"), Words(), 1, 0, None)


def test_texts_with_equal_ids_are_told_apart(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(3 * (json.dumps({"id": "a", "token_ids": [1, 2], "num_prompt_tokens": 1}) + "\n"))
    assert [t.id for t in read_texts(path, tiny_model("llama"), Words(), 1, 0, None)] == ["1:a", "2:a", "3:a"]


def test_a_folder_or_a_model_that_is_not_there_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["tune", "tiny", str(tmp_path), "--saving", "2"])
    assert result.exit_code == 2 and "Invalid value" in result.output and "directory" in result.output
    (tmp_path / "texts.jsonl").write_text("{}")
    options = ["tune", str(tmp_path / "none"), str(tmp_path / "texts.jsonl"), "--saving", "2", "--device", "cpu"]
    with pytest.raises(
        UsageError, match="/none: the model's config.json cannot be read .*; give the folder of a model"
    ):
        kvllm(*options)
    for option in ("--json", "--save-traces"):
        with pytest.raises(UsageError, match=f"{option} .*/no/out: the folder .*/no does not exist; create it first"):
            kvllm(*options, option, str(tmp_path / "no" / "out"))


def test_the_least_loss_for_a_saving_and_the_greatest_saving_for_a_loss():
    found = [candidate(1.5, 0.1, 0.1), candidate(2, 0.3, 0.1), candidate(2.5, 0.2, 0.1), candidate(4, 2, 1)]
    texts = ["t0", "t1"]
    assert choose(found, texts, 2, None) is found[2] and choose(found, texts, None, 0.05) is found[2]
    assert choose(found, texts, 3, None) is found[3] and choose(found, texts, None, 0.3) is found[3]
    # The mean of 0.15 is not enough: the interval goes up to 0.2.
    assert choose(found, texts, None, 0.19 / 10) is found[0]
    assert [each.saving for each in pareto(found, texts)] == [1.5, 2.5, 4]
    with pytest.raises(UsageError, match=r"--saving 5: on texts of these lengths at most 4.00 is possible"):
        choose(found, texts, 5, None)
    with pytest.raises(UsageError, match=r"--max-kl 0.001: the least loss is 0.01 .*--retention-ratio 0.4"):
        choose(found, texts, None, 0.001)


def test_flags_are_a_preset_or_what_differs_from_the_defaults():
    assert serve_flags(KvConfig()) == []
    assert serve_flags(KvConfig(**PRESETS["8x"])) == ["--compression", "8x"]
    other = KvConfig(survivor_bits=4, retention_ratio=0.4375, window_size=128)
    assert serve_flags(other) == [
        "--retention-ratio", "0.4375", "--window-size", "128", "--survivor-bits", "4"
    ]  # fmt: skip


def test_candidates_save_what_texts_of_these_lengths_allow():
    texts = [Trace("long", list(range(3000)), 100), Trace("short", list(range(300)), 100)]
    config = tiny_config("qwen2", num_attention_heads=2, head_dim=128, hidden_size=256)
    found = candidates(config, texts, 16)
    by_flags = {" ".join(serve_flags(each.config)): each.saving for each in found}
    assert {"", "--compression 4x", "--compression 8x", "--compression 16x"} <= by_flags.keys()
    assert 1 < by_flags["--compression 4x"] < by_flags["--compression 8x"] < by_flags["--compression 16x"] < 16
    assert by_flags["--compression 8x"] < by_flags["--retention-ratio 0.4375 --window-size 128 --survivor-bits 4"]


def test_a_text_that_is_too_short_loses_nothing():
    texts = [Trace("long", text(450), 20), Trace("short", text(90), 20)]
    found = [Candidate(KvConfig(retention_ratio=0.25), 2.0)]
    measure(tiny_model("llama"), texts, found, 16)
    assert found[0].lost["short"] == 0 and found[0].lost["long"] > 0.01
    assert found[0].lengths == {"long": 430, "short": 70}
    assert found[0].kl(["long", "short"]).value == pytest.approx(found[0].lost["long"] / 500)
    assert split(texts) == (["long", "short"],) * 2 and split(texts * 2)[0] == ["long", "long"]


def test_the_command_prints_settings_with_what_they_lose(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda folder, dtype, device: tiny_model("llama"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: Words())
    (tmp_path / "texts.jsonl").write_text(
        json.dumps({"prompt": "ab", "answer": "some thoughts, and more. " * 18}) + "\n" + json.dumps({"prompt": "xyz"})
    )
    options = ["tune", "tiny", str(tmp_path / "texts.jsonl"), "--device", "cpu", "--max-tokens", "30"]
    kvllm(*options, "--saving", "1.2", "--json", str(tmp_path / "out.json"), "--save-traces", str(tmp_path / "traces"))
    made, output = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert f"kvllm serve tiny {' '.join(made['flags'])}" in output and made["saving"] >= 1.2
    best = [r for r in made["results"] if r["flags"] == made["flags"]]
    assert best[0]["kl"] == made["kl"] and made["kl"]["value"] > 0
    written = read_traces(tmp_path / "traces")
    assert [trace.num_prompt_tokens for trace in written] == [19, 20]
    assert len(written[1].token_ids) == 20 + 30
    with pytest.raises(UsageError, match="give either --saving or --max-kl"):
        kvllm(*options)
    (tmp_path / "texts.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(UsageError, match=r'texts.jsonl, line 1: expected JSON of the form \{"messages"'):
        kvllm(*options, "--saving", "2")
