"""What a query sees, and attention over a row that several ranks hold."""

import pytest
import torch
import torch.distributed as dist

from mobilellm_pro.model.attention import Attend, Span, build_masks, document_positions
from tests.ranks import run_ranks

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 9 + [3] * 7, [0] * 24])


@pytest.mark.parametrize("span", [Span(), Span(window=4), Span(chunk=6)], ids=["all", "window", "chunk"])
@pytest.mark.parametrize("own_document", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_mask_is_the_rule(span: Span, own_document: bool, reset: bool) -> None:
    positions = document_positions(DOCUMENTS) if reset else torch.arange(24).expand(2, 24)
    start, queries = 8, 11
    mask = build_masks(
        {"x": span}, positions, DOCUMENTS if own_document else None, query_start=start, num_queries=queries
    )
    for row in range(2):
        for query in range(start, start + queries):
            for key in range(24):
                sees = key <= query
                sees &= span.window is None or query - key < span.window
                sees &= (
                    span.chunk is None
                    or int(positions[row, query]) // span.chunk == int(positions[row, key]) // span.chunk
                )
                sees &= not own_document or int(DOCUMENTS[row, query]) == int(DOCUMENTS[row, key])
                assert bool(mask["x"][row, 0, query - start, key]) == sees, (row, query, key)


def test_document_positions() -> None:
    assert document_positions(DOCUMENTS)[0].tolist() == [*range(5), *range(3), *range(9), *range(7)]


def attention_on_shards(span: Span, world_size: int) -> tuple[float, float]:
    """Largest differences of outputs and of gradients between a row in shards and the same row on one rank."""
    dist.init_process_group("gloo")
    rank, length = dist.get_rank(), 24 // world_size
    mine = slice(rank * length, (rank + 1) * length)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 24, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 24, 8, generator=generator).unbind(0)
    upstream = torch.randn(2, 4, 24, 8, generator=generator)
    positions = torch.arange(24).expand(2, 24)
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = Attend()(*whole, build_masks({"x": span}, positions, DOCUMENTS)["x"])
    expected.backward(upstream)
    parts = [t[:, :, mine].clone().requires_grad_() for t in (q, k, v)]
    attend = Attend()
    attend.context_group = dist.group.WORLD
    mask = build_masks({"x": span}, positions, DOCUMENTS, query_start=mine.start, num_queries=length)["x"]
    out = attend(*parts, mask)
    out.backward(upstream[:, :, mine])
    gradients = max((p.grad - w.grad[:, :, mine]).abs().max().item() for p, w in zip(parts, whole, strict=True))
    return (out - expected[:, :, mine]).abs().max().item(), gradients


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("span", [Span(), Span(window=4), Span(chunk=6)], ids=["all", "window", "chunk"])
def test_context_parallel_equals_one_rank(span: Span, world_size: int) -> None:
    for output, gradient in run_ranks(attention_on_shards, world_size, span, world_size):
        assert output < 1e-5 and gradient < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass only on a GPU")
@pytest.mark.parametrize("span", [Span(), Span(window=100), Span(chunk=96)], ids=["all", "window", "chunk"])
def test_flex_attention_equals_dense_mask(span: Span) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    documents = torch.arange(512, device="cuda").div(150, rounding_mode="floor").expand(2, 512)
    positions = torch.arange(512, device="cuda").expand(2, 512)
    q = torch.randn(2, 4, 512, 64, device="cuda", generator=generator)
    k, v = torch.randn(2, 2, 2, 512, 64, device="cuda", generator=generator).unbind(0)
    dense = build_masks({"x": span}, positions.cpu(), documents.cpu())["x"].cuda()
    flex = build_masks({"x": span}, positions, documents)["x"]
    results = []
    for mask in (dense, flex):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = Attend()(*leaves, mask)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    for ours, truth in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, truth, atol=2e-2, rtol=2e-2)
