"""Compare each kernel's time with the device's limit for its memory traffic or arithmetic. Needs a CUDA device.

    kvllm bench kernels --json kernels.json

Each case is first checked against its PyTorch reference on random input, then timed by replaying a CUDA graph over
enough different requests to exceed the L2 cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvllm.compression.query_bank import QueryBank, quantize
from kvllm.compression.query_ring import query_shifts
from kvllm.errors import UsageError
from kvllm.kernels.block_tables import join_segments, join_segments_ref
from kvllm.kernels.compact import compact, compact_ref
from kvllm.kernels.paged import PagedCache
from kvllm.kernels.queries import DueQueries
from kvllm.kernels.refit import MOST_DIMS, refit, refit_ref
from kvllm.kernels.select_chunks import select_chunks, select_chunks_ref
from kvllm.kernels.store_tokens import NewPairs, store_tokens, store_tokens_ref
from kvllm.kernels.window_scores import window_scores, window_scores_ref
from kvllm.kernels.windows import gather_window, gather_window_ref, scatter_window, scatter_window_ref
from kvllm.measure.bench import packed_kernels
from kvllm.measure.bench.kernel_shape import Shape
from kvllm.methods.kara import Kara
from kvllm.methods.refit import STEPS
from kvllm.methods.rope import Rope, Rotation, frequencies
from kvllm.support import PACKED_BITS

DEVICE = "cuda"


@dataclass(frozen=True)
class Peaks:
    """What the device achieves in plain PyTorch."""

    bytes_per_s: float  # of a copy, reads and writes
    read_bytes_per_s: float  # of a sum
    flops: float


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    runs:      launches on different requests, timed back to back
    num_bytes: minimum memory traffic of one run
    num_flops: floating-point operations of one run
    reads:     whether nearly all of the traffic is reads
    """

    kernel: str
    num_due: int
    runs: list[Callable[[], Any]]
    num_bytes: float
    num_flops: float = 0.0
    reads: bool = False


def bench_kernels(
    shape: Shape | None = None, num_due: tuple[int, ...] = (1, 8, 64), json_path: Path | None = None
) -> list[dict[str, Any]]:
    """Check and time every kernel and print the table; returns its rows."""
    if not torch.cuda.is_available():
        raise UsageError("kvllm bench kernels needs a CUDA device: in Triton's interpreter times mean nothing.")
    shape = shape or Shape()
    errors = check(shape)
    peaks = measure_peaks()
    device = torch.cuda.get_device_name()
    rates = f"copy {peaks.bytes_per_s / 1e12:.2f} TB/s, read {peaks.read_bytes_per_s / 1e12:.2f} TB/s"
    print(f"{device}: {rates}, bf16 {peaks.flops / 1e12:.0f} TFLOP/s\n{shape}")
    print(f"{'kernel':<22}{'due':>4}{'ms':>9}{'floor ms':>10}{'x floor':>9}{'GB/s':>7}{'host us':>9}{'error':>10}")
    rows = []
    for case in cases(shape, num_due):
        ms, host_us = time_runs(case.runs)
        rate = peaks.read_bytes_per_s if case.reads else peaks.bytes_per_s
        floor_ms = 1e3 * max(case.num_bytes / rate, case.num_flops / peaks.flops)
        row = dict(
            kernel=case.kernel,
            num_due=case.num_due,
            ms=ms,
            floor_ms=floor_ms,
            times_floor=ms / floor_ms,
            gb_per_s=case.num_bytes / ms / 1e6,
            tflops=case.num_flops / ms / 1e9,
            host_us=host_us,
            error=errors[case.kernel],
        )
        rows.append(row)
        print(
            f"{case.kernel:<22}{case.num_due:>4}{ms:>9.4f}{floor_ms:>10.4f}{ms / floor_ms:>9.2f}"
            f"{row['gb_per_s']:>7.0f}{host_us:>9.1f}{errors[case.kernel]:>10.1e}",
            flush=True,
        )
    if json_path:
        import triton

        about = dict(device=device, torch=torch.__version__, triton=triton.__version__, command=sys.argv)
        result = dict(**about, peaks=asdict(peaks), shape=asdict(shape), rows=rows)
        json_path.write_text(json.dumps(result, indent=1))
    return rows


