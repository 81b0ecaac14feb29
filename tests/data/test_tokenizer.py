"""The tokenizer against tiktoken's rules, the real Llama 4 class where it is installed, and Hugging Face's reader."""

import base64
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm_pro.data.hugging_face_tokenizer import write_hugging_face_tokenizer
from mobilellm_pro.data.special_tokens import LLAMA4_RANKS, special_names
from mobilellm_pro.data.tokenizer import MAX_CHUNK_CHARS, MAX_RUN_CHARS, SPLIT_PATTERN, Tokenizer, find_llama4_file
from tests.data.synthetic import DEBUG_TOKENIZER

TEXTS = [
    "",
    " ",
    "Hello, world! It's 3.14159 and we're DONE.",
    "def f(x):\n    return x ** 2  # square\n\n\n\t\tif x:\r\n",
    "naïve café — Straße, ÀÉÎ",
    "你好,世界。こんにちは 안녕하세요",
    "Привет, мир! مرحبا שלום हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 \u200b zero width",
    "12345678901234567890 0x1F 1e-5",
    "     leading and trailing     ",
    "a" * 300 + "=" * 200 + " " * 100 + "\n" * 50,
    "\x00\x01\x7f control",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(DEBUG_TOKENIZER))


def test_debug_vocabulary(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == 4096
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (4077, 4078, 4095)
    assert len(tokenizer.special_ids) == 19
    assert DEBUG_TOKENIZER.stat().st_size < 100_000


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_array_and_list_agree(tokenizer: Tokenizer):
    assert [tokenizer.encode_array(text, eos=True).tolist() for text in TEXTS] == [
        tokenizer.encode(text, eos=True) for text in TEXTS
    ]
    assert tokenizer.encode_array("x").dtype == np.int32


def test_pieces_joined_are_the_document(tokenizer: Tokenizer):
    """Also in two threads at once, with runs at the limit and surrogates that UTF-8 cannot hold."""
    limit = MAX_RUN_CHARS
    runs = ["x" * limit, " " * limit, "x" * (limit + 1), " " * (2 * limit + 1), "y" * (limit // 2), "a\ud800b"]
    text = "".join(f"{run} {other}\n" for run in runs for other in TEXTS) * 2
    pieces = list(tokenizer.encode_pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) > len(text) // MAX_CHUNK_CHARS
    assert max(len(run) for piece in pieces for run in piece.split()) == limit
    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(tokenizer.encode_piece, pieces))
    assert {part.dtype for part in ids} == {np.dtype(np.int32)}
    expected = [token for piece in pieces for token in tokenizer._encoding.encode_ordinary(piece)]
    assert np.concatenate(ids).tolist() == expected == tokenizer.encode_array(text).tolist()


@pytest.fixture(scope="module")
def published(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """The split as it was published, without special tokens."""
    return tiktoken.Encoding("published", pat_str=SPLIT_PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={})


# Letters of both cases, marks, digits, signs, spaces of several kinds and contractions, where alternatives compete.
_FRAGMENTS = [*"aZéß你\u02b0\u0301\u1f88 7½-/'\n\r\t\u00a0\u3000", "'s", "'LL", "  ", "\r\n", "🇩🇪", "word", "CamelCase"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(_FRAGMENTS), max_size=30).map("".join) | st.text(max_size=40))
def test_grouped_alternatives_are_the_published_split(tokenizer: Tokenizer, published: tiktoken.Encoding, text: str):
    assert tokenizer.encode(text) == published.encode_ordinary(text)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_the_published_ids(tokenizer: Tokenizer, published: tiktoken.Encoding, text: str):
    assert tokenizer.encode(text) == published.encode_ordinary(text)


def test_special_names_in_text_are_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("a <|end_of_text|> b<|eot|>")
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == "a <|end_of_text|> b<|eot|>"


@pytest.mark.parametrize("run", ["a" * (MAX_RUN_CHARS - 1) + " ", " " * (MAX_RUN_CHARS - 1) + "a"])
def test_runs_below_the_limit_are_cut_in_linear_time(tokenizer: Tokenizer, run: str):
    start = time.monotonic()
    assert sum(map(len, tokenizer.encode_pieces(run * 80))) == 2_000_000
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000 + "x", "\n" * 500_000, "ab c" * 300_000])
def test_long_runs_do_not_stall(tokenizer: Tokenizer, text: str):
    start = time.monotonic()
    ids = tokenizer.encode(text)
    assert time.monotonic() - start < 10
    assert tokenizer.decode(ids) == text


