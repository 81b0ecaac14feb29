"""What a query sees, in every form that a mask takes; and attention over a row that several ranks hold."""

import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mobilellm_pro.model import attention_mask, key_exchange
from mobilellm_pro.model import tiled_attention as tiled_attention_module
from mobilellm_pro.model.attention import Attend
from mobilellm_pro.model.attention_mask import BLOCK, DocumentMask, PackedRows, Positions, block_mask, dense_mask
from mobilellm_pro.model.row_shard import RowShard, Span
from mobilellm_pro.model.row_shard import key_exchange as exchange_of
from mobilellm_pro.model.tiled_attention import tiled_attention, tiles
from tests.ranks import run_ranks

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 9 + [3] * 7, [0] * 24])
SPANS = {"all": Span(), "window": Span(window=4), "wide window": Span(window=15), "chunk": Span(chunk=6)}
each_span = pytest.mark.parametrize("span", SPANS.values(), ids=SPANS.keys())


def rule(span: Span, positions: Positions, documents: DocumentMask) -> Tensor:
    """[B, N, N] by definition, in a loop: True = visible."""
    num_rows, num_tokens = DOCUMENTS.shape
    visible = torch.zeros(num_rows, num_tokens, num_tokens, dtype=torch.bool)
    for row, ids in enumerate(DOCUMENTS.tolist()):
        position = [i if positions == "continue" else i - ids.index(ids[i]) for i in range(num_tokens)]
        for query in range(num_tokens):
            for key in range(query, -1, -1):
                if span.window is not None and query - key >= span.window:
                    break
                # A chunk is a stretch of consecutive tokens: it also ends where positions start again.
                if span.chunk is not None and position[query] % span.chunk < query - key:
                    break
                if documents == "block_causal" and ids[query] != ids[key]:
                    break
                visible[row, query, key] = True
    return visible


@each_span
@pytest.mark.parametrize("documents", ["block_causal", "causal"])
@pytest.mark.parametrize("positions", ["continue", "reset"])
@pytest.mark.parametrize(("degree", "head_tail"), [(1, False), (4, False), (3, True)])
def test_mask_is_the_rule(
    span: Span, documents: DocumentMask, positions: Positions, degree: int, head_tail: bool
) -> None:
    truth = rule(span, positions, documents)
    for rank in range(degree):
        shard = RowShard(24, degree, rank, head_tail)
        mask = PackedRows(DOCUMENTS, positions, shard).masks({"x": span}, documents)["x"]
        keys = shard.indices() if mask.exchange is None else mask.exchange.indices()
        assert mask.dense is not None and mask.num_keys == len(keys)
        own = truth[:, shard.indices()]
        assert torch.equal(mask.dense[:, 0], own[:, :, keys])
        assert own.sum() == mask.dense.sum(), "a key that is seen lies on no rank that sends it"


def test_positions() -> None:
    assert PackedRows(DOCUMENTS, "reset").positions[0].tolist() == [*range(5), *range(3), *range(9), *range(7)]
    shard = RowShard(24, 2, 1, head_tail=True)
    assert PackedRows(DOCUMENTS, "continue", shard).positions[0].tolist() == list(range(6, 18))
    assert PackedRows(DOCUMENTS, "reset", shard).positions[0].tolist() == [1, 2, *range(9), 0]


def test_equal_masks_are_made_once() -> None:
    """Layers of a kind share one, and so do both models."""
    rows = PackedRows(DOCUMENTS)
    student = rows.masks({"global": Span(), "local": Span(window=4)})
    teacher = rows.masks({"full": Span(), "chunked": Span(chunk=6)})
    assert student["global"] is teacher["full"]
    assert rows.masks({"full": Span()}, "causal")["full"] is not teacher["full"]


