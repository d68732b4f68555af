"""Prompts with images: under M-RoPE an image takes fewer positions than tokens, and answers equal the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from kvllm.config import KvConfig
from kvllm.engine.stats import engine_stats
from kvllm.methods.triattention import save_statistics
from kvllm.reference import load_model
from tests.engine.conftest import BLOCK_SIZE, assert_pool_whole, engine, watch_blocks
from tests.models import IMAGE_PAD, VISION_END, VISION_START, VOCAB_SIZE, save_random_vision_model
from tests.near_ties import check_greedy

CONFIG = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5)
NUM_TOKENS = 200  # two windows
IMAGE = [VISION_START, IMAGE_PAD, VISION_END]


def text(num_tokens: int, seed: int) -> list[int]:
    return torch.randint(10, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def picture(width: int, height: int, seed: int) -> Any:
    from PIL import Image

    colours = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(colours.numpy())


def needs_torchvision() -> None:
    pytest.importorskip("torchvision", reason="vLLM's vision-language models import it", exc_type=ImportError)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_answers_about_images_equal_the_reference(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_torchvision()
    from transformers import AutoImageProcessor

    wide, tall = picture(224, 96, seed=1), picture(96, 160, seed=2)
    first = ([*text(20, seed=3), *IMAGE, *text(30, seed=4)], [wide])
    prompts = [
        (text(33, seed=1), []),
        first,
        ([*text(20, seed=3), *IMAGE, *text(30, seed=4)], [tall]),  # the same tokens until they are expanded
        ([*IMAGE, *text(9, seed=5), *IMAGE, *text(40, seed=6)], [tall, wide]),
    ]
    folder = save_random_vision_model(tmp_path, kind)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    # So few blocks that requests are preempted, and resumed with an image in their prompt; and chunked prefill.
    sizes: dict[str, Any] = dict(
        num_gpu_blocks_override=18, max_num_batched_tokens=96, max_num_seqs=4, max_model_len=512,
    )  # fmt: skip
    with engine(folder, CONFIG, mm_processor_cache_gb=0, **sizes) as llm:
        watch_blocks(llm, monkeypatch)
        inputs: list[Any] = [
            {"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})}
            for ids, images in prompts
        ]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        (again,) = llm.generate([inputs[1]], params, use_tqdm=False)
        stats = engine_stats(llm)
        assert_pool_whole(llm)
    assert again.num_cached_tokens >= BLOCK_SIZE  # of the image too
    assert stats["num_preemptions"] > 0 and stats["num_windows_compressed"] >= 2 * (len(prompts) + 1)
    reference, processor = load_model(folder), AutoImageProcessor.from_pretrained(folder)
    for (ids, images), output in zip([*prompts, first], [*outputs, again], strict=True):
        expanded = output.prompt_token_ids
        assert (len(expanded) > len(ids)) == bool(images)
        shown: dict[str, Tensor] | None = dict(processor(images, return_tensors="pt")) if images else None
        answer = list(output.outputs[0].token_ids)
        check_greedy(reference, expanded, answer, CONFIG, BLOCK_SIZE, images=shown)


def test_a_method_that_takes_angles_from_indices_is_refused(tmp_path: Path) -> None:
    needs_torchvision()
    from vllm.engine.arg_utils import EngineArgs

    folder, file = save_random_vision_model(tmp_path, "qwen2_5_vl"), str(tmp_path / "statistics")
    save_statistics(file, torch.randn(4, 4, 8, 64), torch.ones(32))
    options = {"method": "triattention", "method_options": {"statistics": file}}

    def start(**chosen: Any) -> Any:
        return EngineArgs(str(folder), dtype="float32", additional_config={"kvllm": options}, **chosen)

    with pytest.raises(
        ValueError, match="method=triattention: it computes the keys' angles.* or --language-model-only"
    ):
        start().create_engine_config()
    start(language_model_only=True).create_engine_config()
