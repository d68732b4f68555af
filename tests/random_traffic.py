"""Requests that arrive, end and are aborted at random, through an engine's own steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any


def run_traffic(
    engine: Any,
    prompts: Mapping[str, list[int]],
    lengths: Mapping[str, int],
    rng: random.Random,
    arrivals: Callable[[int, int], int],
    abort_chance: float,
    **sampling: Any,
) -> tuple[dict[str, list[int]], set[str]]:
    """Serve every prompt, the last first: the answers of those that finished, and the ids of those that were aborted.

    lengths:  tokens that each request generates
    arrivals: how many more requests arrive before a step, by those that wait and those that run
    """
    from vllm import SamplingParams

    waiting, outputs = list(prompts), {}
    running: set[str] = set()
    aborted: set[str] = set()
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(arrivals(len(waiting), len(running)), len(waiting))):
            i = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=lengths[i], ignore_eos=True, **sampling)
            engine.add_request(i, {"prompt_token_ids": prompts[i]}, params)
            running.add(i)
        if running and rng.random() < abort_chance:
            i = rng.choice(sorted(running))
            engine.abort_request([i])
            aborted.add(i)
            running.discard(i)
        for output in engine.step():
            if output.finished:
                running.discard(output.request_id)
                outputs[output.request_id] = list(output.outputs[0].token_ids)
    return outputs, aborted
