import pytest
import torch

from kvllm.kernels.select_chunks import select_chunks, select_chunks_ref


@pytest.mark.parametrize("max_chunk_size, chunk_fill", [(1, 0.5), (8, 0.0), (3, 0.5), (8, 0.5), (8, 0.9), (33, 0.25)])
@pytest.mark.parametrize("num_candidates, num_kept", [(16, 1), (64, 16), (256, 80), (384, 112), (32, 32), (1040, 512)])
def test_select_chunks(num_candidates, num_kept, max_chunk_size, chunk_fill, device):
    torch.manual_seed(num_candidates)
    scores = torch.randn(6, num_candidates, device=device).exp()
    scores[3:] = scores[3:].mul(4).round().div(4)  # many equals
    actual = select_chunks(scores, num_kept, max_chunk_size, chunk_fill)
    expected = select_chunks_ref(scores, num_kept, max_chunk_size, chunk_fill)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_chunks_change_the_choice(device):
    """So that the test above compares something: picks 0, 2 and 9; token 1 is worth 0.5 * 8 and 9 makes room."""
    scores = torch.tensor([[9.0, 0, 8, 0, 0, 0, 0, 0, 0, 3]], device=device)
    assert select_chunks(scores, 3, 8, 0.5).tolist() == [[0, 1, 2]]
    assert select_chunks(scores, 3, 1, 0.5).tolist() == [[0, 2, 9]]


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, torch.inf, -torch.inf])
def test_all_equal_keeps_the_earliest(value, device):
    scores = torch.full((2, 48), value, device=device)
    assert select_chunks(scores, 5, 8, 0.5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_positive_and_negative_zero_are_equal(device):
    scores = torch.tensor([[0.0, -0.0, 0.0, -0.0, 1.0, -1.0]], device=device)
    assert select_chunks(scores, 4, 1, 0.5).tolist() == [[0, 1, 2, 4]]


def test_negative_scores_are_ordered(device):
    scores = -torch.arange(40.0, device=device).flip(0)[None]
    assert select_chunks(scores, 3, 1, 0.5).tolist() == [[37, 38, 39]]


def test_nan_never_leaves_the_window(device):
    scores = torch.full((1, 48), torch.nan, device=device)
    scores[0, ::3] = 1.0
    kept = select_chunks(scores, 20, 8, 0.5)[0]
    assert len(set(kept.tolist())) == 20 and 0 <= kept.min() and kept.max() < 48
