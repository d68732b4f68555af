"""Start-up: what is refused, by name and with a remedy, and what is left to vLLM."""

from __future__ import annotations

import inspect
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma4TextConfig
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from kvllm.compression.footprint import footprint
from kvllm.config import KvConfig
from kvllm.engine import settings
from kvllm.engine.settings import Geometries, heads_of_engine, kernel_block_size, kv_config, prepare
from kvllm.errors import UsageError
from kvllm.layers import Heads
from kvllm.layout import Geometry, GroupedGeometry
from kvllm.methods.triattention import save_statistics

OTHER_CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


def vllm_config(model_dir: Path, kvllm: Any = None, **options: Any) -> Any:
    additional = {} if kvllm is None else {"kvllm": kvllm}
    return EngineArgs(
        str(model_dir), dtype="float32", max_model_len=1024, enforce_eager=True, additional_config=additional, **options
    ).create_engine_config()


@pytest.fixture
def vllm_log(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """Log records of the logger "vllm" and its children, at INFO and above."""
    vllm_config(model_dir)  # the first of a process sets vLLM's logger up
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to where pytest listens
    caplog.set_level(logging.INFO, "vllm")
    return caplog


def test_off_changes_nothing(model_dir: Path) -> None:
    config = vllm_config(model_dir)
    args = EngineArgs(str(model_dir), dtype="float32", max_model_len=1024, enforce_eager=True)
    stock = inspect.unwrap(EngineArgs.create_engine_config)(args)
    assert config.scheduler_config.scheduler_cls is None
    assert config.cache_config.block_size == stock.cache_config.block_size
    assert not config.cache_config.user_specified_block_size


def test_on_chooses_scheduler_and_block_size(model_dir: Path) -> None:
    config = vllm_config(model_dir, {})
    assert config.scheduler_config.scheduler_cls == "kvllm.engine.scheduler.KvScheduler"
    assert config.cache_config.block_size == 32
    assert vllm_config(model_dir, {}, block_size=64).cache_config.block_size == 64


def test_asynchronous_scheduling_gets_its_own_scheduler(model_dir: Path) -> None:
    """vLLM's CPU platform turns asynchronous scheduling off, so `prepare` is asked directly."""
    config = vllm_config(model_dir)
    config.additional_config = {"kvllm": {"window_size": 512}}
    config.scheduler_config.async_scheduling = True
    prepare(config)
    assert config.scheduler_config.scheduler_cls == "kvllm.engine.scheduler.KvAsyncScheduler"


def test_rounding_on_a_cpu_says_that_it_saves_no_memory(model_dir: Path, vllm_log: pytest.LogCaptureFixture) -> None:
    vllm_config(model_dir, {})
    assert "survivor_bits" not in vllm_log.text
    vllm_config(model_dir, {"survivor_bits": 4})
    assert "survivor_bits=4: on a CPU, survivors are rounded in runs of 112 tokens but stored in the" in vllm_log.text
    assert "no memory is saved" in vllm_log.text


def test_compressed_layers_with_larger_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Gemma 4: 4 KV heads of 256 in layers with a window, one of 512 in those of full attention."""
    Gemma4TextConfig(
        num_hidden_layers=6, num_global_key_value_heads=1, attention_k_eq_v=True, architectures=["Gemma4ForCausalLM"]
    ).save_pretrained(tmp_path)
    options = {"skip_tokenizer_init": True}
    config = vllm_config(tmp_path, {}, **options)
    assert config.cache_config.block_size == 32 and kernel_block_size(config) == 64
    assert heads_of_engine(config) == Heads(8, 1, 512)
    with pytest.raises(ValueError, match="window_size=64: with blocks of 64 tokens no block could be freed"):
        vllm_config(tmp_path, {"window_size": 64}, **options)
    config = vllm_config(tmp_path, **options)
    as_on_a_gpu(config, monkeypatch, "bfloat16", survivor_bits=4, retention_ratio=0.5)
    with pytest.raises(ValueError, match="survivor_bits=4: attention over .* head_dim=512. Use survivor_bits=16"):
        prepare(config)


def test_blocks_that_vllm_would_pad_are_refused_as_the_model_is(tmp_path: Path) -> None:
    made = Gemma4TextConfig(num_hidden_layers=6, global_head_dim=384, architectures=["Gemma4ForCausalLM"])
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="KvLLM does not support tensor_parallel_size=1: keys have 1536 numbers"):
        vllm_config(tmp_path, {}, skip_tokenizer_init=True)


def test_a_front_end_without_our_checks_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_config(model_dir)
    config.additional_config = {"kvllm": {}}
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UsageError, match="VLLM_USE_RUST_FRONTEND=1, with which requests reach the engine unchecked"):
        prepare(config)


def gpu_config(model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, **options: Any) -> Any:
    """A vLLM configuration as on a GPU, before `prepare`."""
    config = vllm_config(model_dir)
    as_on_a_gpu(config, monkeypatch, dtype, **options)
    return config


def as_on_a_gpu(config: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, **options: Any) -> None:
    config.model_config.dtype = getattr(torch, dtype)
    monkeypatch.setattr("vllm.platforms.current_platform.device_type", "cuda")
    monkeypatch.setattr(config.device_config, "device_type", "cuda")
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    config.cache_config.user_specified_block_size = False
    config.additional_config = {"kvllm": options}


@pytest.mark.parametrize(
    "bits, dtype, cache_dtype, message",
    [
        (8, "bfloat16", "auto", "survivor_bits=8: not supported on GPUs. Use 4 or 16"),
        (4, "float32", "auto", "not dtype=float32. Use --dtype bfloat16, or survivor_bits=16"),
        (4, "bfloat16", "fp8", None),
        (4, "bfloat16", "auto", None),
    ],
)
def test_survivors_that_gpus_can_pack(
    bits: int, dtype: str, cache_dtype: str, message: str | None, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = gpu_config(model_dir, monkeypatch, dtype, survivor_bits=bits, retention_ratio=0.4375)
    config.cache_config.cache_dtype = cache_dtype
    if message is None:
        prepare(config)
        geometry = Geometries.of_engine(config).of(None)
        assert isinstance(geometry, Geometry) and geometry.packed_tokens == 56
        assert geometry.block_size == (32 if cache_dtype == "fp8" else 16)  # the same bytes
        assert geometry.shape(0).num_kept == 2 * 56 and geometry.num_kept_blocks(0) == 2
        return
    with pytest.raises(ValueError, match=message):
        prepare(config)


@pytest.mark.parametrize(
    "kvllm, attribute, value, message",
    [
        ({}, "", None, None),
        ({"survivor_bits": 4, "retention_ratio": 0.4375}, "", None, None),
        ({"prompt_budget": 256}, "", None, "prompt_budget=256: .*could be stored after the cut"),
        ({"retention_ratio": {"0-14": 0.5, "15-29": 0.25}}, "", None, "kv_offloading_size=.*several KV cache groups"),
        ({}, "kv_transfer_config.kv_role", "kv_producer", "kv_role=kv_producer: .*use kv_both"),
        ({}, "kv_transfer_config.kv_connector_module_path", "mine", "kv_connector_module_path=mine: "),
        ({}, "kv_transfer_config.kv_connector_extra_config", {"spec_name": "Tiers"}, "=spec_name: not checked"),
        ({}, "cache_config.enable_prefix_caching", False, "enable_prefix_caching=False: "),
        ({}, "parallel_config.world_size", 2, "world_size=2: .*one GPU an engine"),
        ({}, "parallel_config.data_parallel_size", 2, "data_parallel_size=2: "),
    ],
)
def test_where_prompts_are_offloaded(
    kvllm: Any, attribute: str, value: Any, message: str | None, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = gpu_config(model_dir, monkeypatch, "bfloat16", **kvllm)
    options = {"cpu_bytes_to_use": 2**30}
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=options
    )
    if attribute:
        owner, _, name = attribute.partition(".")
        monkeypatch.setattr(getattr(config, owner), name, value)
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        prepare(config)


def test_gpus_pack_nothing_beside_layer_budgets(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"0-14": 0.875, "15-29": 0.4375}
    config = gpu_config(model_dir, monkeypatch, "bfloat16", survivor_bits=4, retention_ratio=table)
    with pytest.raises(
        UsageError, match="survivor_bits=4: on GPUs it cannot be combined with the layer budgets retention_ratio="
    ):
        prepare(config)


def test_max_num_seqs_is_lowered_if_the_query_bank_would_be_too_large(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, vllm_log: pytest.LogCaptureFixture
) -> None:
    default = vllm_config(model_dir, {}).scheduler_config.max_num_seqs
    one = footprint(AutoConfig.from_pretrained(model_dir, dtype="float32"), KvConfig(), 1)
    memory = int((one.weights + 20 * (17 * one.query_bank)) / 0.92) + 1
    monkeypatch.setattr(settings, "gpu_memory", lambda: memory)
    lowered = vllm_config(model_dir, {})
    assert lowered.scheduler_config.max_num_seqs == 16 < default
    assert lowered.scheduler_config.scheduler_cls == "kvllm.engine.scheduler.KvScheduler"
    assert vllm_log.text.count(f"max_num_seqs=16 instead of vLLM's default of {default}") == 1
    assert vllm_config(model_dir, {}, max_num_seqs=100).scheduler_config.max_num_seqs == 100
    assert vllm_config(model_dir).scheduler_config.max_num_seqs == default
    monkeypatch.setattr(settings, "gpu_memory", lambda: 1 << 50)
    assert vllm_config(model_dir, {}).scheduler_config.max_num_seqs == default

    def unknown(*_: Any) -> None:
        raise KeyError("architecture")

    monkeypatch.setattr(settings, "gpu_memory", lambda: memory)
    monkeypatch.setattr(settings, "footprint", unknown)
    assert vllm_config(model_dir, {}).scheduler_config.max_num_seqs == default
    assert f"max_num_seqs stays at vLLM's default of {default}" in vllm_log.text


@pytest.mark.parametrize(
    "kvllm, options, message",
    [
        ({"retention_ration": 0.3}, {}, r"retention_ration=0.3: no such option; did you mean 'retention_ratio'"),
        ({"retention_ratio": 0}, {}, r"retention_ratio=0: .*in \(0, 1\]"),
        ({"method": "kaar"}, {}, r"method='kaar': no such method; did you mean 'kara'"),
        ({"window_size": 80}, {"block_size": 64}, r"window_size=80: must be a multiple of the KV block size, 64"),
        ({"retention_ratio": 0.05}, {}, r"retention_ratio=0.05: .*at least one block of 32 tokens.*at least 640"),
        ({"survivor_bits": 3}, {}, r"survivor_bits=3: must be one of 16, 8, 4"),
        (
            {"survivor_bits": 8, "window_size": 64},
            {"block_size": 8},
            r"survivor_bits=8: a block of 8 tokens with head_dim=64 would hold only 8 rounded .*--block-size",
        ),
        ({"prompt_budget": 100}, {}, r"prompt_budget=100: must be a multiple of the KV block size, 32 .*use 128"),
        (
            {"prompt_budget": 608},
            {},
            r"prefix_budget_exhausted: prompt_budget=608: .*256 .*128 .*max_model_len=1024.* at most 576",
        ),
        ("0.3", {}, r"kvllm='0.3': expected a mapping"),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, r"speculative_config=ngram"),
        ({}, {"kv_cache_dtype": "fp8"}, r"kv_cache_dtype=fp8.*: use one of auto"),
        ({}, {"kv_offloading_size": 1}, r"kv_offloading_size=1.*: vLLM offloads from GPUs only"),
        ({}, {"kv_transfer_config": OTHER_CONNECTOR}, r"kv_connector=ExampleConnector: .*--kv-offloading-size"),
        ({}, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, r"scheduler_cls="),
    ],
)
def test_refused_by_name(model_dir: Path, kvllm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vllm_config(model_dir, kvllm, **options)


@pytest.mark.parametrize(
    "uses_mrope, text_only, refused", [(True, False, True), (True, True, False), (False, False, False)]
)
def test_angles_from_indices_are_wrong_behind_images(
    tmp_path: Path, uses_mrope: bool, text_only: bool, refused: bool
) -> None:
    """The config of a vision-language model, which vLLM cannot load without torchvision."""
    file = str(tmp_path / "statistics")
    save_statistics(file, torch.randn(1, 1, 8, 64), torch.ones(32))
    model = SimpleNamespace(multimodal_config=SimpleNamespace(language_model_only=text_only), uses_mrope=uses_mrope)
    config = KvConfig(method="triattention", method_options={"statistics": file})
    with pytest.raises(UsageError, match="method=triattention") if refused else nullcontext():
        settings._check_positions(config, model)
    other = KvConfig(request_methods={"random": {}, "triattention": {"statistics": file}})
    with pytest.raises(UsageError, match="request_methods=triattention") if refused else nullcontext():
        settings._check_positions(other, model)
    settings._check_positions(KvConfig(), model)
    settings._check_positions(config, SimpleNamespace(multimodal_config=None, uses_mrope=uses_mrope))


def test_images_that_see_later_tokens_are_refused_before_the_model_is_loaded(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `kvllm doctor` sees it; vLLM cannot load such a model's config without torchvision."""
    config = vllm_config(model_dir)
    config.additional_config = {"kvllm": {}}
    monkeypatch.setattr(type(config.model_config), "is_mm_prefix_lm", True)
    prepare(config)  # a language model alone
    config.scheduler_config.scheduler_cls = None
    config.model_config.multimodal_config = SimpleNamespace(language_model_only=False)
    with pytest.raises(UsageError, match="use_mm_prefix=True: tokens of an image .*; use --language-model-only"):
        prepare(config)


def test_a_ratio_that_frees_a_block_in_several_windows_is_served(model_dir: Path) -> None:
    options = vllm_config(model_dir, {"retention_ratio": 0.97}).additional_config["kvllm"]
    assert options["retention_ratio"] == 0.97


def test_sliding_window_models_are_refused(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((model_dir / name).read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"sliding_window=128: no layer has full attention"):
        vllm_config(tmp_path, {})


def test_a_sliding_window_as_long_as_the_longest_text_is_served(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 1024}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((model_dir / name).read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vllm_config(tmp_path, {}).scheduler_config.scheduler_cls == "kvllm.engine.scheduler.KvScheduler"


@pytest.mark.parametrize("kind, architecture", [("gpt_oss", "GptOssForCausalLM"), ("llama4_text", "Llama4ForCausalLM")])
def test_layers_with_a_window_or_chunk_need_groups_of_their_own(kind: str, architecture: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind, num_hidden_layers=4, architectures=[architecture]).save_pretrained(tmp_path)
    vllm_config(tmp_path, {}, skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="disable_hybrid_kv_cache_manager=True: sliding-window .* leave it unset"):
        vllm_config(tmp_path, {}, skip_tokenizer_init=True, disable_hybrid_kv_cache_manager=True)


def test_every_option_reaches_the_engine(model_dir: Path) -> None:
    from kvllm.engine.settings import kv_config

    wanted = KvConfig(method="snapkv", retention_ratio=0.5, window_size=128, buffer_size=32, query_stride=4, seed=3)
    assert kv_config(vllm_config(model_dir, wanted.to_dict())) == wanted


def test_layer_budgets_are_refused_where_they_do_not_fit(model_dir: Path) -> None:
    table = {"0-14": 0.5, "15-29": 0.25}
    config = vllm_config(model_dir, {"retention_ratio": table})
    config.parallel_config.pipeline_parallel_size = 2
    config.scheduler_config.scheduler_cls = None
    with pytest.raises(
        UsageError, match="combined with pipeline_parallel_size=2, since a stage has only some of the groups"
    ):
        prepare(config)
    with pytest.raises(UsageError, match="layers 15-29: retention_ratio=0.05: every window keeps at least one block"):
        vllm_config(model_dir, {"retention_ratio": table | {"15-29": 0.05}})
    with pytest.raises(UsageError, match="layers 2-29 have no ratio; the model's full-attention layers are 0-29"):
        vllm_config(model_dir, {"retention_ratio": {"0": 0.5, "1": 0.25}})


def test_a_method_s_own_layer_budgets_are_those_of_the_engine(model_dir: Path) -> None:
    config = vllm_config(model_dir, {"method": "pyramidkv", "retention_ratio": 0.5, "method_options": {"beta": 4}})
    made = kv_config(config)
    assert made is not None
    assert made.retention_ratio == pytest.approx({"0-9": 0.75862, "10-19": 0.5, "20-29": 0.24138}, abs=1e-5)
    geometry = Geometries.of_engine(config).of(None)
    assert isinstance(geometry, GroupedGeometry) and len(geometry.groups) == 3
