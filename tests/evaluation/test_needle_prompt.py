"""Prompts: their lengths, the needle's place, RULER's form char by char; and when an answer counts."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.needle_grid import Cell, Grid, batches, cell_prompt, cells_of_rank
from mobilellm_pro.evaluation.needle_haystack import CorpusText, Filler, most_sentences
from mobilellm_pro.evaluation.needle_prompt import (
    FILLER,
    Needle,
    answer_matches,
    build_prompt,
    draw_needle,
    place_at,
    split_sentences,
)
from tests.data.synthetic import DEBUG_TOKENIZER, make_corpora
from tests.evaluation.ruler_source import ruler

TOKENIZER = Tokenizer.load(str(DEBUG_TOKENIZER))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusText:
    folders = make_corpora(tmp_path_factory.mktemp("corpus"), ("a",), documents=120)
    return CorpusText(folders["a"], TOKENIZER)


def parts_of(prompt: str) -> tuple[str, str]:
    """Key, and the text between the first and the last line."""
    head, _, rest = prompt.partition("\n")
    context, _, question = rest.rpartition("\n")
    assert head.startswith("A special magic number is hidden") and question.startswith(
        "What is the special magic number"
    )
    return question.split(" for ")[1].split(" mentioned")[0], context


def test_the_default_grid_is_the_papers() -> None:
    grid = Grid()
    assert len(grid.cells()) == 450 and len(grid.lengths) == 10
    assert (grid.lengths[0], grid.lengths[-1]) == (2000, 131_072)
    steps = [b - a for a, b in zip(grid.lengths, grid.lengths[1:])]
    assert max(steps) - min(steps) <= 2
    assert grid.depths == [0, 12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100]
    assert [cell.index for cell in grid.cells()] == list(range(450))
    parts = [cells_of_rank(grid.cells(), rank, 7) for rank in range(7)]
    assert sorted(cell.index for part in parts for cell in part) == list(range(450))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(130, 3000), depth=st.floats(0, 100), number=st.integers(0, 50), filler=st.booleans(),
    answer=st.integers(1, 20),
)  # fmt: skip
def test_length_and_depth(
    corpus: CorpusText, length: int, depth: float, number: int, filler: bool, answer: int
) -> None:
    haystack = Filler() if filler else corpus
    cell, grid = Cell(0, length, depth, number), Grid(answer_tokens=answer)
    prompt = cell_prompt(cell, grid, haystack, TOKENIZER)
    text = TOKENIZER.decode(prompt.ids[1:])
    assert prompt.ids[0] == TOKENIZER.bos_id and TOKENIZER.encode(text) == prompt.ids[1:].tolist()
    # Never too long, and no further sentence would have fitted.
    longest = 51 if filler else 45
    assert 0 <= length - answer - len(prompt.ids) < longest
    key, context = parts_of(text)
    needle = f"One of the special magic numbers for {key} is: {prompt.value}."
    assert context.count(needle) == 1 and text.count(prompt.value) == 1
    assert len(prompt.value) == 7 and prompt.value[0] != "0"
    before, after = (
        [s for s in part.split("\n") if s] if filler else split_sentences(part) for part in context.split(needle)
    )
    assert len(before) == int((len(before) + len(after)) * depth / 100)
    assert not filler or set(before + after) <= {FILLER}


def test_a_cell_is_the_same_every_time_and_unlike_others(corpus: CorpusText) -> None:
    grid = Grid(lengths=(400, 500), num_depths=3, num_needles=2)
    texts = [cell_prompt(cell, grid, corpus, TOKENIZER).ids.tolist() for cell in grid.cells()]
    assert texts == [cell_prompt(cell, grid, corpus, TOKENIZER).ids.tolist() for cell in reversed(grid.cells())][::-1]
    assert len(set(map(tuple, texts))) == 12
    other = Grid(lengths=(400,), seed=1)
    assert cell_prompt(grid.cells()[0], other, corpus, TOKENIZER).ids.tolist() != texts[0]


def test_a_corpus_that_is_too_small_is_named(corpus: CorpusText) -> None:
    size = corpus.corpus.num_tokens
    with pytest.raises(ValueError, match=rf"its {size} tokens do not fill a prompt of {2 * size}"):
        cell_prompt(Cell(0, 2 * size, 50, 0), Grid(), corpus, TOKENIZER)


def test_a_length_that_holds_no_question_is_named() -> None:
    with pytest.raises(ValueError, match=r"lengths: 60 tokens do not hold the question \(\d+\).*expected at least \d+"):
        cell_prompt(Cell(0, 60, 50, 0), Grid(), Filler(), TOKENIZER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, r"lengths: \[\] in the needle grid; expected positive numbers of tokens"),
        ({"lengths": (200, 200)}, r"lengths: \[200, 200\] .* each once"),
        ({"num_depths": 0}, "depths: 0"),
        ({"num_needles": -1}, "needles: -1"),
        ({"answer_tokens": 0}, "answer_tokens: 0"),
    ],
)
def test_a_grid_without_cells_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**options)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=200, max_size=400), room=st.integers(0, 2000), seed=st.integers(0, 9)
)
def test_most_sentences_are_the_most(sizes: list[int], room: int, seed: int) -> None:
    sizes = sizes + [50] * 2000
    calls = []

    def num_tokens(n: int) -> int:
        calls.append(n)
        return 100 + sum(sizes[:n])

    n = most_sentences(num_tokens, 100 + room)
    assert num_tokens(n) <= 100 + room < num_tokens(n + 1)
    assert len(calls) < 60


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("ab .!?\n\"')é")), max_size=900))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() and len(sentence) <= 300 for sentence in sentences)


def test_rows_of_a_batch_have_one_length() -> None:
    grid = Grid(lengths=(300,), num_needles=4)
    prompts = [cell_prompt(cell, grid, Filler(), TOKENIZER) for cell in grid.cells()]
    groups = list(batches(prompts, 3))
    assert all(len({len(prompt.ids) for prompt in group}) == 1 and len(group) <= 3 for group in groups)
    assert sorted(prompt.cell.index for group in groups for prompt in group) == list(range(36))
    assert max(map(len, groups)) == 3


ANSWERS = [
    (" 1234567.", True, True),
    (": 1234567", True, True),
    ("\n the number 1234567 and 7654321", True, True),
    (" 7654321 or 1234567", False, True),
    (" 12345678", False, True),
    (" 1,234,567", False, False),
    (" abc1234567", False, True),
    ("", False, False),
    (" none", False, False),
]
"""Continuation, whether it counts, and whether it counts in RULER."""


@pytest.mark.parametrize(("text", "exact", "anywhere"), ANSWERS)
def test_when_an_answer_counts(text: str, exact: bool, anywhere: bool) -> None:
    assert answer_matches(text, "1234567") == exact
    assert answer_matches(text, "1234567", anywhere=True) == anywhere


def test_the_looser_score_is_lm_evals() -> None:
    names = ruler(split_sentences, TOKENIZER)
    for text, _, anywhere in ANSWERS:
        assert names["string_match_all"](names["postprocess_pred"]([text]), [["1234567"]]) == anywhere


def test_a_uuid_may_be_the_answer() -> None:
    value = "2f1c9a34-77aa-4b0e-9d7e-0a1b2c3d4e5f"
    assert answer_matches(f": {value.upper()}.", value) and not answer_matches(f" {value[:-1]}", value)


RULER_SINGLE_1 = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "One of the special magic numbers for lazy-river is: 4039281.\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "What is the special magic number for lazy-river mentioned in the provided text? "
    "The special magic number for lazy-river mentioned in the provided text is"
)


def test_the_prompt_is_rulers() -> None:
    needle = Needle("lazy-river", "4039281")
    assert build_prompt([FILLER, FILLER], [needle], [1], needle, separator="\n") == RULER_SINGLE_1


def test_single_needle_prompts_equal_lm_evals() -> None:
    """niah_single_1: whole samples of lm-eval's generator, rebuilt from their key, number and place."""
    names = ruler(split_sentences, TOKENIZER)
    random.seed(0)
    samples = names["generate_samples"](
        FILLER, max_seq_length=1024, template=names["TEMPLATE"], type_haystack="repeat", type_needle_k="words",
        type_needle_v="numbers", num_samples=8, TOKENIZER=names["TOKENIZER"],
    )  # fmt: skip
    assert len(samples) == 8
    for sample in samples:
        # The delimiter of the task file stands between question and begun answer.
        theirs = f"{sample['input']} {sample['gen_prefix']}"
        key, context = parts_of(theirs)
        lines = context.split("\n")
        place = next(i for i, line in enumerate(lines) if line != FILLER)
        needle = Needle(key, sample["outputs"][0])
        assert build_prompt([FILLER] * (len(lines) - 1), [needle], [place], needle, separator="\n") == theirs