def test_lone_surrogate_becomes_replacement(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("x\ud800y")) == "x\ufffdy"


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="token id 4096 is outside the vocabulary"):
        tokenizer.decode([1, 4096])


def test_pickle_and_fingerprint(tokenizer: Tokenizer, tmp_path: Path):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    lines = DEBUG_TOKENIZER.read_text().splitlines()
    tokens = [line.split()[0] for line in lines]
    tokens[300], tokens[301] = tokens[301], tokens[300]
    other = tmp_path / "other.model"
    other.write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))
    assert Tokenizer.load(str(other)).fingerprint != tokenizer.fingerprint


def test_missing_file_names_the_cure(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"absent\.model does not exist.*pip install --no-deps llama-models==0\.3\.0"
    ):
        Tokenizer.load(str(tmp_path / "absent.model"))


def test_missing_package_names_the_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llama-models==0\.3\.0"):
        Tokenizer.load("llama4")


def test_wrong_checksum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "llama_models/llama4/tokenizer.model"
    file.parent.mkdir(parents=True)
    file.write_bytes(DEBUG_TOKENIZER.read_bytes())
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"tokenizer\.model: sha256 is .*expected d0bdbaf5"):
        Tokenizer.load("llama4")


def single_bytes(count: int) -> str:
    return "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(count))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "256 of the 256 single bytes"),
        (single_bytes(200), "56 of the 256 single bytes"),
        (single_bytes(256) + "YWI= 257\n", "ranks are not the numbers 0 to 256"),
        (single_bytes(256) + "not base64! 256\n", "line 257: expected"),
        (single_bytes(256) + "YWI=\n", "line 257: expected"),
        (single_bytes(256) + "AA== 256\n", "line 257: token .* occurs twice"),
    ],
)
def test_damaged_files(tmp_path: Path, content: str, message: str):
    file = tmp_path / "bad.model"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(str(file))
    assert "bad.model" in str(error.value)


def random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    letters = "abcdefgh etaoin ETAOIN\n\t 0123456789 .,;:!?()[]{}'\"-_=+/\\éüñß你好мир🙂"
    return ["".join(rng.choices(letters, k=rng.randint(1, 200))) for _ in range(count)]


def test_hugging_face_folder_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers reads the folder")
    write_hugging_face_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (4077, 4078, 4095)
    source = Path(random.__file__).read_text()
    for text in [*TEXTS, *random_texts(300), source]:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text), repr(text)
        assert theirs(text).input_ids == tokenizer.encode(text, bos=True)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_real_special_names():
    names = special_names(LLAMA4_RANKS)
    assert len(names) == len(set(names)) == 2048
    ids = {name: LLAMA4_RANKS + offset for offset, name in enumerate(names)}
    known = {"begin_of_text": 200000, "end_of_text": 200001, "header_start": 200005, "header_end": 200006}
    known |= {"eom": 200007, "eot": 200008, "python_start": 200016, "finetune_right_pad": 200018, "image_start": 200080}
    known |= {"patch": 200092, "reasoning_thinking_end": 201143, "reserved_special_token_0": 201144}
    assert {name: ids[f"<|{name}|>"] for name in known} == known
    assert special_names(4077) == names[:19]


def test_equals_the_published_class():
    try:
        path = find_llama4_file()
    except FileNotFoundError:
        pytest.skip("llama-models is not installed (pip install --no-deps llama-models==0.3.0)")
    reference = pytest.importorskip("llama_models.llama4.tokenizer", reason="the class needs its dependencies")
    theirs, ours = reference.Tokenizer(path), Tokenizer.load("llama4")
    assert ours.vocab_size == theirs.n_words == 202_048
    assert ours.special_ids == theirs.special_tokens
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id, theirs.eos_id, theirs.pad_id)
    long = ["a" * 60_000 + " " * 60_000, "word " * (MAX_CHUNK_CHARS // 4)]
    for text in [*TEXTS, *random_texts(100), *long]:
        assert ours.encode(text, bos=True, eos=True) == theirs.encode(text, bos=True, eos=True)
