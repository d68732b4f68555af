"""A process of the demo: `python -m kvllm.measure.demo.worker stock|kvllm|replay JOB.json`.

Reports are JSON objects on standard output, one per line; everything that libraries print goes to standard error.
An engine reports when it is ready, then waits for a line on standard input before it starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvllm.layout import Geometry
from kvllm.measure.demo.job import BLOCK_SIZE, PROMPT_LEN, Agreement, Job, Status
from kvllm.methods import checked_config

REPORT_S = 0.1
NUM_REPLAYED = 2  # answers

Report = Callable[[dict[str, Any]], None]


def serve(job: Job, options: dict[str, Any] | None, report: Report) -> None:
    """Answer all prompts; options: None for stock vLLM."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from kvllm.cli.generate import encode
    from kvllm.measure.bench.worker import Engine

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    prompts = [encode(tokenizer, text, None)[:PROMPT_LEN] for text in job.prompts()]
    engine = Engine.start(job.spec(), job.model, options, Path("."))

    def add(number: int, max_tokens: int) -> None:
        # Not greedy: a small model's greedy answers end in loops. No per-request seed: on CPUs, vLLM 0.32 fails with
        # one if a prefill is chunked, as after a preemption.
        params = SamplingParams(
            temperature=0.7, max_tokens=max_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.llm.add_request(f"{number}-{max_tokens}", {"prompt_token_ids": prompts[number]}, params)

    add(0, 8)  # warm-up
    while engine.llm.has_unfinished_requests():
        engine.llm.step()
    engine.clear()
    report({"ready": True})
    if not sys.stdin.readline():
        return  # the parent process has exited

    engine.recorder.begin()
    trace = engine.recorder.trace
    for number in range(job.num_requests):
        add(number, job.output_len)
    answers: dict[int, list[int]] = {}
    reported = running_seconds = last = 0.0
    peak = 0
    while len(answers) < job.num_requests:
        for output in engine.llm.step():
            answers[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
        now = time.perf_counter() - engine.recorder.start
        running = trace.running[-1] if trace.running else 0
        blocks = round(trace.usage[-1] * engine.num_kv_blocks) if trace.usage else 0
        running_seconds, last, peak = running_seconds + running * (now - last), now, max(peak, blocks)
        if now - reported >= REPORT_S:
            reported = now
            report({"status": asdict(Status(now, len(answers), running, blocks, sum(trace.preempted)))})
    report({
        "seconds": last, "preempted": sum(trace.preempted), "peak_blocks": peak,
        "mean_running": running_seconds / last,
        "texts": [prompts[i] + answers[i] for i in range(job.num_requests)],
        "prompt_lens": [len(prompt) for prompt in prompts],
    })  # fmt: skip


def replay(job: Job, texts: list[list[int]], prompt_lens: list[int], report: Report) -> None:
    """Replay the full cache's answers with a compressed cache, as configured and with random eviction."""
    from kvllm import reference

    config = checked_config(job.options)
    # Random eviction is the baseline.
    configs = [config, replace(config, method="random", method_options={})]
    loaded = reference.load_model(Path(job.model))
    block_size = reference.block_size_of(loaded, BLOCK_SIZE)
    same, total = [0.0, 0.0], 0
    for text, num_prompt in list(zip(texts, prompt_lens, strict=True))[:NUM_REPLAYED]:
        geometry = Geometry.from_config(config, block_size)
        first = geometry.event_at(num_prompt, 0) if geometry else len(text)
        if first >= len(text) - 1:
            continue
        full = reference.replay(loaded, text, num_prompt, None, block_size)
        total += len(full.argmax) - first
        for i, each in enumerate(configs):
            compressed = reference.replay(loaded, text, num_prompt, each, block_size)
            same[i] += int((full.argmax == compressed.argmax)[first:].sum())
    ours, random = (n / total if total else 1.0 for n in same)
    report(asdict(Agreement(config.method, ours, random, total)))


def main() -> None:
    kind, job_file = sys.argv[1:3]
    # From here on, everything printed to standard output, also by C++ code, goes to the log.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(figures: dict[str, Any]) -> None:
        out.write(json.dumps(figures) + "\n")
        out.flush()

    given = json.loads(Path(job_file).read_text())
    job = Job(**given["job"])
    if kind == "replay":
        replay(job, given["texts"], given["prompt_lens"], report)
    else:
        serve(job, dict(job.options) if kind == "kvllm" else None, report)
    out.close()


if __name__ == "__main__":
    main()
