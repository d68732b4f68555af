"""Engines that answer questions: vLLM in this process, or any OpenAI-compatible endpoint."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console

from kvllm.cli.offline import start_llm
from kvllm.config import RATIO_KEY
from kvllm.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, with vLLM's names. seed: each request's seed is derived from it; None: the engine's seed"""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None = None


@dataclass(frozen=True)
class Exchange:
    """An earlier exchange in the chat that shows the required format."""

    asked: str
    answered: str


@dataclass(frozen=True)
class Question:
    """ratio: the request's own retention ratio; None: leave it to the engine. seed: of this request."""

    prompt: str
    ratio: float | None
    seed: int | None
    examples: tuple[Exchange, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat, the examples first."""
        told = [(("user", each.asked), ("assistant", each.answered)) for each in self.examples]
        turns = [turn for pair in told for turn in pair]
        return [{"role": role, "content": text} for role, text in (*turns, ("user", self.prompt))]

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The prompt by the model's chat template, or as plain paragraphs if it has none."""
        if getattr(tokenizer, "chat_template", None) is None:
            return list(tokenizer.encode("\n\n".join(message["content"] for message in self.messages)))
        text = tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class Completion:
    text: str
    num_tokens: int
    finish_reason: str


class Engine(Protocol):
    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        """Yields each question's index and answer, in the order in which they finish."""

    def close(self) -> None:
        """Free all resources, so that another engine can start."""


class VllmEngine:
    """vLLM with `options`, fields of KvConfig (None: stock), from MODEL and any of vLLM's engine flags."""

    def __init__(self, arguments: Sequence[str], options: Mapping[str, Any] | None, sampling: Sampling) -> None:
        # A process of its own: one engine follows another, and the GPU's memory is free when a process ends.
        self.llm = start_llm(arguments, options, Console(stderr=True), in_process=False)
        self.stock = options is None
        self.sampling = sampling

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, tokenizer = self.llm.llm_engine, self.llm.get_tokenizer()
        for i, question in enumerate(questions):
            if self.stock and question.ratio not in (None, 1.0):
                raise UsageError(f"retention ratio {question.ratio}: this engine is stock vLLM.")
            extra = None if self.stock or question.ratio is None else {RATIO_KEY: question.ratio}
            params = SamplingParams(
                max_tokens=self.sampling.max_tokens,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                seed=question.seed,
                extra_args=extra,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(i), {"prompt_token_ids": question.token_ids(tokenizer)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    made = output.outputs[0]
                    yield int(output.request_id), Completion(made.text, len(made.token_ids), str(made.finish_reason))

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


class Endpoint:
    """A server that speaks OpenAI's chat completions, such as `kvllm serve`."""

    def __init__(self, url: str, model: str, sampling: Sampling, concurrency: int, api_key: str | None = None) -> None:
        from openai import OpenAI

        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = OpenAI(base_url=url, api_key=key, timeout=24 * 3600)
        self.model, self.sampling, self.concurrency = model, sampling, concurrency

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(self._ask, question): i for i, question in enumerate(questions)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: Question) -> Completion:
        body: dict[str, Any] = {}
        if question.ratio is not None:
            body["vllm_xargs"] = {RATIO_KEY: question.ratio}
        response = self.client.chat.completions.create(
            model=self.model,
            messages=question.messages,  # type: ignore[arg-type]
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=question.seed,
            extra_body=body,
        )
        choice = response.choices[0]
        message = choice.message
        # Reasoning parsers return thoughts separately; `usage` counts all tokens.
        thoughts = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""
        if response.usage is None:
            raise UsageError(
                f"{self.client.base_url} does not report `usage`, which is needed for the answer's length."
            )
        text = thoughts + (message.content or "")
        return Completion(text, response.usage.completion_tokens, str(choice.finish_reason))

    def close(self) -> None:
        self.client.close()