@pytest.mark.parametrize(("kind", "num_keys"), [("number", 1), ("uuid", 1), ("number", 4)])
def test_prompts_in_running_text_equal_lm_evals(kind: str, num_keys: int) -> None:
    """niah_single_2, niah_single_3 and niah_multikey_1, on a text of our own."""
    names = ruler(split_sentences, TOKENIZER)
    sentences = [f"Sentence {i} is about the {word}." for i, word in enumerate("river stone garden lamp".split() * 9)]
    random.seed(num_keys)
    for _ in range(40):
        theirs, answers, key = names["generate_input_output"](
            10_000, " ".join(sentences).split(), type_haystack="essay", num_needle_k=num_keys, type_needle_k="words",
            num_needle_v=1, type_needle_v=f"{kind}s", template=names["TEMPLATE"],
        )  # fmt: skip
        # Where a needle comes first or last, or two meet, lm-eval's text has one space more.
        theirs = re.sub(r" +(\n| )|(?<=\n) ", r"\1", theirs)
        hidden = [s for s in split_sentences(theirs.split("\n")[1]) if s.startswith("One of the special magic")]
        needles = [Needle(s.split(" for ")[1].split(" is: ")[0], s.split(" is: ")[1].rstrip("."), kind) for s in hidden]
        stripped = split_sentences(theirs.split("\n")[1])
        places = [stripped.index(s) - number for number, s in enumerate(hidden)]
        asked = next(needle for needle in needles if needle.key == key and needle.value == answers[0])
        ours = build_prompt(sentences, needles, places, asked, separator=" ")
        assert ours.startswith(theirs) and ours[len(theirs) :].startswith(f" The special magic {kind} for {key} ")
        assert len(needles) == num_keys


def test_places_are_checked() -> None:
    needle = draw_needle(random.Random(0))
    for places in ([3], [-1], [0, 1], []):
        with pytest.raises(ValueError, match="expected places from 0 to 2"):
            build_prompt([FILLER, FILLER], [needle], places, needle, separator="\n")
    assert [place_at(depth, 8) for depth in (0, 12.5, 50, 100)] == [0, 1, 4, 8]


def test_another_tokenizers_corpus_is_refused(corpus: CorpusText, tmp_path: Path) -> None:
    other = Tokenizer({bytes([i]): i for i in range(256)}, "bytes")
    with pytest.raises(ValueError, match="the tokenizer in use is another one"):
        CorpusText(corpus.corpus.folder, other)
