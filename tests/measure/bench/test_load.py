"""The closed loop of requests against a made-up engine whose batch holds a fixed number of tokens."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from kvllm.groups import Groups
from kvllm.measure.bench import worker
from kvllm.measure.bench.figures import Lengths
from kvllm.measure.bench.spec import BenchSpec
from kvllm.measure.bench.worker import Load, Recorder

BLOCK = 4


class FakeEngine:
    """Each step gives every running request a token; `num_kv_blocks` are never exceeded: the newest wait instead."""

    groups = Groups(group_size=1)

    def __init__(self, spec: BenchSpec, num_kv_blocks: int, clock: Any) -> None:
        self.spec, self.num_kv_blocks, self.block_size, self.clock = spec, num_kv_blocks, BLOCK, clock
        self.recorder = Recorder()
        self.left: dict[str, list[int]] = {}  # tokens so far, tokens at the end
        self.added: list[int] = []
        self.most_in_flight = 0
        scheduler = SimpleNamespace(max_num_seqs=16)
        self.llm = SimpleNamespace(step=self.step, vllm_config=SimpleNamespace(scheduler_config=scheduler))

    def slots(self, geometry: Any, num_prompt_tokens: int, num_tokens: int) -> int:
        return num_tokens

    def add(self, output_len: int, extra_args: Any, generator: random.Random) -> str:
        name = str(len(self.added))
        self.added.append(output_len)
        self.left[name] = [0, output_len]
        self.most_in_flight = max(self.most_in_flight, len(self.left))
        return name

    def step(self) -> list[Any]:
        self.clock.now += 1.0
        running, used = [], 0
        for name, (done, _) in self.left.items():
            blocks = -(-(self.spec.prompt_len + done + 1) // BLOCK)
            if used + blocks <= self.num_kv_blocks:
                running.append(name)
                used += blocks
        for name in running:
            self.left[name][0] += 1
        finished = [name for name in running if self.left[name][0] == self.left[name][1]]
        for name in finished:
            del self.left[name]
        waiting = len(self.left) + len(finished) - len(running)
        scheduler = SimpleNamespace(
            num_running_reqs=len(running),
            num_waiting_reqs=waiting,
            num_skipped_waiting_reqs=0,
            kv_cache_usage=used / self.num_kv_blocks,
        )
        iteration = SimpleNamespace(
            num_generation_tokens=len(running), num_preempted_reqs=0, inter_token_latencies_iter=[1.0] * len(running)
        )
        self.recorder.record(scheduler, iteration)
        return [SimpleNamespace(request_id=name) for name in finished]

    def lengths(self, geometry: Any) -> Lengths:
        return Lengths(self.clock.now, 1, 10, 10)


def run(monkeypatch: Any, num_kv_blocks: int, **options: Any) -> tuple[FakeEngine, dict[str, Any]]:
    clock: Any = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(worker, "time", clock)
    spec = BenchSpec(model="tiny", prompt_len=8, output_len=40, concurrency=[8])
    engine = FakeEngine(spec, num_kv_blocks, clock)
    defaults = dict(
        concurrency=8, num_requests=24, extra_args=None, geometry=None, seconds=None, max_seconds=1e4, stagger=False
    )
    load = Load(engine=engine, **(defaults | options))  # type: ignore[arg-type]
    return engine, load.run(seed=0)


def test_all_requests_are_served_with_no_more_in_flight_than_asked(monkeypatch: Any) -> None:
    engine, result = run(monkeypatch, num_kv_blocks=1000)
    assert engine.added == [40] * 24 and engine.most_in_flight == 8
    # Three waves of eight, 40 steps each.
    assert (result["num_finished"], result["run_s"], result["run_tokens_per_s"]) == (24, 120, 8)
    assert (result["bound"], result["output_tokens_per_s"]) == ("seats", 8)


def test_staggered_requests_come_first_and_the_steady_state_after_them(monkeypatch: Any) -> None:
    # A request takes 2 to 12 blocks of 4 tokens, 7.4 on average; 30 blocks hold four.
    engine, result = run(monkeypatch, num_kv_blocks=30, stagger=True, seconds=50.0, num_requests=100)
    assert result["first_wave"] == 4
    assert sorted(engine.added[:4]) == [10, 20, 30, 40] and set(engine.added[4:]) == {40}
    assert result["bound"] == "pool" and result["steady_from_s"] >= 40
    assert 49 <= result["steady_s"] <= 51
    assert result["num_finished"] < 100


def test_a_run_cut_off_too_early_keeps_its_run_figures(monkeypatch: Any) -> None:
    _, result = run(monkeypatch, num_kv_blocks=30, stagger=True, max_seconds=20.0)
    assert "max-seconds" in result["error"] and "output_tokens_per_s" not in result
    assert result["run_s"] == 21 and result["run_tokens_per_s"] > 0
