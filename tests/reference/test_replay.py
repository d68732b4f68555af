from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.reference import Request, compare, generate, kl_by_row, replay
from tests.reference.models import FAMILIES, text, tiny_model

WINDOW = KvConfig(window_size=32, buffer_size=12, query_stride=4, retention_ratio=0.5)
BUDGET = KvConfig(policy="budget", budget_size=32, budget_interval=16, window_size=32, buffer_size=12, query_stride=4)
# Float32 matmuls of another shape, through two layers.
CLOSE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config, num_events", [(None, 0), (WINDOW, 3), (BUDGET, 5)], ids=["full", "window", "budget"])
def test_replay_equals_generation_token_by_token(family, config, num_events):
    model, prompt = tiny_model(family), text(21)
    generated = generate(model, prompt, 150, config)
    assert min(generated.margins) > CLOSE  # no near tie that a rounding could turn
    result = replay(model, prompt + generated.token_ids, 21, config, keep_full=True)

    assert result.argmax[20:].tolist() == generated.token_ids
    assert len(result.kept) == len(generated.kept) == num_events
    for mine, theirs in zip(result.kept, generated.kept, strict=True):
        assert torch.equal(mine, theirs)
    request = Request(model, 21, config)
    steps = [request.step(prompt)] + [request.step([token]) for token in generated.token_ids[:-1]]
    expected = torch.cat(steps).log_softmax(dim=-1)
    torch.testing.assert_close(result.full_logprobs, expected, rtol=CLOSE, atol=CLOSE)
    following = torch.tensor(prompt[1:] + generated.token_ids)
    torch.testing.assert_close(result.logprobs, expected[torch.arange(170), following], rtol=CLOSE, atol=CLOSE)


def test_the_full_replay_gives_the_log_probabilities_of_transformers():
    model, token_ids = tiny_model("llama"), text(50)
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(dim=-1)
    result = replay(model, token_ids, 10)
    assert result.full_logprobs is None
    torch.testing.assert_close(
        result.logprobs, expected[torch.arange(49), torch.tensor(token_ids[1:])], rtol=CLOSE, atol=CLOSE
    )
    assert torch.equal(result.argmax, expected.argmax(dim=-1))


def test_compare_equals_the_definitions():
    model, token_ids = tiny_model("qwen3"), text(150)
    full = replay(model, token_ids, 21, keep_full=True)
    compressed = replay(model, token_ids, 21, WINDOW, keep_full=True)
    assert full.full_logprobs is not None and compressed.full_logprobs is not None
    first = 32 + 32 + 12
    result = compare(full, compressed, first)
    p, q = full.full_logprobs[first:].double(), compressed.full_logprobs[first:].double()
    assert result.num_tokens == 149 - first
    assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(dim=1).mean()), rel=1e-4)
    assert result.kl > 1e-4
    assert result.top1_agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    rows, following = torch.arange(len(p)), torch.tensor(token_ids[first + 1 :])
    assert result.delta_nll == pytest.approx(float((p - q)[rows, following].mean()), abs=1e-5)
    assert kl_by_row(full, compressed)[:first].abs().max() < 1e-5  # nothing differs before the first event


def test_a_text_equals_itself():
    full = replay(tiny_model("llama"), text(60), 10, keep_full=True)
    result = compare(full, full, 0)
    assert (result.kl, result.top1_agreement, result.delta_nll) == (0.0, 1.0, 0.0)


def test_more_is_lost_where_less_is_kept():
    model, token_ids = tiny_model("llama"), text(300)
    full = replay(model, token_ids, 16, keep_full=True)
    losses = []
    for ratio in (0.25, 0.5, 0.75):
        config = replace(WINDOW, window_size=64, retention_ratio=ratio)
        losses.append(compare(full, replay(model, token_ids, 16, config, keep_full=True), 16 + 64 + 12).kl)
    assert losses[0] > losses[1] > losses[2] > 0


def test_bad_arguments_are_refused():
    model = tiny_model("llama")
    for num_prompt_tokens in (0, 10):
        with pytest.raises(
            ValueError, match=f"num_prompt_tokens={num_prompt_tokens}: must be 1 to 9 for a text of 10 tokens"
        ):
            replay(model, text(10), num_prompt_tokens)
    short, long = (replay(model, text(n), 4, keep_full=True) for n in (10, 12))
    with pytest.raises(ValueError, match="first=9: the replay has rows 0 to 8"):
        compare(short, short, 9)
    with pytest.raises(ValueError, match="replays of different texts"):
        compare(short, long, 0)
    with pytest.raises(ValueError, match="keep_full=True"):
        compare(replay(model, text(10), 4), short, 0)
