"""One engine process of `kvllm bench throughput`: `python -m kvllm.measure.bench.worker JOB.json OUT.json`.

The engine core runs in a process of its own, as behind `LLM.generate`, and is driven through the same two calls,
`add_request` and `step`. What a step did comes from vLLM's own statistics, for stock and KvLLM alike.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from kvllm.compression.blocks import blocks_held
from kvllm.config import CONFIG_KEY, RATIO_KEY, KvConfig
from kvllm.groups import Groups
from kvllm.layout import RequestGeometry, ceil_div, request_geometry
from kvllm.measure.bench.figures import POOL_FULL, Lengths, Trace, by_context, run_figures, steady_figures, timeline
from kvllm.measure.bench.profile import profile_figures, profiler_args, read_kernels
from kvllm.measure.bench.spec import BenchSpec
from kvllm.methods import checked_config

SAMPLE_S = 0.1  # seconds between two samples of the requests' lengths
PROGRESS_S = 15.0


class Recorder:
    """A vLLM stat logger that fills the trace of the current run."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.start = 0.0
        self.backlog = 0  # requests that the client holds back

    def begin(self) -> None:
        self.trace, self.start = Trace(), time.perf_counter()

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        # Steps without new tokens: prefill only, or requests that were aborted.
        if scheduler_stats is None or iteration_stats is None or not iteration_stats.num_generation_tokens:
            return
        trace = self.trace
        trace.time.append(time.perf_counter() - self.start)
        trace.tokens.append(iteration_stats.num_generation_tokens)
        trace.running.append(scheduler_stats.num_running_reqs)
        waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        trace.waiting.append(waiting + self.backlog)
        trace.usage.append(scheduler_stats.kv_cache_usage)
        trace.preempted.append(iteration_stats.num_preempted_reqs)
        trace.gaps.append(np.array(iteration_stats.inter_token_latencies_iter, dtype=np.float32))


def stat_logger(recorder: Recorder) -> Callable[[Any, int], Any]:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Logger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, *args: Any, **kwargs: Any) -> None:
            recorder.record(*args, **kwargs)

        def log_engine_initialized(self) -> None:
            pass

    return Logger


@dataclass
class Engine:
    """vLLM's engine with the properties that runs need."""

    llm: Any  # vllm.v1.engine.llm_engine.LLMEngine
    recorder: Recorder
    spec: BenchSpec
    ids: Iterator[int]
    profiles: Path  # where the profiler writes its traces

    @classmethod
    def start(cls, spec: BenchSpec, model_dir: str, options: dict[str, Any] | None, profiles: Path) -> Engine:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from kvllm.support import DEFAULT_BLOCK_SIZE

        args = {"block_size": DEFAULT_BLOCK_SIZE[current_platform.device_type], **spec.vllm_args(model_dir)}
        if options is not None:
            args["additional_config"] = {**args.get("additional_config", {}), CONFIG_KEY: options}
        if spec.profile_steps:
            args |= profiler_args(profiles)
        recorder = Recorder()
        # The context of LLM.generate: it decides vLLM's default sizes.
        llm = LLMEngine.from_engine_args(EngineArgs(**args), UsageContext.LLM_CLASS, [stat_logger(recorder)])
        return cls(llm, recorder, spec, count(), profiles)

    @property
    def block_size(self) -> int:
        """Of the full-attention layers."""
        return self.llm.vllm_config.cache_config.block_size * self.groups.scale

    @property
    def kernel_block_size(self) -> int:
        from kvllm.engine.settings import kernel_block_size

        return kernel_block_size(self.llm.vllm_config)

    def slots(self, geometry: RequestGeometry | None, num_prompt_tokens: int, num_tokens: int) -> int:
        """What a request holds in the compressed group, in tokens; in whole blocks if these are hundreds of tokens."""
        size = self.block_size
        if size == self.kernel_block_size:
            return geometry.physical_len(num_prompt_tokens, num_tokens) if geometry else num_tokens
        if geometry is None:
            return ceil_div(num_tokens, size) * size
        return (
            int(blocks_held(geometry.groups[0], np.array([num_prompt_tokens]), np.array([num_tokens]), size)[0]) * size
        )

    @cached_property
    def groups(self) -> Groups:
        from kvllm.engine.settings import groups_of_engine

        return groups_of_engine(self.llm.vllm_config)

    @property
    def config(self) -> KvConfig | None:
        """The engine's geometry, with layer budgets; None without KvLLM."""
        from kvllm.engine.settings import kv_config

        return kv_config(self.llm.vllm_config)

    @property
    def num_kv_blocks(self) -> int:
        return self.llm.vllm_config.cache_config.num_gpu_blocks - 1  # one is the null block

    def add(self, output_len: int, extra_args: dict[str, Any] | None, generator: random.Random) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=self.spec.temperature,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra_args,
        )
        vocabulary = self.llm.model_config.get_vocab_size()
        prompt = [generator.randrange(vocabulary) for _ in range(self.spec.prompt_len)]
        name = str(next(self.ids))
        self.llm.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def lengths(self, geometry: RequestGeometry | None) -> Lengths | None:
        """Lengths of the requests that got a token in the latest step."""
        states = [s for s in self.llm.output_processor.request_states.values() if s.stats.num_generation_tokens]
        if not states:
            return None
        newest = max(s.stats.last_token_ts for s in states)
        # The newest token has been sampled but is not in the cache yet.
        running = [
            (s.prompt_len, s.prompt_len + s.stats.num_generation_tokens - 1)
            for s in states
            if s.stats.last_token_ts == newest
        ]
        logical = sum(self.slots(None, p, n) for p, n in running)
        physical = sum(self.slots(geometry, p, n) for p, n in running)
        local = sum(self.groups.local_blocks_held(n, self.block_size) for _, n in running) * self.block_size
        local //= self.groups.num_full  # with layer budgets each group has fewer layers
        return Lengths(time.perf_counter() - self.recorder.start, len(running), logical, physical, local)

    def clear(self) -> None:
        """Abort remaining requests and clear the prefix cache, so that all runs start in the same state."""
        self.llm.abort_request(list(self.llm.output_processor.request_states), internal=True)
        deadline = time.perf_counter() + 60
        while not self.llm.reset_prefix_cache():
            if time.perf_counter() > deadline:
                raise RuntimeError("KV blocks are still in use a minute after all requests were aborted.")
            time.sleep(0.1)