def cases(shape: Shape, num_due: tuple[int, ...]) -> list[Case]:
    """Every kernel at every number of due requests; all share one cache and one query bank, sized for the largest."""
    most = max(num_due)
    cache, all_blocks = random_cache(shape, most)
    bank, (weights, rotation) = random_bank(shape, most), kara_weights(shape)
    dtype = getattr(torch, shape.dtype)
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * cache.dtype.itemsize  # keys and values of a layer
    model_bytes = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    out = [store_case(shape, bank, cache), join_case(shape)]
    for num_tokens in packed_kernels.CONTEXTS if packs(shape) else ():
        load = packed_kernels.attention_load(shape, num_tokens, DEVICE)
        name, layers = f"packed, {num_tokens} tokens", [load.run] * 6  # each reads more than the L2 cache holds
        out.append(Case(name, packed_kernels.NUM_REQS, layers, load.num_bytes, reads=True))
    for due in num_due:
        sets = all_blocks[: most - most % due].split(due)  # blocks of disjoint groups of requests
        pairs = due * shape.num_layers
        rows = pairs * shape.num_kv_heads
        logits = pairs * shape.num_heads * shape.num_queries * shape.num_candidates
        starts = bank.ring_start(torch.randperm(most, device=DEVICE), 5).int()
        queries = DueQueries(bank, starts, rotation).split(due)
        scores = torch.rand(rows, shape.num_candidates, device=DEVICE)
        kept = random_kept(shape, due)
        size = (pairs, shape.num_kept, shape.num_kv_heads, shape.head_dim)
        keys, values = (torch.randn(size, device=DEVICE).to(dtype) for _ in range(2))
        out += [
            Case(
                "window_scores",
                due,
                [partial(window_scores, q, blocks, cache, *weights) for q, blocks in zip(queries, sets, strict=False)],
                pairs * (token_bytes * shape.num_candidates + bank.num_bytes / (shape.num_layers * most))
                + scores.nbytes,
                2 * shape.head_dim * logits,
            ),
            Case(
                "select_chunks",
                due,
                [partial(select_chunks, scores, shape.num_kept, 8, 0.5)],
                scores.nbytes + kept.nbytes,
            ),
            Case(
                "compact",
                due,
                [partial(compact, kept, blocks, cache) for blocks in sets],
                2 * pairs * token_bytes * shape.num_kept + kept.nbytes,
            ),
            Case(
                "gather_window",
                due,
                [partial(gather_window, blocks, cache, dtype) for blocks in sets],
                pairs * (token_bytes + model_bytes) * shape.num_candidates,
            ),
            Case(
                "scatter_window",
                due,
                [partial(scatter_window, keys, values, blocks, cache) for blocks in sets],
                pairs * (token_bytes + model_bytes) * shape.num_kept,
            ),
        ]
        if packs(shape):
            packed_bytes = shape.head_dim * PACKED_BITS / 8 * 2 * shape.num_kv_heads
            out.append(
                Case(
                    "pack",
                    due,
                    [packed_kernels.pack_run(shape, blocks, cache) for blocks in sets],
                    pairs * (token_bytes + packed_bytes) * packed_kernels.num_packed(shape),
                )
            )
        if refits(shape):
            runs: list[Callable[[], Any]] = [
                # A very strong ridge: repeated refits leave the cache unchanged, at the same amount of work.
                partial(refit, q, kept, blocks, cache, 1e9, 1e9)
                for q, blocks in zip(queries, sets, strict=False)
            ]
            moved_bytes = token_bytes * (shape.num_candidates + shape.num_kept)
            num_bytes = pairs * (moved_bytes + bank.num_bytes / (shape.num_layers * most))
            out.append(Case("refit", due, runs, num_bytes, refit_flops(shape, rows)))
    return out


def packs(shape: Shape) -> bool:
    """Whether the packed format supports this cache."""
    return shape.kv_dtype == shape.dtype


def refits(shape: Shape) -> bool:
    """Whether Kara refits survivors of this shape."""
    return Kara().refits(shape.num_kept) and shape.head_dim <= MOST_DIMS


