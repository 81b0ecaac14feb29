"""Generation with a cache is generation without one, in chunks and past the window; int8 is near; memory as stated."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm_pro.model import tiled_attention
from mobilellm_pro.model.attention import attend_to_cache
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.generation import continue_tokens
from mobilellm_pro.model.kv_cache import KVCache
from mobilellm_pro.model.row_shard import Span
from mobilellm_pro.model.student import FLAVORS, Student

WINDOW = 8
MIB = 2**20


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    # Larger weights than at initialisation, so that attention is far from uniform.
    model = Student(replace(FLAVORS["debug"], initializer_range=0.08, sliding_window=WINDOW))
    model.init_weights()
    return model.eval().requires_grad_(False)


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4096, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_in_pieces(model: Student, tokens: torch.Tensor, pieces: list[int], cache: KVCache) -> torch.Tensor:
    return torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)


def greedy_without_cache(model: Student, prompt: torch.Tensor, count: int) -> torch.Tensor:
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(dim=-1)), dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("prefill_tokens", [1, 3, WINDOW, 11, 64])
def test_greedy_text_is_that_of_the_whole_sequence(student: Student, prefill_tokens: int) -> None:
    """Three rows, a prompt of several chunks, a ring that goes round five times in the prompt and four after it."""
    prompt = tokens_of(3, 5 * WINDOW + 3)
    ours = continue_tokens(student, prompt, 4 * WINDOW, prefill_tokens=prefill_tokens)
    assert torch.equal(ours, greedy_without_cache(student, prompt, 4 * WINDOW))
    assert len(set(map(tuple, ours.tolist()))) == 3


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 3 * WINDOW), min_size=1, max_size=6),
    window=st.sampled_from([1, 2, 5, 64]),
    dtype=st.sampled_from(["model", "int8"]),
)
def test_pieces_of_any_size_give_the_same_logits(student: Student, pieces: list[int], window: int, dtype: str) -> None:
    """Also with int8: a query never sees a key in another precision than later queries do."""
    model = Student(replace(student.model_args, sliding_window=window))
    model.load_state_dict(student.state_dict())
    tokens = tokens_of(2, sum(pieces), seed=len(pieces))
    with torch.no_grad():
        ours = logits_in_pieces(model, tokens, pieces, KVCache(sum(pieces), dtype))
        whole = model(tokens) if dtype == "model" else model(tokens, cache=KVCache(sum(pieces), dtype))
    # A rounding of fp32 may push an int8 number over its half.
    torch.testing.assert_close(ours, whole, atol=1e-4 if dtype == "model" else 0.05, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    num_new=st.integers(1, 40), earlier=st.integers(0, 60), window=st.sampled_from([None, 1, 7, 100]),
    limit=st.sampled_from([1, 200, 2**25]),
)  # fmt: skip
def test_attention_in_blocks_is_attention_under_the_mask(
    num_new: int, earlier: int, window: int | None, limit: int
) -> None:
    if num_new == 1 and window is not None:
        earlier = min(earlier, window - 1)  # what a ring holds
    num_keys = earlier + num_new
    generator = torch.Generator().manual_seed(num_new)
    query = torch.randn(2, 4, num_new, 6, generator=generator)
    key, value = torch.randn(2, 2, 2, num_keys, 6, generator=generator)
    dense = PackedRows(torch.zeros(2, num_keys)).masks({"": Span(window)})[""].dense
    assert dense is not None
    mask = dense[:, :, earlier:]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_attention, "TILE_ELEMENTS", limit)
        ours = attend_to_cache(query, key, value, window)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_no_mask_grows_with_the_prompt(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries × keys of each product with a mask: bounded in global layers, at most 2 windows wide in local ones."""
    monkeypatch.setattr(tiled_attention, "TILE_ELEMENTS", 3000)
    monkeypatch.setattr(tiled_attention, "SMALLEST_TILE", 1)
    made: list[tuple[int, int]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        if options["attn_mask"] is None:
            assert options["is_causal"] and query.shape[2] == key.shape[2] or query.shape[2] == 1
        else:
            made.append((query.shape[2], key.shape[2]))
        return plain(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    continue_tokens(student, tokens_of(1, 1000), 1, prefill_tokens=256)
    widest = max(keys for _, keys in made)
    assert widest == 1000 and max(queries * keys for queries, keys in made) <= 3000
    local = [shape for shape in made if shape[1] <= 2 * WINDOW - 1 and shape[0] <= WINDOW]
    assert len(local) >= 2 * 1000 // WINDOW  # two local layers


@pytest.mark.parametrize(("num_tokens", "mib"), [(2000, 14.04), (4000, 22.83), (8000, 40.41)])
def test_int8_bytes_are_the_papers(num_tokens: int, mib: float) -> None:
    """Measured on the real model's cache after a prompt in chunks; the tensors live on the meta device."""
    args = FLAVORS["1b"]
    with torch.device("meta"):
        model = Student(args).to(torch.bfloat16)
        prompt = torch.zeros(1, num_tokens, dtype=torch.long)
    cache = KVCache(num_tokens, "int8")
    for chunk in prompt.split(3000, dim=1):
        model(chunk, cache=cache, head=lambda hidden, weight: None)
    stored_tokens = 9 * num_tokens + 21 * min(num_tokens, 512)
    assert cache.payload_bytes == 2 * args.num_key_value_heads * args.head_dim * stored_tokens
    assert round(cache.payload_bytes / MIB, 2) == mib
    assert cache.scale_bytes == 2 * 2 * 4 * args.num_key_value_heads * stored_tokens


@pytest.mark.parametrize(("dtype", "num_bytes"), [("model", 4), ("int8", 1)])
def test_memory_is_taken_once(student: Student, dtype: str, num_bytes: int) -> None:
    cache = KVCache(100, dtype)
    with torch.no_grad():
        student(tokens_of(2, 30), cache=cache)
        taken = cache.payload_bytes
        student(tokens_of(2, 70), cache=cache)
    heads = student.model_args.num_key_value_heads * student.model_args.head_dim
    assert taken == cache.payload_bytes == num_bytes * 2 * 2 * heads * (2 * 100 + 2 * WINDOW)
    assert (cache.scale_bytes > 0) == (dtype == "int8")


def test_full_is_an_error(student: Student) -> None:
    cache = KVCache(10)
    with torch.no_grad():
        student(tokens_of(1, 8), cache=cache)
        with pytest.raises(ValueError, match="11 tokens for a KV cache of 10"):
            student(tokens_of(1, 3), cache=cache)


@pytest.mark.parametrize(("capacity", "dtype", "message"), [(0, "model", "at least 1"), (3, "int4", '"model" or')])
def test_what_cannot_be_made_is_named(capacity: int, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache(capacity, dtype)  # type: ignore[arg-type]


def test_an_empty_chunk_is_named(student: Student) -> None:
    with pytest.raises(ValueError, match="prefill_tokens = 0"):
        continue_tokens(student, tokens_of(1, 3), 2, prefill_tokens=0)


def test_int8_is_close_to_exact(student: Student) -> None:
    tokens = tokens_of(2, 60, seed=4)
    with torch.no_grad():
        exact, rounded = (student(tokens, cache=KVCache(60, dtype)) for dtype in ("model", "int8"))
    relative = ((rounded - exact).square().mean() / exact.square().mean()).sqrt()
    assert 1e-4 < relative < 0.03
    # Almost all tokens keep their most likely successor: what changes are ties of a random model.
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.9


def test_bf16_is_no_worse_than_without_a_cache(student: Student) -> None:
    half = Student(student.model_args)
    half.load_state_dict(student.state_dict())
    half.to(torch.bfloat16)
    tokens = tokens_of(2, 50, seed=5)
    with torch.no_grad():
        whole, ours = half(tokens), logits_in_pieces(half, tokens, [20, 7, 1, 22], KVCache(50))
        single = half(tokens, cache=KVCache(50))
    # Two orders of the same sums in bf16: no further apart than either is from fp32.
    error = (whole.float() - student(tokens)).abs().max()
    assert (ours.float() - whole.float()).abs().max() <= 2 * error
    assert (single.float() - whole.float()).abs().max() <= 2 * error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_on_a_gpu(student: Student, dtype: torch.dtype) -> None:
    """FlashAttention with a shifted causal mask (bf16) and blocks (fp32) against the CPU in fp32."""
    model = Student(student.model_args)
    model.load_state_dict(student.state_dict())
    model.to("cuda", dtype)
    tokens = tokens_of(2, 3000)
    with torch.no_grad():
        wanted = student(tokens, cache=KVCache(3000))
        ours = logits_in_pieces(model, tokens.cuda(), [1000, 1, 999, 1000], KVCache(3000)).cpu().float()
    tolerance = 2e-3 if dtype == torch.float32 else 0.05 * float(wanted.abs().max())
    torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=0)
