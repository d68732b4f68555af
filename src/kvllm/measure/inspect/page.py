"""Render recorded events as one self-contained HTML page."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from kvllm.measure.inspect.record import Event


def page(
    tokens: Sequence[str], num_prompt_tokens: int, num_heads: int, events: Sequence[Event], about: Mapping[str, Any]
) -> str:
    """The page as HTML. num_heads: KV heads per layer; about: entries of the header, in order."""
    data = {
        "tokens": list(tokens),
        "numPrompt": num_prompt_tokens,
        "numHeads": num_heads,
        "about": {name: str(value) for name, value in about.items()},
        "events": [
            {
                "numTokens": event.num_tokens,
                "window": event.window,
                "numLayers": len(event.spans[0].heads),
                "spans": [
                    {"start": span.start, "heads": base64.b64encode(span.heads.numpy().tobytes()).decode()}
                    for span in event.spans
                ],
                "percentile": [round(float(p), 3) for p in event.percentile],
            }
            for event in events
        ],
    }
    packed = base64.b64encode(gzip.compress(json.dumps(data).encode(), mtime=0)).decode()
    return files("kvllm.measure.inspect").joinpath("page.html").read_text().replace("{{DATA}}", packed)