def random_rows(generator: random.Random) -> tuple[PackedRows, Span, DocumentMask]:
    """Rows of some blocks of 128, some of them cut short, on some rank."""
    degree, head_tail = generator.choice([(1, False), (2, False), (2, True), (4, True)])
    num_tokens = generator.choice([256, 1000, 1536]) // (2 * degree) * 2 * degree
    torch.manual_seed(generator.randrange(1000))
    documents = (torch.rand(2, num_tokens) < generator.choice([0, 0.002, 0.01, 0.1])).long().cumsum(1)
    window, chunk = generator.choice([1, 5, 128, 300, 5000]), generator.choice([64, 256, 700])
    span = generator.choice([Span(), Span(window=window), Span(chunk=chunk)])
    shard = RowShard(num_tokens, degree, generator.randrange(degree), head_tail)
    mask: DocumentMask = generator.choice(["causal", "block_causal"])
    return PackedRows(documents, generator.choice(["continue", "reset"]), shard), span, mask


def block_table(mask: BlockMask, name: str, num_columns: int) -> Tensor:
    """[B, blocks, columns]: which blocks a table of a block mask names."""
    counts, numbers = getattr(mask, f"{name}_num_blocks")[:, 0], getattr(mask, f"{name}_indices")[:, 0]
    table = torch.zeros(*counts.shape, num_columns, dtype=torch.int64)
    listed = torch.arange(numbers.shape[-1]) < counts.unsqueeze(-1)
    table.scatter_add_(-1, numbers.long(), listed.long())
    assert table.max() <= 1, "a block is named twice"
    return table.bool()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_block_masks_are_those_of_torch(seed: int) -> None:
    """`create_block_mask` evaluates the rule at every query and key; here nothing is evaluated."""
    rows, span, documents = random_rows(random.Random(seed))
    mask = rows.masks({"x": span}, documents)["x"]
    ours = block_mask(mask.first, mask.end, mask.num_keys)
    num_queries = mask.first.shape[1]
    theirs = create_block_mask(ours.mask_mod, 2, None, num_queries, mask.num_keys, device="cpu")
    assert ours.shape == theirs.shape == (2, 1, num_queries, mask.num_keys)
    straddling = len(rows.shard.pieces()) > 1 and num_queries // 2 % BLOCK
    for name in ("kv", "full_kv", "q", "full_q"):
        columns = -(-(mask.num_keys if "kv" in name else num_queries) // BLOCK)
        found, truth = block_table(ours, name, columns), block_table(theirs, name, columns)
        if straddling and "full" not in name:  # one block holds queries of both pieces: it also touches what is between
            assert torch.equal(found & truth, truth)
        else:
            assert torch.equal(found, truth), name


def test_a_block_mask_of_131_072_tokens() -> None:
    """1,000 documents, under a second and 500 MB for each kind of layer; S × S bits alone would be 2 GB."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.zeros(1, 131_072, dtype=torch.int64)
    documents[0, torch.randperm(131_071, generator=generator)[:999] + 1] = 1
    documents = documents.cumsum(1)
    assert documents.unique().numel() == 1000
    for span in (Span(), Span(window=512), Span(chunk=8192)):
        start = time.process_time()
        mask = PackedRows(documents).masks({"x": span})["x"]
        blocks = block_mask(mask.first, mask.end, mask.num_keys)
        assert time.process_time() - start < 1 and mask.dense is None
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            mask = PackedRows(documents).masks({"x": span})["x"]
            block_mask(mask.first, mask.end, mask.num_keys)
        taken = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
        assert taken < 500e6  # everything that was ever taken, freed or not
        assert blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum() < 6 * 1024 + 1000


@torch.no_grad()
@pytest.mark.parametrize(
    ("span", "shard"),
    [
        (Span(), RowShard(700)),
        (Span(window=200), RowShard(1400, 2, 1)),
        (Span(chunk=300), RowShard(1536, 2, 0, head_tail=True)),
    ],
    ids=["all", "window, second half", "chunk, head and tail"],
)
def test_flex_attention_reads_the_tables(span: Span, shard: RowShard) -> None:
    """Its compiled kernel for CPUs, which goes by the tables of blocks; forward, which is all that it can do there."""
    documents = torch.stack([torch.arange(shard.num_tokens) // length for length in (450, 290)])
    mask = PackedRows(documents, "reset", shard).masks({"x": span})["x"]
    blocks = block_mask(mask.first, mask.end, mask.num_keys)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, mask.first.shape[1], 16, generator=generator)
    key, value = torch.randn(2, 2, 2, mask.num_keys, 16, generator=generator).unbind(0)
    torch.compiler.reset()
    ours = torch.compile(flex_attention, fullgraph=True)(query, key, value, block_mask=blocks, enable_gqa=True)
    visible = dense_mask(mask.first, mask.end, 0, mask.num_keys)
    truth = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)


@each_span
def test_tiles_are_the_dense_mask(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = Span(span.window and 25 * span.window, span.chunk and 25 * span.chunk)
    documents = DOCUMENTS.repeat_interleave(25, dim=1)
    dense = PackedRows(documents).masks({"x": wide})["x"].dense
    monkeypatch.setattr(attention_mask, "DENSE_ELEMENTS", 0)
    mask = PackedRows(documents).masks({"x": wide})["x"]
    assert mask.dense is None and len(tiles(mask.first, mask.end)) > 4
    query, upstream = torch.randn(2, 2, 4, 600, 8, generator=generator).unbind(0)
    key, value = torch.randn(2, 2, 2, 600, 8, generator=generator).unbind(0)
    results = []
    for how in ("dense", "tiles"):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if how == "dense":
            out = F.scaled_dot_product_attention(*leaves, attn_mask=dense, enable_gqa=True)
        else:
            out = Attend()(*leaves, mask)
        out.backward(upstream)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for ours, truth in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tiles_round_no_more_than_the_dense_mask(dtype: torch.dtype) -> None:
    """Against fp64: in bf16 no further off than SDPA with one mask, although a key's gradient comes from many tiles."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, heads, 1500, 24, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
    mask = PackedRows((torch.arange(1500) > 700).long().expand(2, -1)).masks({"x": Span(window=200)})["x"]
    dense = dense_mask(mask.first, mask.end, 0, 1500)
    results = []
    for how in ("truth", "dense", "tiles"):
        *leaves, upstream = [(t.double() if how == "truth" else t).clone() for t in tensors]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        if how == "tiles":
            out = tiled_attention(*leaves, mask.first, mask.end)
        else:
            out = F.scaled_dot_product_attention(*leaves, attn_mask=dense, enable_gqa=True)
        out.backward(upstream)
        results.append([out.double(), *(leaf.grad.double() for leaf in leaves)])
    for truth, plain, ours in zip(*results, strict=True):
        assert (ours - truth).norm() <= 1.05 * (plain - truth).norm() + 1e-9 * truth.norm()


def test_tiled_attention_is_an_operator() -> None:
    """Its shapes without data, its registration for autograd, and that torch.compile may take it as a whole."""
    mask = PackedRows(DOCUMENTS).masks({"x": Span()})["x"]
    query, key = torch.randn(2, 4, 24, 8, requires_grad=True), torch.randn(2, 2, 24, 8, requires_grad=True)
    arguments = (query, key, key.detach().clone().requires_grad_(), mask.first, mask.end)
    torch.library.opcheck(torch.ops.mobilellm_pro.tiled_attention, arguments)
    compiled = torch.compile(tiled_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), tiled_attention(*arguments))


