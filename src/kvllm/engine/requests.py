"""Checks requests on arrival: one that cannot be served is refused before it is queued (with HTTP 400 by servers)."""

from __future__ import annotations

import copy
import difflib
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds

from kvllm.compression.blocks import peak_allocator_blocks
from kvllm.config import METHOD_KEY, RATIO_KEY, REQUEST_KEYS, USAGE_KEY
from kvllm.engine.settings import (
    Geometries,
    groups_of_engine,
    kv_config,
    num_late_events,
    request_method,
    request_ratio,
)
from kvllm.engine.usage import Watch
from kvllm.errors import UsageError
from kvllm.layout import RequestGeometry, ceil_div, most_that_fits

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

logger = init_logger(f"vllm.{__name__}")  # below "vllm", which has the handlers

_SMALLEST_POOL = "kvllm_smallest_pool"  # attribute of vLLM's CacheConfig


def check_engine_request(processor: InputProcessor, request: EngineCoreRequest) -> None:
    """Check a request that `processor` has just built, and cap its `max_tokens` if the client left it out.

    Raises VLLMValidationError, with the parameter at fault, for a request that cannot be served.
    """
    params = request.sampling_params
    if params is None or kv_config(processor.vllm_config) is None:
        return
    check = vars(processor).get("kvllm_check")
    if check is None:  # the first request: the engine has started, and its block size is final
        check = vars(processor)["kvllm_check"] = RequestCheck(processor.vllm_config)
    request.sampling_params = check(request, params)


def note_front_end(engine: AsyncLLM) -> None:
    """Give a server's output processor what `watch_request` needs: the request check, and whether to log requests."""
    if (check := vars(engine.input_processor).get("kvllm_check")) is not None:
        vars(engine.output_processor)["kvllm_front_end"] = (check, engine.log_requests)


def watch_request(processor: OutputProcessor, request: EngineCoreRequest, queue: RequestOutputCollector) -> None:
    """Record what the server needs when the request ends, to count what was kept."""
    params, front_end = request.sampling_params, vars(processor).get("kvllm_front_end")
    if params is not None and front_end is not None:
        check, log = front_end
        ratio = check.config.nearest_ratio(request_ratio(check.config, params))
        method = request_method(check.config, params) if check.config.request_methods else None
        vars(queue)["kvllm_watch"] = Watch(check.geometries.of_ratio(ratio), ratio, log, method)


def note_beam_search(vllm_config: VllmConfig, params: object) -> None:
    """Warn, once, that beam search is not compressed."""
    if isinstance(params, BeamSearchParams) and kv_config(vllm_config) is not None:
        logger.warning_once(
            "KvLLM: beam search is not compressed, because vLLM runs each of its steps as a new request for one token "
            "with the whole text as its prompt. Sampling (n > 1) is compressed."
        )


def note_pool(cache_config: CacheConfig, num_blocks: int) -> None:
    """Remember the smallest pool among the engines of a client; vLLM keeps only the sum of their `num_blocks`."""
    smallest = getattr(cache_config, _SMALLEST_POOL, num_blocks)
    setattr(cache_config, _SMALLEST_POOL, min(smallest, num_blocks))


def usable_blocks(cache_config: CacheConfig) -> int:
    """Blocks that one request can have on any engine: the pool without its null block; 0 if the pool is not known."""
    # An engine in this process does not report its pool; `num_gpu_blocks` is then its own.
    num_blocks = getattr(cache_config, _SMALLEST_POOL, None) or cache_config.num_gpu_blocks or 0
    return max(num_blocks - 1, 0)