@dataclass
class Load:
    """A closed loop: `concurrency` requests in flight until `num_requests` have been sent."""

    engine: Engine
    concurrency: int
    num_requests: int
    extra_args: dict[str, Any] | None
    geometry: RequestGeometry | None
    seconds: float | None
    max_seconds: float
    stagger: bool
    profile_steps: int | None = None

    def run(self, seed: int) -> dict[str, Any]:
        engine, spec, recorder = self.engine, self.engine.spec, self.engine.recorder
        generator = random.Random(seed)
        lengths = [spec.output_len] * self.num_requests
        wave_size = self.wave_size() if self.stagger else 0
        lengths[:wave_size] = spread(wave_size, spec.output_len)
        recorder.begin()
        trace = recorder.trace
        wave: set[str] = set()
        wave_done_s = 0.0
        sent = finished = 0
        steady_from: float | None = None
        profiled = False
        sampled, printed = (
            -SAMPLE_S,
            0.0,
        )  # the first sample immediately: a tiny model's run may take only half a second
        while finished < self.num_requests:
            # Until lengths are mixed, send only as many as will run at once; more would start and grow together.
            limit = wave_size if wave_size and not wave_done_s else self.concurrency
            while sent < self.num_requests and sent - finished < limit:
                name = engine.add(lengths[sent], self.extra_args, generator)
                if sent < wave_size:
                    wave.add(name)
                sent += 1
                recorder.backlog = self.num_requests - sent
            outputs = engine.llm.step()
            now = time.perf_counter() - recorder.start
            for output in outputs:
                finished += 1
                wave.discard(output.request_id)
            if wave_size and not wave and not wave_done_s:
                wave_done_s = now
            if now - sampled > SAMPLE_S and (sample := engine.lengths(self.geometry)):
                trace.samples.append(sample)
                sampled = now
            if now - printed > PROGRESS_S and trace.time:
                progress(trace, finished)
                printed = now
            if steady_from is None and not wave and trace.usage:
                seats_full = wave_size and trace.running[-1] == self.seats()
                if trace.usage[-1] >= POOL_FULL or seats_full:
                    steady_from = now
            if self.profile_steps and steady_from is not None and not profiled:
                engine.llm.start_profile(max_iterations=self.profile_steps)
                profiled = True
            steady_over = self.seconds and steady_from is not None and now - steady_from >= self.seconds
            if steady_over or now > self.max_seconds:
                break
        result = asdict(run_figures(trace, engine.num_kv_blocks, finished))
        try:
            result |= asdict(steady_figures(trace, np.inf if wave else wave_done_s))
        except ValueError as e:
            result["error"] = str(e)
        if profiled:
            engine.llm.stop_profile()
            result["profile"] = profile_figures(read_kernels(engine.profiles))
        return result | {
            "num_requests": self.num_requests,
            "first_wave": wave_size,
            "by_context": by_context(trace, max(spec.output_len // 16, 1)),
            "timeline": timeline(trace, 1.0),
        }

    def seats(self) -> int:
        return min(self.concurrency, self.engine.llm.vllm_config.scheduler_config.max_num_seqs)

    def wave_size(self) -> int:
        """Number of concurrent requests in the steady state, where requests are on average half finished."""
        spec, engine = self.engine.spec, self.engine
        block = engine.block_size
        computed = range(spec.prompt_len, spec.prompt_len + spec.output_len, block)
        physical = [engine.slots(self.geometry, spec.prompt_len, c) for c in computed]
        local = [engine.groups.local_blocks_held(c, block) for c in computed]
        own = engine.groups.num_full * sum(ceil_div(n + 1, block) for n in physical)
        mean_blocks = (own + sum(local)) / len(physical)
        return max(1, min(self.seats(), self.num_requests, int(engine.num_kv_blocks / mean_blocks)))


def spread(num_requests: int, output_len: int) -> list[int]:
    """Lengths evenly spaced up to `output_len`, in an order that is the same for every run."""
    lengths = [ceil_div((i + 1) * output_len, num_requests) for i in range(num_requests)]
    random.Random(0).shuffle(lengths)
    return lengths


def progress(trace: Trace, finished: int) -> None:
    print(
        f"{trace.time[-1]:7.1f} s  running {trace.running[-1]}  waiting {trace.waiting[-1]}  "
        f"pool {trace.usage[-1]:.0%}  finished {finished}",
        file=sys.stderr,
        flush=True,
    )


def run_one(engine: Engine, run: dict[str, Any], engine_options: dict[str, Any] | None, warm: bool) -> dict[str, Any]:
    spec, options, concurrency = engine.spec, run["options"], run["concurrency"]
    geometry, extra_args = None, None
    if options is not None:
        from kvllm.engine.settings import packed_tokens

        config = checked_config(options)
        if engine.config is not None and engine.config.budgets:
            config = engine.config
        held = packed_tokens(engine.llm.vllm_config)
        geometry = request_geometry(config, engine.kernel_block_size, packed_tokens=held)
        if engine_options and engine_options["retention_ratio"] != options["retention_ratio"]:
            extra_args = {RATIO_KEY: options["retention_ratio"]}

    load = Load(
        engine,
        concurrency,
        spec.requests_of(concurrency),
        extra_args,
        geometry,
        spec.seconds,
        spec.max_seconds,
        spec.stagger,
        # Stock vLLM runs none of the profiled kernels.
        spec.profile_steps if options is not None else None,
    )
    if not warm and spec.warmup_seconds:
        replace(load, max_seconds=spec.warmup_seconds, stagger=False, profile_steps=None).run(seed=spec.seed + 1)
        engine.clear()
    result = load.run(seed=spec.seed)
    result |= {"kvllm": kvllm_stats(engine) if options is not None else None}
    engine.clear()
    return {"config": run["label"], "concurrency": concurrency, **result}


def kvllm_stats(engine: Engine) -> Any:
    from types import SimpleNamespace

    from kvllm.engine.stats import engine_stats

    return engine_stats(SimpleNamespace(llm_engine=engine.llm))  # type: ignore[arg-type]


def about(engine: Engine) -> dict[str, Any]:
    import torch
    import vllm

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "num_kv_blocks": engine.num_kv_blocks,
        "block_size": engine.block_size,
        "async_scheduling": engine.llm.vllm_config.scheduler_config.async_scheduling,
    }


def main() -> None:
    job_file, out_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    plugins = [e.name for e in entry_points(group="vllm.general_plugins")]
    if job["plugins"] and job["plugins"] not in plugins:
        raise RuntimeError(f"vLLM does not find the plugin {job['plugins']!r}: install the package (pip install -e .).")
    spec = BenchSpec.from_dict(job["spec"])
    engine = Engine.start(spec, job["model_dir"], job["options"], out_file.with_suffix(".profiles").resolve())
    result: dict[str, Any] = {"engine": about(engine), "rows": []}
    warmed = set()
    for run in job["runs"]:
        result["rows"].append(run_one(engine, run, job["options"], run["label"] in warmed))
        warmed.add(run["label"])
        # After each run, so that a crash in the next one does not lose these figures.
        out_file.write_text(json.dumps(result))
    engine.llm.engine_core.shutdown()


if __name__ == "__main__":
    main()
