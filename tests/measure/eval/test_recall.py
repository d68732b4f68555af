from __future__ import annotations

import json
from typing import Any

import pytest

from kvllm.config import KvConfig
from kvllm.measure.eval import recall
from kvllm.measure.eval.recall import Answer, Item, Needle, accuracy, grid, make_items, measure, table
from kvllm.measure.eval.sweep import FULL, cases
from kvllm.reference import generate
from tests.measure.commands import kvllm
from tests.reference.models import VOCAB_SIZE, text, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"window_size": 32, "buffer_size": 16, "query_stride": 4, "retention_ratio": 0.5}


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % VOCAB_SIZE for c in text]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(str(i) for i in token_ids)


def test_the_needle_is_at_its_depth_and_the_question_at_its_distance():
    tokenizer = Characters()
    items = make_items(tokenizer, [100, 300], [0.0, 0.5, 1.0], samples=2)
    assert len(items) == 12
    for item in items:
        stated, asked = tokenizer.encode(item.needle.statement), tokenizer.encode(item.needle.question)
        written = item.token_ids[item.num_prompt_tokens :]
        before = round(item.depth * (item.distance - len(stated)))
        assert written[before : before + len(stated)] == stated
        assert written[item.distance :] == asked
        assert item.needle.code in item.needle.statement and item.needle.code not in item.needle.question
    assert items[0].needle == items[-2].needle != items[1].needle  # a sample is the same text everywhere
    assert items == make_items(tokenizer, [100, 300], [0.0, 0.5, 1.0], samples=2)
    with pytest.raises(ValueError, match="distances 10: the needle alone takes"):
        make_items(tokenizer, [10], [0.5], 1)


def test_answers_equal_generation_after_the_same_text():
    model, tokenizer = tiny_model("qwen3"), Characters()
    items = [
        Item(100, 0.5, 0, Needle("x", "1"), text(160), 21),
        Item(9, 0.5, 0, Needle("x", "1"), text(70, seed=1), 21),
    ]
    made = cases([{"method": "kara"}], COMMON)
    answers = measure(model, tokenizer, items, made, max_tokens=5)
    assert list(answers) == [FULL, "kara r=0.5", "random r=0.5", "recent r=0.5"]
    for label, config in ((FULL, None), *((case.label, case.config) for case in made)):
        assert answers[label][0].text == tokenizer.decode(replay_and_generate(model, items[0], config))
    assert len({given[1].text for given in answers.values()}) == 1  # nothing is compressed in the short text


def replay_and_generate(model: Any, item: Item, config: KvConfig | None) -> list[int]:
    """Step by step with no fork: the text is forced into the generated part."""
    from kvllm.reference import Request

    request, tokens = Request(model, item.num_prompt_tokens, config), list(item.token_ids)
    for i in range(len(item.token_ids) + 4):
        best = int(request.step([tokens[i]])[-1].argmax())
        if i + 1 >= len(item.token_ids):
            tokens.append(best)
    assert config is not None or generate(model, item.token_ids, 5, ignore_eos=True).token_ids == tokens[-5:]
    return tokens[-5:]


def test_the_first_number_counts():
    def answer(text: str) -> Answer:
        return Answer(100, 0.5, 0, "48213", text)

    assert answer(" 48213. The").correct and answer(": 48213\n\n7").correct
    assert not answer(" 4821").correct and not answer(" 482135").correct and not answer(" unknown").correct
    assert not answer(" 7 or 48213").correct
    given = [answer(" 48213"), answer("?"), Answer(200, 0.5, 0, "1", "1")]
    assert accuracy(given).value == pytest.approx(2 / 3)
    assert grid(given) == {(100, 0.5): 0.5, (200, 0.5): 1.0}
    assert "| 50 " in table({FULL: given})


def test_the_command_writes_grid_answers_and_heat_map(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "load_model", lambda folder, dtype, device: tiny_model("llama"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda folder, **options: Characters())
    monkeypatch.setattr(recall, "PROMPT", "Go.")
    kvllm(
        "eval", "recall",
        "--model", "tiny", "--methods", "kara", "--ratios", "0.5", "--common", json.dumps(COMMON),
        "--device", "cpu", "--distances", "90,120", "--depths", "0.2,0.8", "--samples", "1",
        "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"),
        "--markdown", str(tmp_path / "out.md"),
    )  # fmt: skip
    made = json.loads((tmp_path / "out.json").read_text())
    assert [r["name"] for r in made["results"]] == [FULL, "kara r=0.5", "random r=0.5", "recent r=0.5"]
    assert all(len(r["grid"]) == len(r["answers"]) == 4 for r in made["results"])
    assert (tmp_path / "out.png").stat().st_size > 1000 and "kara" in (tmp_path / "out.md").read_text()