class RequestCheck:
    """Checks the requests of one front end."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = kv_config(vllm_config)
        assert config is not None
        self.config = config
        self.vllm_config = vllm_config
        self.geometries = Geometries.of_engine(vllm_config)
        self.groups = groups_of_engine(vllm_config)
        self.block_size = vllm_config.cache_config.block_size * self.groups.scale  # of the compressed layers
        # vLLM's defaults for a max_tokens that was left out: the model's, or that of SamplingParams and
        # /v1/completions. (Elsewhere it is all that max_model_len allows.)
        self.default_max_tokens = {
            SamplingParams().max_tokens, vllm_config.model_config.get_diff_sampling_param().get("max_tokens"),
        }  # fmt: skip

    def __call__(self, request: EngineCoreRequest, params: SamplingParams) -> SamplingParams:
        """The parameters to run the request with: `params`, or a copy with a lower `max_tokens`."""
        self._check_names(params)
        self._check_method(params)
        geometry = self._geometry(params)
        num_blocks = usable_blocks(self.vllm_config.cache_config)
        if request.resumable:
            self._check_resumable(geometry, num_blocks)
        if not num_blocks:
            return params
        num_prompt_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        return self._fit(params, geometry, num_prompt_tokens, num_blocks)

    @staticmethod
    def _check_names(params: SamplingParams) -> None:
        """Refuse misspelt names of our parameters, which would have no effect."""
        extra = params.extra_args or {}
        for name in extra:
            if name not in REQUEST_KEYS and (meant := difflib.get_close_matches(str(name), REQUEST_KEYS, 1, 0.8)):
                raise VLLMValidationError(f"no parameter named {name!r}; did you mean {meant[0]!r}?", parameter=name)
        if (wanted := extra.get(USAGE_KEY, False)) not in (0, 1):
            raise VLLMValidationError(f"{USAGE_KEY}={wanted!r}: must be true or false.", parameter=USAGE_KEY)

    def _check_method(self, params: SamplingParams) -> None:
        try:
            method = request_method(self.config, params)
        except UsageError as e:
            raise VLLMValidationError(str(e), parameter=METHOD_KEY) from e
        own, *others = self.config.methods
        if method not in (own, *others):
            allowed = ", ".join((own, *others)) if others else f"only its own method, {own}"
            raise VLLMValidationError(
                f"{METHOD_KEY}={method[:50]!r}: this server allows {allowed}. Leave {METHOD_KEY} out to use the "
                "server's own method; its operator can allow others with --request-methods.",
                parameter=METHOD_KEY,
            )

    def _geometry(self, params: SamplingParams) -> RequestGeometry | None:
        try:
            ratio = request_ratio(self.config, params)
            if not self.config.allows_ratio(ratio):
                raise UsageError(
                    f"{RATIO_KEY}={ratio}: this server allows {self._allowed()}. Leave {RATIO_KEY} out to use the "
                    "server's own ratio; its operator can allow others with --request-ratios."
                )
            return self.geometries.of_ratio(ratio)
        except UsageError as e:
            raise VLLMValidationError(str(e), parameter=RATIO_KEY) from e

    def _allowed(self) -> str:
        (own, _), *others = self.config.request_ratio_ranges
        if not others:
            return f"only its own ratio, {own}"
        return ", ".join([f"{own}", *(str(low) if low == high else f"{low}-{high}" for low, high in others)])

    def _check_resumable(self, geometry: RequestGeometry | None, num_blocks: int) -> None:
        """Check a streaming input session, whose prompt length is not known when it starts."""
        if geometry is not None:
            remedy = f"send the request with {RATIO_KEY}=1.0"
            if not self.config.allows_ratio(1.0):
                remedy += ", which the server's operator must first allow with --request-ratios 1.0"
            raise VLLMValidationError(f"streaming input sessions cannot be compressed; {remedy}", parameter="resumable")
        max_model_len = self.vllm_config.model_config.max_model_len
        if num_blocks and self._peak_blocks(None, 0, max_model_len) > num_blocks:
            most = self._max_tokens_that_fit(None, 0, num_blocks)
            raise VLLMValidationError(
                f"a streaming input session is not compressed and may grow to max_model_len={max_model_len} tokens, "
                f"but the KV cache holds only {most}; start the server with a --max-model-len of at most {most}, or "
                "with a larger KV cache",
                parameter="resumable",
            )

    def _fit(
        self, params: SamplingParams, geometry: RequestGeometry | None, num_prompt_tokens: int, num_blocks: int
    ) -> SamplingParams:
        """Cap or refuse a request that could not finish even if it had all `num_blocks` blocks of the pool."""
        max_model_len = self.vllm_config.model_config.max_model_len
        max_generated = max_model_len - num_prompt_tokens
        max_tokens = min(params.max_tokens or max_generated, max_generated)
        needed = self._peak_blocks(geometry, num_prompt_tokens, max_tokens)
        if needed <= num_blocks:
            return params
        most = self._max_tokens_that_fit(geometry, num_prompt_tokens, num_blocks)
        if most < 1:
            # Nothing is compressed before the first token, whatever the ratio.
            capacity = self._max_tokens_that_fit(None, 0, num_blocks)
            raise VLLMValidationError(
                f"a prompt of {num_prompt_tokens} tokens does not fit: prompt and first generated token must fit in "
                f"the KV cache, which holds {capacity} tokens; use a prompt of at most {capacity - 1} tokens, or start "
                "the server with a larger KV cache (--gpu-memory-utilization, --kv-cache-memory-bytes)",
                parameter="input_tokens",  # as vLLM calls it when it refuses prompts beyond max_model_len
            )
        # vLLM has already filled in a max_tokens that was left out. So a client that asks for all that max_model_len
        # allows, or for exactly a default, cannot be told apart from one that left it out.
        if max_tokens == max_generated or max_tokens in self.default_max_tokens:
            if params.min_tokens > most:
                other = self._other_ratio(num_prompt_tokens, params.min_tokens, num_blocks)
                raise VLLMValidationError(
                    f"min_tokens={params.min_tokens}: with a prompt of {num_prompt_tokens} tokens at most {most} more "
                    f"fit in the KV cache; use a min_tokens of at most {most}{other}",
                    parameter="min_tokens",
                )
            capped = copy.copy(params)  # the caller may reuse the original for other prompts
            capped.max_tokens = most
            return capped
        remedy = f"Use a max_tokens of at most {most}{self._other_ratio(num_prompt_tokens, max_tokens, num_blocks)}."
        if geometry is not None and geometry.prompt_shape(num_prompt_tokens):
            due = geometry.event_at(num_prompt_tokens, 0)
            if num_prompt_tokens + most < due:
                raise VLLMValidationError(
                    f"prefix_budget_exhausted: a prompt of {num_prompt_tokens} tokens is cut to "
                    f"prompt_budget={geometry.prompt_budget} after {due - num_prompt_tokens} generated tokens, and "
                    f"until then the request needs {self._peak_blocks(None, 0, due)} KV blocks, but the pool has "
                    f"{num_blocks}. {remedy} A shorter prompt helps too.",
                    parameter="max_tokens",
                )
        raise VLLMValidationError(
            f"max_tokens={max_tokens}: with a prompt of {num_prompt_tokens} tokens this request needs {needed} KV "
            f"blocks at its peak, but the pool has {num_blocks}. {remedy}",
            parameter="max_tokens",
        )

    def _peak_blocks(self, geometry: RequestGeometry | None, num_prompt_tokens: int, num_generated: int) -> int:
        """The most blocks of all KV cache groups that the request can hold, as the scheduler admits it."""
        total = num_prompt_tokens + num_generated
        return self._own_blocks(geometry, num_prompt_tokens, total) + self._local_blocks(total)

    def _own_blocks(self, geometry: RequestGeometry | None, num_prompt_tokens: int, num_tokens: int) -> int:
        """`_peak_blocks` of the compressed groups."""
        if geometry is None:
            return self.groups.num_full * ceil_div(num_tokens, self.block_size)
        late = num_late_events(self.vllm_config)
        return sum(
            peak_allocator_blocks(group, num_prompt_tokens, num_tokens, self.block_size, late)
            for group in geometry.groups
        )

    def _local_blocks(self, num_tokens: int) -> int:
        if self.groups.local is None:
            return 0
        return self.groups.local_blocks(num_tokens, self.block_size, self.vllm_config.max_in_flight_tokens)

    def _max_tokens_that_fit(self, geometry: RequestGeometry | None, num_prompt_tokens: int, num_blocks: int) -> int:
        """The most tokens that the request can generate; 0 or less if not even one."""
        if geometry is not None:
            fitting = geometry.max_tokens_that_fit(
                num_prompt_tokens, num_blocks, self._local_blocks,
                lambda num_tokens: self._own_blocks(geometry, num_prompt_tokens, num_tokens),
            )  # fmt: skip
            return fitting - num_prompt_tokens
        full = self.groups.num_full
        whole = most_that_fits(lambda n: full * n + self._local_blocks(n * self.block_size), 0, num_blocks)
        return whole * self.block_size - num_prompt_tokens

    def _other_ratio(self, num_prompt_tokens: int, num_generated: int, num_blocks: int) -> str:
        """A further remedy: the highest allowed ratio with which the request would fit; "" if there is none."""
        for ratio in sorted(self.config.all_ratios, reverse=True):
            geometry = self.geometries.of_ratio(ratio)
            if self._peak_blocks(geometry, num_prompt_tokens, num_generated) <= num_blocks:
                return f", or {RATIO_KEY}={ratio}"
        return ""
