"""`kvllm demo` without an engine: what it shows, and what it says when a process of it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from kvllm.errors import UsageError
from kvllm.measure.demo.job import BLOCK_SIZE, PROMPT_LEN, Agreement, Job, Outcome, Status
from kvllm.measure.demo.picture import draw
from kvllm.measure.demo.process import Process
from kvllm.measure.demo.run import run
from kvllm.measure.demo.view import OURS, STOCK, live_table, sentence, summary
from kvllm.measure.demo.worker import replay

OPTIONS = {"window_size": 64, "buffer_size": 32, "retention_ratio": 0.5}


def job(model: Path | str = "model") -> Job:
    return Job(str(model), num_requests=12, output_len=512, num_fitting=4, options=OPTIONS)


def outcome(seconds: float, running: float) -> Outcome:
    history = [Status(seconds * i / 4, 3 * i, int(running), 60, i) for i in range(1, 4)]
    return Outcome(history, seconds, num_requests=12, preempted=3, peak_blocks=70, mean_running=running)


def printed(renderable: object) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_pool_has_the_stated_size() -> None:
    assert job().num_blocks == 4 * -(-(PROMPT_LEN + 512) // BLOCK_SIZE)
    spec = job("smollm2-135m").spec()
    assert spec.num_gpu_blocks == job().num_blocks + 1 and spec.vllm_args("x")["max_model_len"] == PROMPT_LEN + 513
    assert len(set(job().prompts())) == 12


def test_the_live_table_shows_what_runs() -> None:
    shown = printed(live_table(job(), {STOCK: outcome(60, 4), OURS: Status(12.0, 3, 8, 70, 1)}))
    assert "done in 60 s" in shown and "running, 12 s" in shown
    assert "8 of 12" in shown and f"70 of {job().num_blocks}" in shown and "15.0" in shown
    assert "starting" in printed(live_table(job(), {STOCK: "starting ...", OURS: "ready"}))


def test_the_last_screen_compares() -> None:
    shown = printed(summary(job(), outcome(60, 4), outcome(40, 8)))
    assert "1.50x" in shown and "2.00x" in shown and "12.0" in shown and "18.0" in shown
    told = sentence(Agreement("kara", 0.951, 0.913, 300))
    assert "95.1%" in told and "91.3%" in told
    assert "too short" in sentence(Agreement("kara", 1.0, 1.0, 0))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"demo.{suffix}"
    assert draw(job(), {STOCK: outcome(60, 4), OURS: outcome(40, 8)}, path)
    assert path.stat().st_size > 1000


def test_a_process_that_fails_names_its_log_and_a_remedy(tmp_path: Path) -> None:
    job_file, log = tmp_path / "job.json", tmp_path / "replay.log"
    job_file.write_text(json.dumps({"job": job(tmp_path).to_dict(), "texts": [], "prompt_lens": []}))
    process = Process("replay", "the comparison", job_file, log)
    with pytest.raises(UsageError, match="the comparison failed: .*replay.log.*kvllm doctor"):
        process.next()
    assert log.stat().st_size
    process.end()


def test_output_of_libraries_does_not_reach_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library prints to standard output goes to the log."""
    code = (
        "import kvllm.measure.demo.worker as w, os, sys\n"
        "w.replay = lambda job, *rest: (print('noise'), os.write(1, b'more'), rest[-1]({'a': 1}))\n"
        f"sys.argv = ['w', 'replay', {str(tmp_path / 'job.json')!r}]\n"
        "w.main()\n"
    )
    (tmp_path / "job.json").write_text(json.dumps({"job": job().to_dict(), "texts": [], "prompt_lens": []}))
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == '{"a": 1}\n' and "more" in done.stderr


def test_agreement_counts_from_the_first_compression(model_dir: Path) -> None:
    # 3 prompt tokens fill a block of 32; window 64, buffer 32: the first compression is due at 128 tokens.
    text = [(7 * i) % 1000 + 20 for i in range(140)]
    reports: list[dict[str, float]] = []
    replay(job(model_dir), [text, text[:120]], [3, 3], reports.append)
    replay(job(model_dir), [text[:120]], [3], reports.append)
    assert reports[0]["num_tokens"] == 11 and 0 < reports[0]["ours"] <= 1 and 0 < reports[0]["random"] <= 1
    assert reports[1] == {"method": "kara", "ours": 1.0, "random": 1.0, "num_tokens": 0}


class Scripted:
    """A process that sends the given reports."""

    def __init__(self, kind: str, label: str, job_file: Path, log: Path) -> None:
        self.kind, self.ended = kind, False
        seconds = {"stock": 40.0, "kvllm": 25.0}.get(kind, 0.0)
        done = {
            "seconds": seconds, "preempted": 2, "peak_blocks": 70, "mean_running": 200 / max(seconds, 1),
            "texts": [[1, 2, 3]], "prompt_lens": [1],
        }  # fmt: skip
        self.reports: Iterator[dict[str, object]] = iter(
            [{"method": "kara", "ours": 0.95, "random": 0.91, "num_tokens": 100}]
            if kind == "replay"
            else [{"ready": True}, {"status": asdict(Status(1.0, 0, 4, 60, 0))}, done]
        )
        assert kind != "replay" or json.loads(job_file.read_text())["texts"] == [[1, 2, 3]]

    def next(self) -> dict[str, object]:
        return next(self.reports)

    def go(self) -> None:
        assert not self.ended

    def end(self) -> None:
        self.ended = True


def test_a_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    monkeypatch.setattr("kvllm.measure.demo.run.Process", Scripted)
    monkeypatch.setattr("kvllm.measure.demo.run.check_plugin_is_loaded", lambda: None)
    console = Console(width=120)
    with console.capture() as capture:
        run(tmp_path, 12, 512, 4, {}, tmp_path / "out", console)
    shown = capture.get()
    assert "stock vLLM: 12 answers in 40 s" in shown and "1.60x" in shown and "95.0%" in shown
    assert (tmp_path / "out" / "demo.svg").exists()
    figures = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert figures["KvLLM"]["seconds"] == 25.0 and figures["job"]["options"]["window_size"] == 128


def test_a_missing_model_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvllm.measure.demo.run.check_plugin_is_loaded", lambda: None)
    with pytest.raises(UsageError, match="no model there.*make demo"):
        run(tmp_path, 12, 512, 4, {}, tmp_path / "out", Console())
    assert not (tmp_path / "out").exists()
