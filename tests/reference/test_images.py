"""Prompts with images in the reference: as transformers computes them, and how M-RoPE counts behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.methods import triattention
from kvllm.reference import Request, feed
from kvllm.reference.rope import rope_of
from tests.models import IMAGE_PAD, VISION_END, VISION_START, random_vision_model

KINDS = ["qwen2_5_vl", "qwen3_vl"]
GRID = (1, 6, 14)  # time, height, width in patches, of which four are a token
NUM_IMAGE_TOKENS = 21
SHIFT = 7 - NUM_IMAGE_TOKENS  # positions advance by the longest side


def prompt(model: Any) -> tuple[list[int], dict[str, Tensor]]:
    vision, generator = model.config.vision_config, torch.Generator().manual_seed(0)
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(GRID[0] * GRID[1] * GRID[2], size, generator=generator)
    ids = [20, 21, 22, VISION_START, *[IMAGE_PAD] * NUM_IMAGE_TOKENS, VISION_END, *range(30, 50)]
    return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([GRID])}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_transformers(kind: str) -> None:
    model = random_vision_model(kind)
    ids, images = prompt(model)
    inputs = torch.tensor([ids])
    generated = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), mm_token_type_ids=(inputs == IMAGE_PAD).int(),
        max_new_tokens=24, do_sample=False, **images,
    )[0].tolist()  # fmt: skip
    request = Request(model, len(ids))
    request.show(ids, images)
    assert feed(request, generated).argmax[len(ids) - 1 :].tolist() == generated[len(ids) :]
    without = feed(Request(model, len(ids)), generated).argmax[len(ids) - 1 :]
    assert without.tolist() != generated[len(ids) :]


@pytest.mark.parametrize("kind", KINDS)
def test_behind_an_image_positions_advance_by_one_a_token(kind: str) -> None:
    """So looking ahead, which rotates queries by differences of indices, is right there too.

    In the first layer a token's query depends on nothing but its position.
    """
    model = random_vision_model(kind)
    ids, images = prompt(model)
    rope = rope_of(model)
    assert rope is not None
    queries = []
    for shown in (images, None):
        request = Request(model, len(ids), max_queries=5)
        if shown is not None:
            request.show(ids, shown)
        request.step(ids)
        request.step([60, 61, 62, 63, 60])
        queries.append(request.layers[0].queries)
    behind, plain = queries
    head_dim = behind.shape[-1]
    four, shift = (rope.rotation(torch.tensor([n]), head_dim) for n in (4, SHIFT))
    torch.testing.assert_close(four.apply(behind[0]), behind[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift.apply(plain), behind, rtol=1e-4, atol=1e-4)


def test_images_belong_to_the_prompt_s_one_step() -> None:
    model = random_vision_model("qwen2_5_vl")
    ids, images = prompt(model)
    request = Request(model, len(ids))
    with pytest.raises(ValueError, match="must be the whole prompt, before the first step"):
        request.show(ids[:-1], images)
    request.show(ids, images)
    assert request.max_step() == len(ids)
    with pytest.raises(ValueError, match=f"first step must be the prompt's {len(ids)}"):
        request.step(ids[:10])


def test_a_method_that_takes_angles_from_indices_is_refused(tmp_path: Any) -> None:
    model = random_vision_model("qwen2_5_vl")
    ids, images = prompt(model)
    file = str(tmp_path / "statistics.safetensors")
    triattention.save_statistics(file, torch.randn(4, 4, 8, 64), torch.ones(32))
    for config in (
        KvConfig(method="triattention", method_options={"statistics": file}),
        KvConfig(method="cask", method_options={"base": "triattention", "base_options": {"statistics": file}}),
    ):
        request = Request(model, len(ids), config)
        with pytest.raises(UsageError, match=f"method={config.method}: it computes the keys' angles .*another method"):
            request.show(ids, images)
