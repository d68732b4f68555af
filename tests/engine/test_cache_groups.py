"""Several KV cache groups, without an engine: which are compressed, and what each attends to and caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from kvllm.engine.cache_groups import (
    checked_groups,
    compressed_block_size,
    compressed_groups,
    local_of,
    only_hashed,
)
from kvllm.engine.compat import RELEASE
from kvllm.engine.runner_v2 import KvModelState, Part
from kvllm.engine.spec import KvSpec
from kvllm.groups import Groups, block_scales
from kvllm.layers import Cacheless, Heads, Local, Recurrent

if RELEASE >= (0, 33):
    from vllm.v1.core.kv_cache_planning import _get_kv_cache_groups_uniform_page_size, get_kv_cache_groups
else:
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size, get_kv_cache_groups

BLOCK_SIZE = 16
SHAPE: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float16}
FULL, WINDOW = KvSpec(**SHAPE), SlidingWindowSpec(sliding_window=128, **SHAPE)


def cache_config(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=groups)


def grouping_config() -> Any:
    """What vLLM needs of its configuration to group layers."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False), speculative_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: SimpleNamespace(is_block_outermost=False)),
    )  # fmt: skip


def test_the_compressed_group_is_the_only_one_of_its_kind() -> None:
    assert compressed_groups(cache_config(WINDOW, FULL, WINDOW), BLOCK_SIZE, 1) == [1]
    for specs, block_size in (((FULL, FULL), BLOCK_SIZE), ((WINDOW,), BLOCK_SIZE), ((FULL, WINDOW), 32)):
        with pytest.raises(ValueError, match=f"one KV cache group with blocks of {block_size} tokens, but vLLM made "):
            compressed_groups(cache_config(*specs), block_size, 1)


def test_each_part_has_a_group_of_its_own() -> None:
    other = KvSpec(**SHAPE, part=1)
    assert compressed_groups(cache_config(WINDOW, other, FULL), BLOCK_SIZE, 2) == [2, 1]
    for specs in ((FULL, FULL), (FULL, WINDOW), (FULL, other, other)):
        with pytest.raises(ValueError, match="in 2 KV cache groups, one for each ratio, with blocks of 16 tokens"):
            compressed_groups(cache_config(*specs), BLOCK_SIZE, 2)
    assert KvSpec.merge([other, other]) == other
    with pytest.raises(AssertionError, match="layers of different parts"):
        KvSpec.merge([FULL, other])
    assert other.is_uniform_with_collection({"a": other, "b": other})
    assert not other.is_uniform_with_collection({"a": other, "b": FULL})


