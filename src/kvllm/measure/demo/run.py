"""Run the demo: both engines load at the same time, then run one after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from kvllm.cli.measuring import INSTALL
from kvllm.config import PRESET_KEY, with_preset
from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.errors import UsageError
from kvllm.measure.demo.job import Agreement, Job, Outcome, Status
from kvllm.measure.demo.picture import draw
from kvllm.measure.demo.process import Process
from kvllm.measure.demo.view import OURS, STOCK, live_table, sentence, summary
from kvllm.methods import checked_config

SHORT = {"window_size": 128, "buffer_size": 64}  # for answers of a few hundred tokens
STARTING, READY = "starting ...", "ready"

States = dict[str, Status | str | Outcome]


def run(
    model: Path,
    num_requests: int,
    max_tokens: int,
    num_fitting: int,
    options: Mapping[str, Any],
    out: Path,
    console: Console,
) -> None:
    check_plugin_is_loaded()
    chosen = {**SHORT, **(with_preset(options) if PRESET_KEY in options else options)}
    checked_config(chosen)
    if not (model / "config.json").is_file():
        raise UsageError(
            f"--model {model}: no model there (no config.json). `make demo` fetches a small one, as does "
            f"`python -m tools.fetch_model smollm2-135m {model}` in a checkout."
        )
    job = Job(str(model), num_requests, max_tokens, num_fitting, chosen)
    out.mkdir(parents=True, exist_ok=True)
    job_file = out / "job.json"
    job_file.write_text(json.dumps({"job": job.to_dict()}))
    console.print(
        f"{num_requests} questions, answers of {max_tokens} tokens, {model.name} on this CPU. The KV cache has "
        f"{job.num_blocks} blocks, as many as {num_fitting} answers need.\nLogs and figures: {out}/",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with ExitStack() as stack:
        outcomes, found = compete(job, job_file, out, console, stack)
        job_file.write_text(json.dumps({"job": job.to_dict(), **found}))
        with console.status("How close are the answers? Feeding two of them to the full and to compressed caches ..."):
            process = Process("replay", "the comparison of answers", job_file, out / "replay.log")
            stack.callback(process.end)
            agreement = Agreement(**process.next())
    stock, ours = outcomes[STOCK], outcomes[OURS]
    console.print(summary(job, stock, ours))
    console.print(sentence(agreement), highlight=False)
    figures = {"job": job.to_dict(), STOCK: asdict(stock), OURS: asdict(ours), "agreement": asdict(agreement)}
    (out / "demo.json").write_text(json.dumps(figures) + "\n")
    picture = out / "demo.svg"
    if draw(job, outcomes, picture):
        console.print(f"Picture: {picture}", highlight=False)
    else:
        console.print(f"For a picture of the run, install matplotlib: {INSTALL}.", highlight=False, markup=False)
    console.print(
        "\nNext:\n"
        f"  kvllm generate {model} --prompt 'Why is the sky blue?' --retention-ratio 0.3\n"
        f"  kvllm serve {model} --retention-ratio 0.3\n"
        f"  kvllm plan {model} --memory 8GiB",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def compete(
    job: Job, job_file: Path, out: Path, console: Console, stack: ExitStack
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Run both engines with a live view; returns their results, and stock's answers for the replay."""
    states: States = {STOCK: STARTING, OURS: STARTING}
    live = stack.enter_context(Live(live_table(job, states), console=console, transient=True, refresh_per_second=8))
    processes = {}
    for label, kind in ((STOCK, "stock"), (OURS, "kvllm")):
        processes[label] = Process(kind, label, job_file, out / f"{kind}.log")
        stack.callback(processes[label].end)

    def show(label: str, state: Status | str | Outcome) -> None:
        states[label] = state
        live.update(live_table(job, states))

    for label, process in processes.items():
        process.next()
        show(label, READY)
    outcomes: dict[str, Outcome] = {}
    found: dict[str, Any] = {}
    for label, process in processes.items():
        process.go()
        history: list[Status] = []
        while "status" in (last := process.next()):
            history.append(Status(**last["status"]))
            show(label, history[-1])
        process.end()  # vLLM takes seconds to shut down and would slow down the other engine
        texts = {name: last.pop(name) for name in ("texts", "prompt_lens")}
        found = found or texts  # stock's, which runs first
        outcomes[label] = Outcome(history=history, num_requests=job.num_requests, **last)
        show(label, outcomes[label])
        console.print(f"{label}: {job.num_requests} answers in {outcomes[label].seconds:.0f} s", highlight=False)
    live.stop()
    return outcomes, found
