"""Messages between the demo and its worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvllm.layout import ceil_div
from kvllm.measure.bench.spec import STOCK, BenchSpec

BLOCK_SIZE = 32  # the block size that vLLM's CPU attention is optimised for
PROMPT_LEN = 96  # at most, chat template included
TOPICS = (
    "how a computer adds two numbers",
    "how rain forms",
    "why the sky is blue",
    "how to bake bread",
    "how a bicycle stays upright",
    "how vaccines work",
    "how to sort a list of names",
    "why ships float",
    "how a piano makes sound",
    "how to plan a garden",
    "why we have seasons",
    "how to learn a language",
)
QUESTION = "Explain step by step and in great detail, with many examples: {}."


@dataclass(frozen=True)
class Job:
    """options: fields of KvConfig"""

    model: str
    num_requests: int
    output_len: int
    num_fitting: int  # requests that the KV pool holds uncompressed
    options: Mapping[str, Any]

    @property
    def num_blocks(self) -> int:
        """Of the pool."""
        return self.num_fitting * ceil_div(PROMPT_LEN + self.output_len, BLOCK_SIZE)

    def prompts(self) -> list[str]:
        return [QUESTION.format(TOPICS[i % len(TOPICS)]) for i in range(self.num_requests)]

    def spec(self) -> BenchSpec:
        """EngineArgs; eager, since torch.compile needs a C++ compiler."""
        return BenchSpec(
            model=self.model,
            config=[STOCK],
            concurrency=[self.num_requests],
            prompt_len=PROMPT_LEN,
            output_len=self.output_len,
            num_gpu_blocks=self.num_blocks + 1,  # one is the null block
            block_size=BLOCK_SIZE,
            enforce_eager=True,
            engine_args={"distributed_executor_backend": "uni"},
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Status:
    """State of a run at one moment."""

    seconds: float = 0.0
    finished: int = 0
    running: int = 0
    blocks: int = 0  # of the KV pool, in use
    preempted: int = 0  # so far


@dataclass(frozen=True)
class Outcome:
    """Result of a run. history: ten entries per second; mean_running: weighted by step time"""

    history: list[Status]
    seconds: float
    num_requests: int
    preempted: int
    peak_blocks: int
    mean_running: float

    @property
    def per_minute(self) -> float:
        return 60 * self.num_requests / self.seconds


@dataclass(frozen=True)
class Agreement:
    """How often compressed and full cache predict the same next token of the same text.

    ours, random: shares of `num_tokens`, all after the first compression
    """

    method: str
    ours: float
    random: float
    num_tokens: int