@pytest.mark.parametrize("num_parts, num_local", [(2, 0), (3, 0), (4, 0), (2, 12), (3, 12)])
def test_vllm_makes_the_groups_of_layer_budgets(num_parts: int, num_local: int) -> None:
    """Through its own choice of how to group, which would put all layers of full attention into one."""
    layers: dict[str, Any] = {f"full.{i}": KvSpec(**SHAPE, part=i * num_parts // 12) for i in range(12)}
    layers |= {f"local.{i}": WINDOW for i in range(num_local)}
    made = get_kv_cache_groups(grouping_config(), layers)
    groups = Groups.of([None] * 12 + [Local(128)] * num_local, num_parts)
    parts = [group.kv_cache_spec.part for group in made if isinstance(group.kv_cache_spec, KvSpec)]
    assert parts == list(range(num_parts)) and groups.num_full == num_parts
    assert len(made) == num_parts + groups.num_local
    assert {len(group.layer_names) for group in made} == {groups.group_size}


def test_beside_recurrent_layers_blocks_may_be_larger() -> None:
    full = KvSpec(**SHAPE | {"block_size": 48})
    state = MambaSpec(block_size=48, shapes=((48, 2, 64, 2),), dtypes=(torch.float16,))
    made = cache_config(state, full)
    assert compressed_groups(made, BLOCK_SIZE, 1) == [1] and compressed_block_size(made, BLOCK_SIZE, 1) == 48
    with pytest.raises(ValueError, match="one KV cache group with blocks of 32 tokens"):
        compressed_groups(made, 32, 1)


@pytest.mark.parametrize("num_full, num_states", [(12, 36), (6, 23), (4, 5)])
def test_vllm_makes_the_same_groups_of_recurrent_layers(num_full: int, num_states: int) -> None:
    full = KvSpec(**SHAPE)
    state = MambaSpec(
        block_size=BLOCK_SIZE, shapes=((16, 2, 64, 2),), dtypes=(torch.float16,), mamba_cache_mode="align"
    )
    specs: dict[str, Any] = {f"full.{i}": full for i in range(num_full)}
    made = _get_kv_cache_groups_uniform_page_size(specs | {f"state.{i}": state for i in range(num_states)})
    groups = Groups.of([None] * num_full + [Recurrent()] * num_states + [Cacheless()] * 5)
    kinds = [type(group.kv_cache_spec) for group in made]
    assert (kinds.count(KvSpec), kinds.count(MambaSpec)) == (groups.num_full, groups.num_local)
    assert {local_of(group.kv_cache_spec) for group in made if type(group.kv_cache_spec) is MambaSpec} == {groups.local}
    config = SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode="align"))
    needed = groups.num_local * state.max_memory_usage_bytes(config) // state.page_size_bytes
    assert needed <= groups.local_blocks(10_000, BLOCK_SIZE, 100)