def refit_flops(shape: Shape, rows: int) -> float:
    """Floating-point operations of `refit` for so many heads, of which the steps need `fit`."""
    window, kept, dims = shape.num_candidates, shape.num_kept, shape.head_dim
    per_query = 2 * window * dims + kept * dims + kept * (kept + dims) + dims * dims
    num_queries = shape.num_queries * shape.num_heads // shape.num_kv_heads
    fit = STEPS * (kept * kept * dims + dims * dims)
    return 2.0 * rows * (num_queries * per_query + fit)


def random_bank(shape: Shape, max_num_reqs: int) -> QueryBank:
    bank = QueryBank.allocate(
        shape.num_layers, max_num_reqs, shape.num_queries, shape.num_heads, shape.num_kv_heads, shape.head_dim,
        shape.query_stride, getattr(torch, shape.dtype), DEVICE,
    )  # fmt: skip
    numbers, scales = quantize(torch.randn(*bank.scales.shape, shape.head_dim, device=DEVICE), bank.queries.dtype)
    bank.queries.copy_(numbers)
    bank.scales.copy_(scales)
    return bank


def kara_weights(shape: Shape) -> tuple[tuple[bool, float, float], Rotation]:
    """Kara's defaults: (value_norm, keydiff_power, attention_floor), and the rotation of the queries of a window."""
    kara = Kara()
    positions = torch.arange(shape.num_queries, device=DEVICE) * shape.query_stride
    shifts = torch.from_numpy(query_shifts(shape.query_stride, shape.num_heads // shape.num_kv_heads)).to(DEVICE)
    rope = Rope(frequencies(1e6, shape.head_dim, torch.device(DEVICE)))
    rotation = kara.rotation(rope, positions, shifts, shape.head_dim, torch.bfloat16)
    return (kara.value_norm, kara.keydiff_power, kara.attention_floor), rotation


def store_case(shape: Shape, bank: QueryBank, cache: PagedCache) -> Case:
    """Store the queries of 256 decoded tokens, according to the stride: one launch per layer, timed together."""
    num_tokens = 256
    query, key, value = random_tokens(shape, num_tokens)
    entries = torch.randperm(bank.queries.shape[1] * bank.period, device=DEVICE)[:num_tokens]
    codes = torch.full((num_tokens,), -1, dtype=torch.int32, device=DEVICE)
    codes[: len(entries)] = entries.int()
    slot_mapping = torch.randperm(len(cache.keys[0]) * cache.block_size, device=DEVICE)[:num_tokens]
    # This kernel only writes caches of the model's dtype.
    written = NewPairs(key, value, cache, slot_mapping) if cache.k_scale is None else None

    def run() -> None:
        for layer in range(shape.num_layers):
            store_tokens(query, bank, layer, codes, written)

    vectors = num_tokens * shape.num_heads / shape.query_stride
    stored = bank.queries[0, 0, 0, 0].nbytes + bank.scales.itemsize
    num_bytes = vectors * (shape.head_dim * query.itemsize + stored) + codes.nbytes
    if written:
        num_bytes += 2 * (key.nbytes + value.nbytes) + slot_mapping.nbytes
    return Case("store_tokens (all)", num_tokens, [run], shape.num_layers * num_bytes)


def random_tokens(shape: Shape, num_tokens: int) -> list[Tensor]:
    """Queries, keys and values of a layer, as slices of one projection: rows are strided."""
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    qkv = torch.randn(num_tokens, sum(heads), shape.head_dim, device=DEVICE).to(getattr(torch, shape.dtype))
    return list(qkv.split(heads, dim=1))


def join_case(shape: Shape, num_reqs: int = 256, num_windows: int = 32) -> Case:
    """256 requests of 32 windows (8k tokens at the default)."""
    arguments = join_arguments(shape, num_reqs, num_windows)
    num_blocks = num_windows * shape.num_kept // shape.block_size
    return Case("join_segments", num_reqs, [lambda: join_segments(*arguments)], 8 * num_reqs * num_blocks)


def join_arguments(shape: Shape, num_reqs: int, num_windows: int) -> tuple[Any, ...]:
    blocks, prefix = (num_windows + 2) * shape.blocks_each, num_windows * shape.num_kept // shape.block_size
    table, survivors = (torch.randperm(num_reqs * blocks, device=DEVICE).int().view(num_reqs, blocks) for _ in range(2))
    lengths = torch.full((num_reqs,), num_windows * shape.num_candidates + 64 + 1, dtype=torch.int32, device=DEVICE)
    plan = torch.tensor([0, prefix, num_windows * shape.blocks_each, 0], dtype=torch.int32, device=DEVICE)
    plan = plan[:, None].repeat(1, num_reqs)
    plan[3] = torch.randperm(num_reqs, device=DEVICE)
    return table, lengths, torch.full_like(lengths, -1), survivors, plan, shape.block_size


def random_cache(shape: Shape, num_due: int) -> tuple[PagedCache, Tensor]:
    """A cache in FlashAttention's layout (tokens before heads), and shuffled blocks for each request."""
    num_blocks = num_due * shape.blocks_each
    dtype = getattr(torch, shape.kv_dtype)
    size = (num_blocks, shape.block_size, shape.num_kv_heads, 2 * shape.head_dim)
    layers = [torch.randn(size, device=DEVICE).to(dtype).split(shape.head_dim, dim=-1) for _ in range(shape.num_layers)]
    scales: list[Tensor | None] = [None, None]
    if dtype == torch.float8_e4m3fn:
        scales = [torch.rand(shape.num_layers, device=DEVICE) + 0.5 for _ in range(2)]
    blocks = torch.randperm(num_blocks, device=DEVICE).int().view(num_due, shape.blocks_each)
    return PagedCache.from_layers([k for k, _ in layers], [v for _, v in layers], *scales), blocks


def random_kept(shape: Shape, num_due: int) -> Tensor:
    """[num_due, num_layers, num_kv_heads, num_kept] int32, ascending."""
    size = (num_due, shape.num_layers, shape.num_kv_heads, shape.num_candidates)
    order = torch.rand(size, device=DEVICE).argsort(dim=-1)
    return order[..., : shape.num_kept].sort(dim=-1).values.int()


def check(shape: Shape) -> dict[str, float]:
    """Each kernel's relative error, ||kernel - reference|| / ||reference||, for two requests; copies must be exact."""
    dtype = getattr(torch, shape.dtype)
    cache, blocks = random_cache(shape, 2)
    bank, (weights, rotation) = random_bank(shape, 3), kara_weights(shape)
    starts = torch.tensor([bank.ring_start(2, 5), bank.ring_start(0, 0)], dtype=torch.int32, device=DEVICE)
    queries = DueQueries(bank, starts, rotation)
    errors = {}

    scores = window_scores_ref(queries, blocks, cache, *weights)
    errors["window_scores"] = relative_error([window_scores(queries, blocks, cache, *weights)], [scores])
    rows = scores.flatten(0, 2)
    picked = (select_chunks(rows, shape.num_kept, 8, 0.5), select_chunks_ref(rows, shape.num_kept, 8, 0.5))
    errors["select_chunks"] = relative_error([picked[0]], [picked[1]])
    dense = gather_window_ref(blocks, cache, dtype)
    errors["gather_window"] = relative_error(gather_window(blocks, cache, dtype), dense)

    kept = random_kept(shape, 2)
    keys, values = (t.flip(0)[:, : shape.num_kept].contiguous() for t in dense)
    for name, run, reference in (
        ("compact", partial(compact, kept), partial(compact_ref, kept)),
        ("scatter_window", partial(scatter_window, keys, values), partial(scatter_window_ref, keys, values)),
    ):
        actual, expected = copy_of(cache), copy_of(cache)
        run(blocks, actual)
        reference(blocks, expected)
        errors[name] = relative_error(actual.keys + actual.values, expected.keys + expected.values)
    if packs(shape):
        actual, expected = copy_of(cache), copy_of(cache)
        packed_kernels.pack_run(shape, blocks, actual)()
        packed_kernels.pack_reference(shape, blocks, expected)
        sides = [[t.view(torch.int16) for t in each.keys + each.values] for each in (actual, expected)]
        errors["pack"] = relative_error(*sides)
        load = packed_kernels.AttentionLoad(shape, [0, 3, 20], DEVICE)
        wanted = load.reference()
        load.run()
        error = relative_error([load.output], [wanted])
        errors |= {f"packed, {num_tokens} tokens": error for num_tokens in packed_kernels.CONTEXTS}
    if refits(shape):
        errors["refit"] = refit_error(queries, kept, blocks, cache)

    query, key, value = random_tokens(shape, 7)
    codes = torch.tensor([5, -1, 0, -1, -1, 7, 2], dtype=torch.int32, device=DEVICE)
    slot_mapping = torch.tensor([3, -1, 0, shape.block_size, 2, -1, 5], device=DEVICE)
    banks, caches = [random_bank(shape, 1) for _ in range(2)], [copy_of(cache) for _ in range(2)]
    for each in banks:
        each.queries.zero_()
        each.scales.zero_()
    for store, each, its_cache in zip((store_tokens, store_tokens_ref), banks, caches, strict=True):
        store(query, each, 0, codes, NewPairs(key, value, its_cache, slot_mapping) if cache.k_scale is None else None)
    stored = [
        # where tokens 0 to 7 belong
        [each.queries[0, 0, :2], each.scales[0, 0, :2], its_cache.keys[0], its_cache.values[0]]
        for each, its_cache in zip(banks, caches, strict=True)
    ]
    errors["store_tokens (all)"] = relative_error(*stored)

    tables = join_arguments(shape, 3, 5)
    expected_tables: Any = [t.clone() if isinstance(t, Tensor) else t for t in tables]
    join_segments(*tables)
    join_segments_ref(*expected_tables)
    errors["join_segments"] = relative_error((tables[0], tables[2]), (expected_tables[0], expected_tables[2]))

    for name, error in errors.items():
        # Rotated queries are rounded to bfloat16; of a refit the weights too, and what is stored, in fp8 to three bits.
        limit = {"window_scores": 1e-2, "refit": 0.3 if cache.dtype.itemsize == 1 else 0.1}.get(name, 0.0)
        limit = 1e-2 if name.startswith("packed") else limit  # restored keys are rounded to the model's dtype
        if not error <= limit:
            raise AssertionError(f"{name} differs from its reference by {error:.2e}, more than {limit:.0e}.")
    return errors


def refit_error(queries: DueQueries, kept: Tensor, blocks: Tensor, cache: PagedCache) -> float:
    """Error of the refit's changes to the survivors, relative to `compact` alone: the larger of keys and values."""
    actual, expected, moved = copy_of(cache), copy_of(cache), copy_of(cache)
    refit(queries, kept, blocks, actual, 1.0, 1.0)
    refit_ref(queries, kept, blocks, expected, 1.0, 1.0)
    compact_ref(kept, blocks, moved)
    errors = []
    for side in ("keys", "values"):
        layers = zip(*(getattr(each, side) for each in (actual, expected, moved)), strict=True)
        added = [(a.double() - m.double(), e.double() - m.double()) for a, e, m in layers]
        errors.append(relative_error(*zip(*added, strict=True)))
    return max(errors)


def copy_of(cache: PagedCache) -> PagedCache:
    pairs = [torch.cat([k.float(), v.float()], -1).to(k.dtype) for k, v in zip(cache.keys, cache.values, strict=True)]
    split = [kv.split(cache.head_dim, dim=-1) for kv in pairs]
    return PagedCache.from_layers([k for k, _ in split], [v for _, v in split], cache.k_scale, cache.v_scale)


def relative_error(actual: Any, expected: Any) -> float:
    difference = sum(float((a.double() - e.double()).square().sum()) for a, e in zip(actual, expected, strict=True))
    return (difference / sum(float(e.double().square().sum()) for e in expected)) ** 0.5


def measure_peaks() -> Peaks:
    """Measure the device's limits with a large copy, a large sum and a large matrix product."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    copy_ms, _ = time_runs([lambda: target.copy_(source)])
    sum_ms, _ = time_runs([source.sum])
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_ms, _ = time_runs([lambda: a @ b])
    return Peaks(
        bytes_per_s=2 * source.nbytes / copy_ms * 1e3,
        read_bytes_per_s=source.nbytes / sum_ms * 1e3,
        flops=2 * 8192**3 / product_ms * 1e3,
    )


def time_runs(runs: list[Callable[[], Any]], repeats: int = 20) -> tuple[float, float]:
    """Milliseconds per run: on the device (median over replays of a graph of all runs), and to launch on the host."""
    for run in runs:
        run()  # compiles
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        runs[0]()
        times.append((time.perf_counter() - start) * 1e6)
    host_us = statistics.median(times)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    milliseconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end) / len(runs))
    del graph
    torch.cuda.empty_cache()
    return statistics.median(milliseconds), host_us
