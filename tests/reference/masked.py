"""The reference once more without a cache: stock attention over the whole text, with evicted tokens masked.

Every layer and head gets its own mask of what was still there when a token was computed, and each compression is
worked out from the text positions alone. Nothing of `kvllm.layout` or `kvllm.compression` is used.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from kvllm.methods.base import Method, Window
from kvllm.methods.rope import Rope


def masked_pass(model: PreTrainedModel, token_ids: list[int], visible: Tensor) -> tuple[Tensor, list[tuple]]:
    """Logits [num_tokens, vocab_size], and each layer's queries, keys and values, [num heads, num_tokens, head_dim].

    visible: [num_layers, num_kv_heads, num_tokens, num_tokens]
    """
    seen: list[tuple] = []

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        group_size = query.shape[1] // key.shape[1]
        mask = visible[module.layer_idx].repeat_interleave(group_size, dim=0)[None]
        seen.append((query[0], key[0], value[0]))
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register("kvllm_masked", attend)
    model.set_attn_implementation("kvllm_masked")
    try:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(before)
    return logits, seen


def masked_replay(
    model: PreTrainedModel,
    token_ids: list[int],
    protected_len: int,
    method: Method,
    num_candidates: int,
    num_kept: int,
    interval: int,
    buffer_size: int,
    query_span: int,
    query_stride: int,
    bounded: bool,
    history_limit: int = 0,
    history_kept: int = 0,
    prompt_budget: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits of the text under compression, the kept indices of each, and those of the prompt for each layer.

    bounded: False: each window of `num_candidates` tokens once; True: all generated tokens but the buffer, each time
    history_limit: > 0: where old windows would leave more than this, they and the new one shrink to `history_kept`
    prompt_budget: > 0: with the first compression a longer prompt shrinks to this
    """
    config = model.config
    heads, num_tokens = config.num_key_value_heads, len(token_ids)
    group_size, num_queries = config.num_attention_heads // heads, query_span // query_stride

    def ring_of(older: int, now: int) -> list[int]:
        """The token whose query each entry has, for a head that takes that many tokens before every stride's last."""
        stored = range(protected_len + query_stride - 1 - older, now, query_stride)
        # Entry i has the newest of the i-th, (i + n)-th, (i + 2n)-th, ... to be stored.
        return [max(p for i, p in enumerate(stored) if i % num_queries == entry) for entry in range(num_queries)]

    visible = torch.ones(config.num_hidden_layers, heads, num_tokens, num_tokens, dtype=torch.bool).tril()
    everything: list[Tensor] = []
    of_prompt: list[Tensor] = []
    for event, now in enumerate(range(protected_len + num_candidates + buffer_size, num_tokens, interval)):
        _, layers = masked_pass(model, token_ids[:now], visible[..., :now, :now])
        first = protected_len if bounded else protected_len + event * num_candidates
        expected, num_survivors = num_candidates, num_kept
        history = int(visible[0, 0, now - 1, protected_len:first].sum())
        if history_limit and history + num_kept > history_limit:
            first, expected, num_survivors = protected_len, history + num_candidates, history_kept
        rings = torch.tensor([ring_of(m * query_stride // group_size, now) for m in range(group_size)])
        assert rings.min() >= now - query_span and rings.max() == now - 1
        kept_of_layers = []
        for layer, (query, key, value) in enumerate(layers):
            alive = visible[layer, :, now - 1, first : now - buffer_size].clone()  # [num_kv_heads, candidates' range]
            positions = torch.stack([row.nonzero()[:, 0] + first for row in alive])
            assert positions.shape[1] == expected
            queries = torch.stack([query[head, rings[head % group_size]] for head in range(len(query))], dim=1)
            window = Window(
                queries=queries[None],
                query_positions=rings[0] - (now - buffer_size - expected),
                keys=torch.stack([key[h, positions[h]] for h in range(heads)], dim=1)[None],
                values=torch.stack([value[h, positions[h]] for h in range(heads)], dim=1)[None],
                positions=positions[None],
                layers=torch.tensor([layer]),
                query_shifts=rings[0, 0] - rings[:, 0],
                rope=Rope(model.model.rotary_emb.inv_freq.double()),
            )
            kept = method.compress(window, num_survivors).indices[0]
            for h in range(heads):
                evicted = sorted(set(positions[h].tolist()) - set(positions[h, kept[h]].tolist()))
                visible[layer, h, now:, evicted] = False
            kept_of_layers.append(kept)
            if event == 0 and 0 < prompt_budget < protected_len:
                whole = replace(
                    window,
                    query_positions=rings[0],
                    keys=key[:, :protected_len].transpose(0, 1)[None],
                    values=value[:, :protected_len].transpose(0, 1)[None],
                    positions=torch.arange(protected_len).expand(1, heads, -1),
                )
                kept = method.compress_prompt(whole, prompt_budget).indices[0]
                for h in range(heads):
                    visible[layer, h, now:, sorted(set(range(protected_len)) - set(kept[h].tolist()))] = False
                of_prompt.append(kept)
        everything.append(torch.stack(kept_of_layers))
    return masked_pass(model, token_ids, visible)[0], everything, of_prompt
