"""Images in a prompt: the further inputs of a transformers vision-language model, and the tokens' M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvllm.errors import UsageError


class PromptImages:
    """The images of one prompt, whose placeholders are expanded to one token per embedding.

    inputs: the output of the model's image processor, including pixel_values and image_grid_thw

    M-RoPE gives an image fewer positions than tokens, so the position of a token after the images is its index plus
    `shift`.
    """

    def __init__(self, model: PreTrainedModel, prompt_ids: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
        find: Any = getattr(model.base_model, "get_rope_index", None)
        if find is None:
            raise UsageError(f"{type(model).__name__}: the reference supports images only for models with M-RoPE.")
        token_ids = torch.tensor([list(prompt_ids)], device=model.device)
        is_image = token_ids == model.config.image_token_id
        self.inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        self.inputs["mm_token_type_ids"] = is_image.int()
        found, shift = find(token_ids, self.inputs["mm_token_type_ids"], self.inputs["image_grid_thw"])
        self.prompt_positions: Tensor = found  # [3, 1, num_prompt_tokens]: time, height, width
        self.shift = int(shift)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens; the whole prompt is one step."""
        return self.prompt_positions.shape[-1]

    def step_inputs(self, first: int, end: int) -> dict[str, Tensor]:
        """The model's inputs for tokens [first, end), besides their ids."""
        if first == 0:
            if end != self.num_tokens:
                raise ValueError(f"a step of {end} tokens: the first step must be the prompt's {self.num_tokens}.")
            return self.inputs | {"position_ids": self.prompt_positions}
        positions = torch.arange(first, end, device=self.prompt_positions.device) + self.shift
        return {"position_ids": positions.expand(3, 1, -1)}