@pytest.mark.parametrize(
    "local, num_full, num_local",
    [(Local(128), 12, 12), (Local(128), 4, 22), (Local(64, chunked=True), 12, 36), (Local(128), 5, 4)],
)
@pytest.mark.parametrize("block_size", [16, 32])
def test_vllm_makes_the_same_groups_and_counts_the_same_blocks(
    local: Local, num_full: int, num_local: int, block_size: int
) -> None:
    """vLLM's own grouping, and the block counts of its specs for a request."""
    shape = SHAPE | {"block_size": block_size}
    other: Any = SlidingWindowSpec(sliding_window=local.size, **shape)
    if local.chunked:
        other = ChunkedLocalAttentionSpec(attention_chunk_size=local.size, **shape)
    specs = {f"full.{i}": KvSpec(**shape) for i in range(num_full)} | {f"local.{i}": other for i in range(num_local)}
    made = _get_kv_cache_groups_uniform_page_size(specs)
    groups = Groups.of([None] * num_full + [local] * num_local)
    kinds = [type(group.kv_cache_spec) for group in made]
    assert (kinds.count(KvSpec), kinds.count(type(other))) == (groups.num_full, groups.num_local)
    assert max(len(group.layer_names) for group in made) == groups.group_size
    assert {local_of(g.kv_cache_spec) for g in made if type(g.kv_cache_spec) is not KvSpec} == {local}
    for num_tokens in (1, 15, 16, 17, 127, 128, 129, 200, 1000):
        cap = other.max_admission_blocks_per_request(100, 10**6)
        expected = groups.num_local * min(cap, -(-num_tokens // block_size))
        assert groups.local_blocks(num_tokens, block_size, in_flight=100) == expected


@pytest.mark.parametrize("full, local", [((2, 64), (4, 64)), ((4, 128), (2, 64)), ((1, 128), (2, 64))])
def test_vllm_enlarges_the_same_blocks_where_layers_have_other_heads(
    full: tuple[int, int], local: tuple[int, int]
) -> None:
    """As in Gemma 4; through vLLM's own choice of the block sizes."""
    shapes = [SHAPE | {"num_kv_heads": heads, "head_size": dim} for heads, dim in (full, local)]
    specs: dict[str, Any] = {"full": KvSpec(**shapes[0])}
    specs |= {f"local.{i}": SlidingWindowSpec(sliding_window=128, **shapes[1]) for i in range(3)}
    made = get_kv_cache_groups(grouping_config(), specs)
    scale, local_scale = block_scales(Heads(4, *full), Heads(4, *local))
    sizes = {type(group.kv_cache_spec): group.kv_cache_spec.block_size for group in made}
    assert sizes == {KvSpec: BLOCK_SIZE * scale, SlidingWindowSpec: BLOCK_SIZE * local_scale}
    assert len({group.kv_cache_spec.page_size_bytes for group in made}) == 1
    spec = next(group.kv_cache_spec for group in made if isinstance(group.kv_cache_spec, SlidingWindowSpec))
    groups = Groups(1, 1, 3, Local(128), scale, local_scale)
    for num_tokens in (1, 31, 33, 129, 1000):
        expected = 3 * min(spec.max_admission_blocks_per_request(100, 10**6), -(-num_tokens // spec.block_size))
        assert groups.local_blocks(num_tokens, BLOCK_SIZE * scale, in_flight=100) == expected


def test_groups_that_the_config_does_not_explain_are_refused() -> None:
    made = AutoConfig.for_model("gpt_oss", num_hidden_layers=4, sliding_window=128)
    model = SimpleNamespace(hf_config=made, max_model_len=512, model="some/model")
    config: Any = SimpleNamespace(model_config=model, additional_config=None)
    assert checked_groups(config, cache_config(WINDOW, FULL)) == Groups(2, 1, 1, Local(128))
    longer = SlidingWindowSpec(sliding_window=129, **SHAPE)
    larger = SlidingWindowSpec(sliding_window=128, **SHAPE | {"block_size": 2 * BLOCK_SIZE})
    for specs in ((FULL,), (FULL, longer), (FULL, larger), (FULL, WINDOW, WINDOW)):
        with pytest.raises(
            ValueError, match=r"some/model: according to its config, 1 KV cache groups .*Local\(size=128"
        ):
            checked_groups(config, cache_config(*specs))


def test_no_group_caches_more_than_a_request_has_hashes_for() -> None:
    seen: list[int] = []
    cache = only_hashed(lambda request, num_tokens: seen.append(num_tokens), BLOCK_SIZE)
    request: Any = SimpleNamespace(block_hashes=[b"a", b"b"])
    for num_tokens in (5, 32, 33, 100):
        cache(request, num_tokens)
    assert seen == [5, 32, 32, 32]


def test_a_request_with_nothing_more_to_cache_is_skipped_until_its_blocks_are_freed() -> None:
    seen: list[tuple[str, int]] = []
    all_cached: set[str] = set()
    cache = only_hashed(lambda request, num_tokens: seen.append((request.request_id, num_tokens)), 16, all_cached)
    compressed: Any = SimpleNamespace(request_id="a", block_hashes=[b"a", b"b"], _block_hasher=None)
    other: Any = SimpleNamespace(request_id="b", block_hashes=[b"a", b"b"], _block_hasher=lambda request: [])
    for num_tokens in (5, 31, 32, 33, 100):
        cache(compressed, num_tokens)
        cache(other, num_tokens)
    assert [tokens for name, tokens in seen if name == "a"] == [5, 31, 32]
    assert [tokens for name, tokens in seen if name == "b"] == [5, 31, 32, 32, 32]
    all_cached.discard("a")
    cache(compressed, 40)
    assert seen[-1] == ("a", 32)


class Group:
    """An attention group of vLLM's V2 runner, whose metadata is what it was built from."""

    def __init__(self, name: str) -> None:
        self.layer_names, self.kv_cache_spec = [name], None
        self.builder = SimpleNamespace(supports_update_block_table=False)
        self.kernel_block_size: int | None = 16

    def get_metadata_builder(self, ubatch_idx: int) -> Any:
        return self.builder

    def build_metadata(self, common: Any, ubatch_idx: int) -> Any:
        return common

    build_metadata_for_cudagraph_capture = build_metadata


def part_of(group: int, lengths: list[int], larger: bool) -> Any:
    """Layers that the V2 runner compresses together, in a batch whose first request has 300 tokens of text."""
    part: Any = object.__new__(Part)
    part.group, part.seq_lens = group, torch.tensor(lengths, dtype=torch.int32)
    part.compression, part.num_removed = SimpleNamespace(codes=torch.zeros(4)), np.array([300 - lengths[0], 0])
    part.kernel_table = torch.arange(32).view(4, 8) if larger else None
    return part


@pytest.mark.parametrize("num_parts, larger", [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("num_padding", [0, 2])
def test_the_v2_runner_gives_each_group_its_lengths(
    num_parts: int, real: bool, capture: bool, larger: bool, num_padding: int
) -> None:
    """Ours the physical ones, in a real batch; the others those of the text. Through vLLM's own code.

    Where the allocator's blocks are larger, our group gets the table of the kernels' blocks, not mapped again. A full
    graph may have been captured for more requests: the rows of padding have length 0.
    """
    padding = [0] * num_padding
    num_rows = 2 + num_padding
    state: Any = object.__new__(KvModelState)
    state.supports_mm_inputs, state.encoder_cache = False, None
    state.model_config = SimpleNamespace(max_model_len=512)
    state.parts = [part_of(1, [200, 90, 0, 0], larger), part_of(2, [150, 90, 0, 0], larger)][:num_parts]
    logical = torch.tensor([300, 90, *padding], dtype=torch.int32)
    starts = np.minimum(np.arange(num_rows + 1), 2).astype(np.int32)
    batch: Any = SimpleNamespace(
        num_reqs=2, num_tokens=2, num_reqs_after_padding=num_rows, num_tokens_after_padding=num_rows, max_query_len=1,
        query_start_loc_np=starts, query_start_loc=torch.from_numpy(starts),
        seq_lens=logical, seq_lens_cpu_upper_bound=logical.clone(), dcp_local_seq_lens=None,
        dcp_local_seq_lens_cpu_upper_bound=None, positions=None, is_prefilling_np=np.zeros(2, bool), prompt_lens=None,
        idx_mapping_np=np.arange(2), fast_prefill=None, num_scheduled_tokens=np.ones(2, np.int64), pcp=None,
    )  # fmt: skip
    state.prepared = batch if real else None
    tables = tuple(torch.full((num_rows, 4), i) for i in range(3))
    ours = Group("b")
    made = state.prepare_attn(
        batch, CUDAGraphMode.FULL if padding else CUDAGraphMode.NONE, tables, torch.zeros(3, num_rows),
        [[Group("a")], [ours], [Group("c")]], cache_config(WINDOW, FULL, WINDOW), capture,
    )  # fmt: skip
    assert set(made) == {"a", "b", "c"}
    expected = {"a": [300, 90], "b": [200, 90], "c": [150, 90] if num_parts == 2 else [300, 90]}
    for i, (name, physical) in enumerate(expected.items()):
        lengths = [*(physical if real else [300, 90]), *padding]
        common = made[name]
        assert common.num_reqs == num_rows
        assert common.seq_lens.tolist() == lengths == common.seq_lens_cpu_upper_bound.tolist()
        assert common.max_seq_len == (512 if capture else lengths[0])
        if larger and name == "b":
            assert torch.equal(common.block_table_tensor, state.parts[0].kernel_table[:num_rows])
            assert common.block_table_tensor.data_ptr() == state.parts[0].kernel_table.data_ptr()
            assert ours.kernel_block_size is None
        else:
            assert common.block_table_tensor is tables[i]
    # The address that a captured graph reads.
    assert (
        made["b"].seq_lens.data_ptr() == state.parts[0].seq_lens.data_ptr()
        and made["a"].seq_lens.data_ptr() == logical.data_ptr()
    )
    assert batch.seq_lens is logical
