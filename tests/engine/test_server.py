"""A server started by `kvllm serve` answers OpenAI's client, and vLLM's own metrics show the prefix cache at work."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server import POOL, Server, metric

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]


@pytest.fixture
def log(server: Server) -> Path:
    return server.log


@pytest.fixture
def base_url(server: Server) -> str:
    return server.url


@pytest.fixture
def client(base_url: str) -> Any:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=300)


def test_chat_completion_and_streaming(client: Any) -> None:
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    chat = client.chat.completions.create(model="small", messages=messages, max_tokens=150, temperature=0)
    assert len(chat.choices[0].message.content) > 20
    plain = client.completions.create(
        model="small", prompt="Count: one, two, three,", max_tokens=200, temperature=0, extra_body={"ignore_eos": True}
    )
    assert plain.usage.completion_tokens == 200
    stream = client.completions.create(
        model="small", prompt="Count: one, two, three,", max_tokens=200, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text


def test_the_example_of_ratios_runs(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import request_ratios

    compressed, full = (request_ratios.ask(client, "small", "Why?", ratio, max_tokens=140) for ratio in (0.5, 1.0))
    assert compressed["compressions"] == 1 and compressed["evicted_tokens"] == 32
    assert full["compressions"] == full["evicted_tokens"] == 0


def test_sixteen_at_once_with_an_abort_midway_and_prefix_hits(client: Any, base_url: str) -> None:
    prompt = "A long shared introduction. " * 30
    client.completions.create(model="small", prompt=prompt, max_tokens=1)
    hits = metric(base_url, "vllm:prefix_cache_hits_total")

    def ask(i: int) -> int:
        body = {"ignore_eos": True, "vllm_xargs": {"kv_retention_ratio": (0.5, 1.0)[i % 2]}}
        if i == 3:  # leaves in the middle
            stream = client.completions.create(
                model="small", prompt=prompt, max_tokens=200, stream=True, extra_body=body
            )
            next(iter(stream))
            stream.close()
            return 0
        answer = client.completions.create(model="small", prompt=f"{prompt}{i}", max_tokens=160, extra_body=body)
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(ask, range(16)))
    assert counts == [0 if i == 3 else 160 for i in range(16)]
    assert metric(base_url, "vllm:prefix_cache_hits_total") > hits
    deadline = time.monotonic() + 60
    while metric(base_url, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert metric(base_url, "vllm:num_requests_running") == 0
    assert metric(base_url, "vllm:kv_cache_usage_perc") == 0


def test_compression_shows_in_the_metrics(client: Any, base_url: str) -> None:
    """200 tokens after a prompt of one block: windows of 64 close 96 and 160 tokens after it."""
    names = ("windows_compressed", "kv_tokens_kept", "kv_tokens_evicted", "kv_blocks_returned", "compression_seconds")
    before = {name: metric(base_url, f"kvllm:{name}_total") for name in names}
    client.completions.create(model="small", prompt="Hello", max_tokens=200, extra_body={"ignore_eos": True})
    added = {name: metric(base_url, f"kvllm:{name}_total") - value for name, value in before.items()}
    assert 0 < added.pop("compression_seconds") < 60
    assert added == {
        "windows_compressed": 2, "kv_tokens_kept": 64, "kv_tokens_evicted": 64, "kv_blocks_returned": 2,
    }  # fmt: skip
    assert metric(base_url, "kvllm:query_bank_rows") == 16
    assert metric(base_url, "kvllm:kv_tokens_logical") == 0 and metric(base_url, "kvllm:effective_retention") == 1


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("retention_ratio", 1.5, r"kv_retention_ratio=1.5: .*in \(0, 1\]"),
        ("retention_ratio", "0.5", r"kv_retention_ratio='0.5': must be a number in \(0, 1\], not a string\."),
        (
            "retention_ratio",
            0.2,
            r"kv_retention_ratio=0.2: this server allows 0.5, 0.5-0.75, 1.0. Leave .*--request-rat",
        ),
        ("method", 5, r"kv_method=5: must be a string, not an integer\."),
        (
            "method",
            "keydiff",
            r"kv_method='keydiff': this server allows kara, random. Leave .* out .*--request-methods",
        ),
    ],
)
def test_a_bad_choice_is_a_bad_request(client: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.completions.create(
            model="small", prompt="Hello", max_tokens=4, extra_body={"vllm_xargs": {f"kv_{name}": value}}
        )
    assert error.value.param == f"kv_{name}"


def test_usage_says_what_was_kept_when_asked(client: Any) -> None:
    """Two answers of 132 tokens: each compresses one window of 64 tokens, 96 tokens after the prompt's blocks."""

    def usage_of(api: str, stream: bool) -> Any:
        body = {"ignore_eos": True, "vllm_xargs": {"kv_usage": True}}
        create = client.completions.create if api == "completions" else client.chat.completions.create
        text = {"prompt": "Hello"} if api == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = create(model="small", max_tokens=132, n=2, extra_body=body, **text, **options)
        return [*answer][-1].usage if stream else answer.usage

    cases = [(api, stream) for api in ("chat", "completions") for stream in (False, True)]
    with ThreadPoolExecutor(len(cases)) as pool:
        for case, usage in zip(cases, pool.map(lambda case: usage_of(*case), cases), strict=True):
            assert usage.completion_tokens == 264
            computed = 2 * usage.prompt_tokens + 264 - 2
            expected = {"kept_tokens": computed - 64, "evicted_tokens": 64, "compressions": 2}
            assert usage.kv_cache == expected, case


