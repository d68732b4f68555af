"""The lm-evaluation-harness measures `kvllm serve`, with the task that docs/eval.md shows, on local data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from os.path import commonprefix
from pathlib import Path
from typing import Any

import openai
import pytest

from kvllm.measure.eval.problems import load_problems
from tests.server import MODEL, Server

DOCS = (Path(__file__).parents[3] / "docs" / "eval.md").read_text()
PROBLEMS = [load_problems("gsm8k")[i] for i in (28, 0, 5)]  # of which the model gets the first right
MAX_TOKENS = 160
RATIO = 0.6  # of these requests; the server's own is 0.5
FIRST_EVENT = 64 + 32  # tokens of the answer that the server's first compression waits for, at least

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]


def test_a_local_task_gives_what_the_server_answers(server: Server, tmp_path: Path) -> None:
    metric, samples = lm_eval(server.url, tmp_path)
    # One after the other, as the harness asks: in a batch other sums could round otherwise.
    answers = [ask(server.url, problem.problem, RATIO) for problem in PROBLEMS]
    with ThreadPoolExecutor() as pool:
        full = list(pool.map(lambda problem: ask(server.url, problem.problem, 1.0), PROBLEMS))

    assert [s["doc"]["problem"] for s in samples] == [problem.problem for problem in PROBLEMS]
    assert [s["resps"] for s in samples] == [[[answer]] for answer in answers]
    right = [float(last_number(a) == problem.answer) for a, problem in zip(answers, PROBLEMS, strict=True)]
    assert [s["exact_match"] for s in samples] == right and 0 < sum(right) < len(right)
    assert metric == pytest.approx(sum(right) / len(right))
    # Compression happened: the answers part from those with the full cache, and not before its first event.
    assert answers != full
    for answer, other in zip(answers, full, strict=True):
        assert answer == other or len(commonprefix([answer, other])) > FIRST_EVENT


def lm_eval(url: str, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """The metric and the logged samples, in the order of the data."""
    (folder / "task.yaml").write_text(re.findall(r"```yaml\n(.*?)```", DOCS, flags=re.DOTALL)[0])
    rows = [json.dumps({"problem": problem.problem, "answer": problem.answer}) for problem in PROBLEMS]
    (folder / "problems.jsonl").write_text("\n".join(rows) + "\n")
    wanted = {"max_gen_toks": MAX_TOKENS, "vllm_xargs": {"kv_retention_ratio": RATIO}}
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--apply_chat_template",
        "--model_args", f"model={MODEL},base_url={url}/v1/chat/completions", "--tasks", "last_number",
        "--include_path", str(folder), "--gen_kwargs", json.dumps(wanted),
        "--log_samples", "--output_path", str(folder / "out"),
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (log,) = (folder / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    metric = json.loads(results.read_text())["results"]["last_number"]["exact_match,last-number"]
    return metric, sorted(samples, key=lambda sample: sample["doc_id"])


def ask(url: str, problem: str, ratio: float) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": problem}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        extra_body={"vllm_xargs": {"kv_retention_ratio": ratio}},
    )
    return chat.choices[0].message.content or ""


def last_number(text: str) -> str:
    return re.findall(r"-?\d[\d,]*", text)[-1].replace(",", "")