def test_tiles_of_a_long_row_grow_with_its_length() -> None:
    """Queries × keys of all tiles: linear in the row for windows and documents; no mask is large."""

    def elements(num_tokens: int, span: Span, document: int) -> tuple[int, int]:
        documents = torch.arange(num_tokens).div(document, rounding_mode="floor").unsqueeze(0)
        mask = PackedRows(documents).masks({"x": span})["x"]
        cut = tiles(mask.first, mask.end)
        sizes = [(t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in cut]
        return sum(sizes), max([0] + [size for size, tile in zip(sizes, cut, strict=True) if not tile.is_causal])

    for span, document in ((Span(window=512), 10**9), (Span(), 1000)):
        small, large = elements(8192, span, document), elements(32_768, span, document)
        assert large[0] < 4.2 * small[0] and large[0] < 3 * 1024 * 32_768
    # A document's later half, whose beginning another rank has, or a cache: nothing of it is a square.
    half = torch.arange(65_536, 131_072, dtype=torch.int32).unsqueeze(0)
    rest = tiles(torch.zeros_like(half), half + 1)
    assert max((t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in rest) <= 2**26
    assert not any(tile.is_causal for tile in rest)


@given(st.integers(0, 10**6))
def test_tiles_of_any_two_numbers_a_query(seed: int) -> None:
    """Whatever never goes down: a tile without a mask sees what the mask would say."""
    rng = np.random.default_rng(seed)
    end = torch.from_numpy(np.maximum.accumulate(1 + np.arange(40) + rng.integers(-3, 3, 40)).clip(1)).int()
    first = torch.from_numpy(np.maximum.accumulate(rng.integers(0, 40, 40) * rng.integers(0, 2, 40))).int()
    first = torch.minimum(first, end - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_attention_module, "SMALLEST_TILE", 2)
        cut = tiles(first[None], end[None])
    assert [t.queries.start for t in cut] + [40] == [0] + [t.queries.stop for t in cut]
    for tile in (tile for tile in cut if tile.is_causal):
        mask = tile.mask(first[None], end[None])[0, 0]
        assert torch.equal(mask, torch.ones_like(mask).tril())


def test_the_beginning_of_a_document_is_one_tile_without_a_mask() -> None:
    documents = torch.tensor([0] * 300 + [1] * 50 + [2] * 250).unsqueeze(0)
    masks = PackedRows(documents).masks({"global": Span(), "local": Span(window=150)})
    found = {
        name: [(t.queries.start, t.queries.stop, t.keys.start, t.is_causal) for t in tiles(m.first, m.end)]
        for name, m in masks.items()
    }
    assert found["global"] == [(0, 300, 0, True), (300, 350, 300, False), (350, 600, 350, True)]
    assert [tile for tile in found["local"] if tile[3]] == [(0, 150, 0, True), (350, 500, 350, True)]
    for cut in found.values():
        assert [tile[0] for tile in cut] + [600] == [0] + [tile[1] for tile in cut], "every query once"


@dataclass(frozen=True)
class Difference:
    """Of attention on shards to attention on one rank."""

    output: float
    gradients: float
    sent_tokens: int
    received_tokens: int
    num_bytes: int
    """That the collectives of forward and backward brought to this rank."""


def attention_on_shards(span: Span, positions: Positions, documents: DocumentMask, head_tail: bool) -> Difference:
    """Largest differences of outputs and of gradients between a row in shards and the same row on one rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    shard = RowShard(24, dist.get_world_size(), dist.get_rank(), head_tail)
    mine = shard.indices()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 24, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 24, 8, generator=generator).unbind(0)
    upstream = torch.randn(2, 4, 24, 8, generator=generator)
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    visible = rule(span, positions, documents).unsqueeze(1)
    expected = F.scaled_dot_product_attention(*whole, attn_mask=visible, enable_gqa=True)
    expected.backward(upstream)
    parts = [t[:, :, mine].clone().requires_grad_() for t in (q, k, v)]
    attend = Attend()
    attend.context_group = dist.group.WORLD
    mask = PackedRows(DOCUMENTS, positions, shard).masks({"x": span}, documents)["x"]
    counted = 0
    plain = key_exchange._all_to_all

    def counting(*arguments: Any) -> Tensor:
        nonlocal counted
        received = plain(*arguments)
        counted += received.nbytes
        return received

    key_exchange._all_to_all = counting
    try:
        out = attend(*parts, mask)
        out.backward(upstream[:, :, mine])
    finally:
        key_exchange._all_to_all = plain
    gradients = max((p.grad - w.grad[:, :, mine]).abs().max().item() for p, w in zip(parts, whole, strict=True))
    exchange = mask.exchange
    return Difference(
        (out - expected[:, :, mine]).abs().max().item(),
        gradients,
        0 if exchange is None else sum(exchange.sent_tokens),
        0 if exchange is None else sum(exchange.received),
        counted,
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_context_parallel_equals_one_rank(world_size: int) -> None:
    """Documents cross borders, windows are smaller and larger than a shard; keys and gradients travel as planned."""
    cases = [
        (span, positions, documents, head_tail)
        for span in SPANS.values()
        for positions, documents in (("continue", "block_causal"), ("reset", "block_causal"), ("continue", "causal"))
        for head_tail in (False, True)
    ]
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, two rows, two heads, eight numbers
    for case, found in zip(cases, zip(*run_ranks(_all_cases, world_size, cases), strict=True), strict=True):
        for rank in found:
            assert rank.output < 1e-5 and rank.gradients < 1e-5, case
            assert rank.num_bytes == token_bytes * (rank.sent_tokens + rank.received_tokens), case


def _all_cases(cases: list[Any]) -> list[Difference]:
    return [attention_on_shards(*case) for case in cases]


@pytest.mark.parametrize("head_tail", [False, True])
@pytest.mark.parametrize("degree", [2, 4, 32])
@pytest.mark.parametrize("window", [2, 512, 5000])
def test_a_local_layer_exchanges_a_window_at_most(window: int, degree: int, head_tail: bool) -> None:
    """Tokens each way, whatever the length of the row: window - 1 at each border between pieces."""
    exchanged = []
    for num_tokens in (16_384, 131_072):
        for rank in range(degree):
            exchange = exchange_of(RowShard(num_tokens, degree, rank, head_tail), Span(window=window))
            assert exchange is not None
            borders = 1 + head_tail
            assert sum(exchange.received) <= borders * (window - 1)
            assert sum(exchange.sent_tokens) <= borders * (window - 1)
            exchanged.append(sum(exchange.received))
    if window <= 16_384 // (2 * degree):
        assert max(exchanged[:degree]) == max(exchanged[degree:])


def test_what_other_kinds_of_layers_exchange() -> None:
    def received(span: Span, degree: int, **options: Any) -> list[int]:
        shards = [RowShard(32_768, degree, rank) for rank in range(degree)]
        return [0 if x is None else sum(x.received) for x in (exchange_of(s, span, **options) for s in shards)]

    assert received(Span(), 4) == [0, 8192, 16_384, 24_576]
    assert received(Span(chunk=8192), 4) == [0] * 4  # chunks end where shards end
    assert received(Span(chunk=8192), 8) == [0, 4096] * 4
    assert received(Span(chunk=8192), 4, aligned=False) == [0, 8191, 8191, 8191]
    assert exchange_of(RowShard(32_768, 4, 1), Span(chunk=8192)) is None


def test_head_and_tail_see_equally_many_keys() -> None:
    def work(head_tail: bool) -> list[int]:
        rows = [PackedRows(torch.zeros(1, 4096), "continue", RowShard(4096, 4, rank, head_tail)) for rank in range(4)]
        masks = [row.masks({"x": Span()}, "causal")["x"] for row in rows]
        return [int((mask.end - mask.first).sum()) for mask in masks]

    assert max(work(True)) == min(work(True)) and max(work(False)) > 6 * min(work(False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass only on a GPU")
@each_span
@pytest.mark.parametrize(("degree", "head_tail"), [(1, False), (4, False), (2, True)])
def test_flex_attention_equals_dense_mask(span: Span, degree: int, head_tail: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    wide = Span(span.window and 25 * span.window, span.chunk and 25 * span.chunk)
    documents = torch.stack([torch.arange(1024, device="cuda") // length for length in (150, 400)])
    shard = RowShard(1024, degree, degree - 1, head_tail)
    dense = PackedRows(documents.cpu(), "reset", shard).masks({"x": wide})["x"]
    flex = PackedRows(documents, "reset", shard).masks({"x": wide})["x"]
    assert dense.dense is not None and flex.blocks is not None
    num_queries = dense.first.shape[1]
    q = torch.randn(2, 4, num_queries, 64, device="cuda", generator=generator)
    k, v = torch.randn(2, 2, 2, dense.num_keys, 64, device="cuda", generator=generator).unbind(0)
    results = []
    for how in ("dense", "flex"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        if how == "dense":
            out = F.scaled_dot_product_attention(*leaves, attn_mask=dense.dense.cuda(), enable_gqa=True)
        else:
            out = Attend().flex(*leaves, block_mask=flex.blocks, enable_gqa=True)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    for ours, truth in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, truth, atol=2e-2, rtol=2e-2)