def test_usage_does_not_mention_it_unless_asked(client: Any) -> None:
    answer = client.completions.create(model="small", prompt="Hello", max_tokens=4)
    assert not hasattr(answer.usage, "kv_cache")


def test_each_answer_is_logged_on_demand(client: Any, log: Path) -> None:
    body = {"ignore_eos": True, "request_id": "logged", "vllm_xargs": {"kv_method": "random"}}
    answer = client.completions.create(model="small", prompt="Hello", max_tokens=140, extra_body=body)
    assert answer.id == "cmpl-logged"
    (line,) = [line for line in log.read_text().splitlines() if "KvLLM: request cmpl-logged" in line]
    assert "140 generated, kv_retention_ratio=0.5, kv_method=random: 108 KV tokens kept, 32 evicted in 1 comp" in line


@pytest.mark.parametrize(
    "body, parameter, message",
    [
        ({"vllm_xargs": {"kv_retention": 0.5}}, "kv_retention", "did you mean 'kv_retention_ratio'"),
        ({"vllm_xargs": {"kv_usage": "yes"}}, "kv_usage", "kv_usage='yes': must be true or false"),
        ({"kv_retention_ratio": 0.5}, "kv_retention_ratio", 'send it as "vllm_xargs"'),
        ({"kv_method": "random"}, "kv_method", 'send it as "vllm_xargs"'),
        ({"vllm_xargs": {"kv_methods": "random"}}, "kv_methods", "did you mean 'kv_method'"),
        ({"vllm_xargs": {"kv_usage": True}, "use_beam_search": True, "n": 2}, "kv_usage", "beam search"),
    ],
)
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_parameter_that_would_have_no_effect_is_a_bad_request(
    client: Any, api: str, body: dict[str, Any], parameter: str, message: str
) -> None:
    create = client.completions.create if api == "completions" else client.chat.completions.create
    text = {"prompt": "Hello"} if api == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
    with pytest.raises(openai.BadRequestError, match=message) as error:
        create(model="small", max_tokens=4, extra_body=body, **text)
    assert error.value.param == parameter


def ask(client: Any, api: str, num_words: int, max_tokens: int | None, **xargs: Any) -> Any:
    """An answer that does not end by itself, to a prompt of about `num_words` tokens."""
    text, body = " word" * num_words, {"ignore_eos": True, "vllm_xargs": {"kv_retention_ratio": 1.0} | xargs}
    limit: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    if api == "chat":
        messages: Any = [{"role": "user", "content": text}]
        return client.chat.completions.create(model="small", messages=messages, extra_body=body, **limit)
    return client.completions.create(model="small", prompt=text, extra_body=body, **limit)


@pytest.mark.parametrize("api, num_words", [("chat", 1150), ("completions", 1270)])
def test_an_answer_without_max_tokens_ends_where_the_pool_does(client: Any, api: str, num_words: int) -> None:
    """The completions API uses a max_tokens of 16 if a request has none."""
    answer = ask(client, api, num_words, None)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == POOL and answer.usage.completion_tokens > 0


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_prompt_that_cannot_fit_is_refused_for_its_length(client: Any, api: str) -> None:
    for max_tokens in (None, 5):
        with pytest.raises(openai.BadRequestError, match=f"prompt of .* at most {POOL - 1} tokens") as error:
            ask(client, api, 1300, max_tokens)
        assert error.value.param == "input_tokens" and "max_tokens" not in str(error.value)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_max_tokens_that_does_not_fit_is_named(client: Any, api: str) -> None:
    """The remedy works: with the ratio that it names, the request is served in full."""
    with pytest.raises(
        openai.BadRequestError, match=r"max_tokens=700: .*at most \d+, or kv_retention_ratio=0.75"
    ) as error:
        ask(client, api, 700, 700)
    assert error.value.param == "max_tokens"
    if api == "completions":
        assert ask(client, api, 700, 700, kv_retention_ratio=0.75).usage.completion_tokens == 700


def test_beam_search_answers_and_says_once_that_it_is_not_compressed(client: Any, log: Path) -> None:
    for _ in range(2):
        answer = client.completions.create(
            model="small", prompt="Count: one, two,", max_tokens=4, n=2, extra_body={"use_beam_search": True}
        )
        assert len(answer.choices) == 2
    assert log.read_text().count("beam search is not compressed") == 1
