"""Agreement with kvpress on the scores of the methods that both have, on a Llama attention layer.

kvpress pins an older transformers, so `make setup` installs it beside ours without its dependencies.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvllm.methods.base import Window
from kvllm.methods.chunkkv import ChunkKV
from kvllm.methods.expected_attention import ExpectedAttention
from kvllm.methods.h2o import H2O
from kvllm.methods.kara import Kara
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.streaming_llm import StreamingLLM
from kvllm.methods.tova import TOVA

# Importing kvpress wraps every attention function of transformers for the whole process; other tests want them back.
_attention_functions = dict(ALL_ATTENTION_FUNCTIONS.items())
kvpress = pytest.importorskip("kvpress", reason="install kvpress to compare with it (see this file's head)")
ALL_ATTENTION_FUNCTIONS.update(_attention_functions)

THETA, TOKENS, HEADS, KV_HEADS, DIM = 1000.0, 90, 6, 2, 16


class Layer:
    """One attention layer that has read a prompt, as kvpress sees it and as we do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=96,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=DIM,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            attn_implementation="eager",
        )
        self.module = LlamaAttention(config, layer_idx=0).eval()
        self.module.rotary_emb = LlamaRotaryEmbedding(config)
        self.hidden = 4 * torch.randn(1, TOKENS, 96)
        positions = torch.arange(TOKENS)
        self.rotary = self.module.rotary_emb(self.hidden, positions[None])
        with torch.no_grad():
            queries, keys, self.values = (
                project(self.hidden).unflatten(-1, (-1, DIM)).transpose(1, 2)
                for project in (self.module.q_proj, self.module.k_proj, self.module.v_proj)
            )
            self.queries, self.keys = apply_rotary_pos_emb(queries, keys, *self.rotary)
            mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]
            self.attentions = self.module(self.hidden, position_embeddings=self.rotary, attention_mask=mask)[1]

    def window(self) -> Window:
        """All tokens are candidates, and all their queries are stored."""
        return Window(
            queries=self.queries.transpose(1, 2),
            query_positions=torch.arange(TOKENS),
            keys=self.keys.transpose(1, 2),
            values=self.values.transpose(1, 2),
            positions=torch.arange(TOKENS).expand(1, KV_HEADS, -1),
            layers=torch.zeros(1, dtype=torch.int64),
        )

    def score(self, press, attentions=None):
        with torch.no_grad():
            kwargs = {"position_embeddings": self.rotary}
            return press.score(self.module, self.hidden, self.keys, self.values, attentions, kwargs)

    def kept(self, press) -> torch.Tensor:
        """[num_kv_heads, num_kept]: the tokens whose keys the press returns, in text order."""
        with torch.no_grad():
            kwargs = {"position_embeddings": self.rotary}
            keys, _ = press.compress(self.module, self.hidden, self.keys, self.values, None, kwargs)
        same = (keys[0].unsqueeze(2) == self.keys[0].unsqueeze(1)).all(dim=-1)  # [num_kv_heads, num_kept, num_tokens]
        assert (same.sum(dim=-1) == 1).all()
        return same.int().argmax(dim=-1).sort(dim=-1).values


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def assert_agree(actual, expected):
    # Both in float32, summed in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert actual.std() > 0


def test_h2o(layer):
    """ObservedAttentionPress, which averages over the queries that see the key."""
    expected = layer.score(kvpress.ObservedAttentionPress(), layer.attentions)
    assert_agree(H2O(average=True).score(layer.window()), expected)


def test_tova(layer):
    """But for the newest token, which kvpress sets above all and we leave to the buffer."""
    expected = layer.score(kvpress.TOVAPress())
    assert_agree(TOVA().score(layer.window())[..., :-1], expected[..., :-1])


def test_keydiff(layer):
    assert_agree(KeyDiff().score(layer.window()), layer.score(kvpress.KeyDiffPress()))


@pytest.mark.parametrize("options", [{}, {"use_covariance": False}, {"use_vnorm": False}, {"epsilon": 0.01}])
def test_expected_attention(layer, options):
    """With no sinks, which lie in the protected prompt here."""
    press = kvpress.ExpectedAttentionPress(n_sink=0, n_future_positions=64, **options)
    ours = {"use_value_norm" if name == "use_vnorm" else name: value for name, value in options.items()}
    method = ExpectedAttention(rope_theta=THETA, num_future_tokens=64, **ours)
    assert_agree(method.score(layer.window()), layer.score(press))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_chunkkv(layer, ratio):
    """With as many tokens as kvpress comes to by counting chunks."""
    press = kvpress.ChunkKVPress(press=kvpress.KeyDiffPress(compression_ratio=ratio), chunk_length=20)
    expected = layer.kept(press)
    kept = ChunkKV(base="keydiff", chunk_length=20).compress(layer.window(), expected.shape[-1]).indices
    assert torch.equal(kept[0], expected)


def test_streaming_llm(layer):
    expected = layer.kept(kvpress.StreamingLLMPress(compression_ratio=0.7, n_sink=4))
    kept = StreamingLLM(num_sink_tokens=4).compress(layer.window(), expected.shape[-1]).indices
    assert torch.equal(kept[0], expected)


def test_kara(layer):
    """Its bidirectional weights: NonCausalAttnPress over one chunk, with the logits scaled, which that one is not."""
    keys = layer.keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
    attend = kvpress.NonCausalAttnPress.non_causal_chunked_attn
    sums = attend(layer.queries * DIM**-0.5, keys, TOKENS).unflatten(1, (KV_HEADS, -1)).mean(dim=2)
    assert_agree(Kara(variant="paper").score(layer.window()), sums / TOKENS)
