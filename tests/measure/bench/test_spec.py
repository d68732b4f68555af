"""Configurations as they are written, and the engines that they share."""

from __future__ import annotations

import pytest

from kvllm.errors import UsageError
from kvllm.measure.bench.spec import BenchSpec, Configuration, engine_jobs
from kvllm.measure.bench.worker import spread


def test_a_configuration_is_method_ratio_and_options() -> None:
    assert Configuration.parse("kara:0.3").options == {"method": "kara", "retention_ratio": 0.3}
    parsed = Configuration.parse("snapkv:0.5:policy=budget,budget_size=1024,method_options.kernel_size=5")
    assert parsed.options == {
        "method": "snapkv",
        "retention_ratio": 0.5,
        "policy": "budget",
        "budget_size": 1024,
        "method_options": {"kernel_size": 5},
    }


@pytest.mark.parametrize(
    "text, match",
    [
        ("kara", "METHOD:RATIO"),
        ("kara:much", "METHOD:RATIO"),
        ("kara:0.3:window_size", "OPTION=VALUE"),
        ("kaar:0.3", "kara"),
        ("kara:0.3:windowsize=64", "window_size"),
        ("kara:3", "in \\(0, 1\\]"),
    ],
)
def test_a_wrong_configuration_is_refused_before_any_engine(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BenchSpec(model="tiny", config=["stock", text])


def test_a_wrong_model_or_option_is_refused() -> None:
    with pytest.raises(ValueError, match="qwen3-8b"):
        BenchSpec(model="no/such/folder")
    with pytest.raises(ValueError, match="concurency"):
        BenchSpec.from_dict({"model": "tiny", "concurency": [4]})


def test_experts_are_drawn_at_random_only_where_weights_are_random() -> None:
    simulated = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.routing_simulator_router")
    assert BenchSpec(model="gpt-oss-20b").environment() == {}
    for model in ("gpt-oss-20b", "qwen3-next-24l"):
        (strategy,) = BenchSpec(model=model, random_experts=True).environment().values()
        assert strategy in simulated.RoutingSimulator.get_available_strategies()
    with pytest.raises(UsageError, match="random_experts: only for a shape .* which 'qwen3-8b' is not"):
        BenchSpec(model="qwen3-8b", random_experts=True)


def test_ratios_share_an_engine_and_stock_has_its_own() -> None:
    config = ["stock", "kara:0.3", "off", "kara:0.5", "kara:1.0", "snapkv:0.3", "stock"]
    jobs = engine_jobs(BenchSpec(model="tiny", config=config, concurrency=[4, 8]))
    assert [[(r.label, r.concurrency) for r in job.runs] for job in jobs] == [
        [("stock", 4), ("stock", 8)],
        [(label, n) for label in ("kara:0.3", "kara:0.5", "kara:1.0") for n in (4, 8)],
        [("off", 4), ("off", 8)],
        [("snapkv:0.3", 4), ("snapkv:0.3", 8)],
        [("stock", 4), ("stock", 8)],
    ]
    assert [job.plugins for job in jobs] == ["", "kvllm", "kvllm", "kvllm", ""]
    # The requests of the other runs carry their ratios, which the engine must allow.
    assert jobs[1].options == {"method": "kara", "retention_ratio": 0.5, "request_ratios": "0.3,1.0"}


def test_engine_arguments() -> None:
    spec = BenchSpec(model="tiny", concurrency=[4, 8], num_gpu_blocks=40, engine_args={"kv_cache_dtype": "fp8"})
    args = spec.vllm_args("folder")
    assert (args["max_num_seqs"], args["max_model_len"]) == (8, 256 + 8192 + 1)
    assert (args["load_format"], args["num_gpu_blocks_override"], args["kv_cache_dtype"]) == ("dummy", 40, "fp8")
    assert "gpu_memory_utilization" not in args


def test_staggered_lengths_cover_the_output_evenly() -> None:
    lengths = spread(8, 100)
    assert sorted(lengths) == [13, 25, 38, 50, 63, 75, 88, 100]
    assert lengths != sorted(lengths) and lengths == spread(8, 100)
