"""The project's own tasks for lm-eval: loaded from local files of the real formats, asked about, and scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lm_eval")
import datasets
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from rouge_score.rouge_scorer import RougeScorer  # a dependency of lm-eval

from mobilellm_pro.evaluation import tasks
from mobilellm_pro.evaluation.tasks.bfcl import ast_summary
from mobilellm_pro.evaluation.tasks.function_calls import Call, answers_match, parse_calls
from mobilellm_pro.evaluation.tasks.rouge import longest_common_subsequence, micro_rouge_l, rouge_l, rouge_l_counts

FOLDER = Path(tasks.__file__).parent
NAMES = {path.stem for path in FOLDER.glob("*.yaml")}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True, raising=False)


def load_task(name: str, folder: Path, **changes: Any) -> ConfigurableTask:
    """One task with its data in a folder; lm-eval changes keys of a task that it knows only as a member of a group."""
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    member = {"task": name, "dataset_path": str(folder), **changes}
    return manager.load([{"group": "local", "task": [member]}])["tasks"][name]


def first_prompt(task: ConfigurableTask, **chat: Any) -> str:
    """What a model is asked about the first document."""
    task.build_all_requests(limit=1, rank=0, world_size=1, **chat)
    (request,) = task.instances
    assert request.request_type == "generate_until" and request.args[1]["do_sample"] is False
    return request.args[0]


def scores(task: ConfigurableTask, answers: list[str]) -> dict[str, float]:
    """The metrics over all documents, each given one answer."""
    docs = list(task.eval_docs)
    assert len(docs) == len(answers)
    results = [task.process_results(doc, [answer]) for doc, answer in zip(docs, answers)]
    return {name: mean([result[name] for result in results]) for name, mean in task.aggregation().items()}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_humaneval(folder: Path) -> Path:
    """As openai/openai_humaneval: parquet in a folder named like the configuration."""
    rows = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def plus_{number}(x: int) -> int:\n    """Adds {number}."""\n',
            "canonical_solution": f"    return x + {number}\n",
            "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate(1) == {number + 1}\n",
            "entry_point": f"plus_{number}",
        }
        for number in range(3)
    ]
    (folder / "openai_humaneval").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(str(folder / "openai_humaneval/test-00000-of-00001.parquet"))
    return folder


def write_mbpp(folder: Path) -> Path:
    """As google-research-datasets/mbpp: a configuration `full`, named in the README, with the split `prompt`."""

    def row(number: int) -> dict[str, Any]:
        return {
            "task_id": number,
            "text": f"Write a function to add {number}.",
            "code": f"def plus(x):\r\n  return x + {number}",
            "test_list": [f"assert plus({x}) == {x + number}" for x in range(3)],
            "test_setup_code": "zero = 0" if number == 11 else "",
            "challenge_test_list": [],
        }

    splits = {"test": [11, 12, 13], "prompt": [1, 3, 2, 4, 5]}
    (folder / "full").mkdir(parents=True)
    for split, numbers in splits.items():
        table = Dataset.from_list([row(number) for number in numbers])
        table.to_parquet(str(folder / f"full/{split}-00000-of-00001.parquet"))
    files = "".join(f"  - split: {split}\n    path: full/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: full\n  data_files:\n{files}---\n")
    return folder


WEATHER = {
    "name": "weather.get",
    "description": "Weather of a place.",
    "parameters": {
        "type": "dict",
        "properties": {
            "place": {"type": "string"},
            "days": {"type": "integer"},
            "limit": {"type": "float"},
            "sensors": {"type": "array", "items": {"type": "string"}},
            "options": {"type": "dict", "properties": {}},
            "local": {"type": "boolean"},
            "corner": {"type": "tuple", "items": {"type": "float"}},
        },
        "required": ["place"],
    },
}
ADD = {
    "name": "add",
    "parameters": {
        "type": "dict",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
PARIS = {"weather.get": {"place": ["Paris, France", "Paris"], "days": [3, ""]}}
SUM = {"add": {"a": [1], "b": [2]}}
BFCL_ANSWERS = {"simple": [PARIS], "multiple": [SUM], "parallel": [SUM, SUM], "parallel_multiple": [PARIS, SUM]}
RIGHT = {
    "simple": "weather.get(place='paris')",
    "multiple": "[add(a=1, b=2)]",
    "parallel": "[add(a=1, b=2), add(b=2, a=1)]",
    "parallel_multiple": '```python\n[add(a=1, b=2), weather.get(place="Paris, France", days=3)]\n```',
}


def write_bfcl(folder: Path, prefixes: tuple[str, ...] = ("", "live_"), version: str = "v3") -> Path:
    """As the leaderboard's repository: three documents a category."""
    for category, answers in BFCL_ANSWERS.items():
        for prefix in prefixes:
            name = f"BFCL_{version}_{prefix}{category}.json"
            ids = [f"{prefix}{category}_{number}" for number in range(3)]
            messages = [{"role": "user", "content": "What is the weather in Paris, and 1 + 2?"}]
            question = messages if version == "v2" else [messages]
            write_lines(folder / name, [{"id": i, "question": question, "function": [WEATHER, ADD]} for i in ids])
            write_lines(folder / "possible_answer" / name, [{"id": i, "ground_truth": answers} for i in ids])
    (folder / "BFCL_v3_exec_simple.json").write_text("not read")
    return folder


def write_openrewrite(folder: Path) -> Path:
    folder.mkdir()
    lines = [
        "comment,source,target,task",
        'Make it short.,"A long, long text.",A text.,shorten',
        'Be formal.,"hi, ""you""",Good day to you.,formality',
        "Paraphrase.,One two three.,Three of them.,paraphrase",
    ]
    (folder / "openrewriteeval_aaai24.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_tldr9(folder: Path) -> Path:
    rows = [
        {"id": f"train-TLDR_RS_2020-0{n}", "document": f"Post {n}.</s><s> It is long.", "summary": f"post {n} is long",
         "ext_labels": [0, 1], "rg_labels": [0.1, 0.9]}
        for n in range(3)
    ]  # fmt: skip
    write_lines(folder / "datasets-m0/test.0.json", rows[:2])
    write_lines(folder / "datasets-m0/test.1.json", rows[2:])
    (folder / "datasets-m0/train.0.json").write_text("not read")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "humaneval_sandboxed": write_humaneval,
    "humaneval_instruct_sandboxed": write_humaneval,
    "mbpp_sandboxed": write_mbpp,
    "mbpp_instruct_sandboxed": write_mbpp,
    "bfcl_v2": write_bfcl,
    "openrewrite": write_openrewrite,
    "tldr9": write_tldr9,
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_task_loads_from_local_files(name: str, tmp_path: Path) -> None:
    assert set(WRITERS) == NAMES
    task = load_task(name, WRITERS[name](tmp_path / "data"))
    assert len(task.eval_docs) == (24 if name == "bfcl_v2" else 3)
    assert first_prompt(task).strip()
    assert json.dumps(task.dump_config(), default=str)  # lm-eval writes it into its results
    # Code is run only where lm-eval is told that it may be.
    assert getattr(task, "UNSAFE_CODE", False) == ("sandboxed" in name)


def test_the_folder_of_evaluation_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names of the tasks' own dataset_path, with nothing changed."""
    monkeypatch.setattr(datasets.load_dataset, "folder", str(tmp_path), raising=False)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    for name, path in (
        ("bfcl_v2", "gorilla-llm/Berkeley-Function-Calling-Leaderboard"),
        ("openrewrite", "openrewrite"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"task {name}: {tmp_path / path}: no such folder"):
            manager.load([name])
        WRITERS[name](tmp_path / path)
        assert len(manager.load([name])["tasks"][name].eval_docs) >= 3


def test_humaneval(tmp_path: Path) -> None:
    task = load_task("humaneval_sandboxed", write_humaneval(tmp_path / "data"))
    assert first_prompt(task) == 'def plus_0(x: int) -> int:\n    """Adds 0."""\n'
    answers = ["    return x\n", "    return x + 2\n", "    import sys\n    sys.exit(0)\n"]
    assert scores(task, answers) == {"pass_at_1": pytest.approx(1 / 3)}
    assert scores(task, [doc["canonical_solution"] for doc in task.eval_docs]) == {"pass_at_1": 1.0}


def test_humaneval_in_chat(tmp_path: Path) -> None:
    task = load_task("humaneval_instruct_sandboxed", write_humaneval(tmp_path / "data"))
    asked: list[Any] = []

    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        asked.append((messages, add_generation_prompt))
        return "\n".join(message["content"] for message in messages)

    prompt = first_prompt(task, apply_chat_template=True, chat_template=template)
    ((messages, generation),) = asked
    assert [message["role"] for message in messages] == ["user", "assistant"] and generation is False
    assert prompt.rstrip().endswith('```python\ndef plus_0(x: int) -> int:\n    """Adds 0."""')
    whole = "```python\ndef plus_2(x):\n    return x + 2\n```\nThis adds 2."
    assert scores(task, ["    return x\n```\nDone.", "    return x + 1", whole]) == {"pass_at_1": 1.0}
    assert scores(task, ["I cannot.", "", "    return x"]) == {"pass_at_1": 0.0}


def test_mbpp(tmp_path: Path) -> None:
    task = load_task("mbpp_sandboxed", write_mbpp(tmp_path / "data"))
    prompt = first_prompt(task)
    parts = prompt.split("You are an expert Python programmer, and here is your task: ")
    assert [part.split(" Your")[0] for part in parts] == ["", *(f"Write a function to add {n}." for n in (2, 3, 4, 11))]
    assert parts[1] == (
        "Write a function to add 2. Your code should pass these tests:\n\nassert plus(0) == 2\nassert plus(1) == 3\n"
        "assert plus(2) == 4\n[BEGIN]\ndef plus(x):\r\n  return x + 2\n[DONE]\n\n"
    )
    assert prompt.endswith("assert plus(2) == 13\n[BEGIN]\n")
    answers = ["def plus(x):\n  return x + 11 + zero\n", "def plus(x):\r\n  return x + 12\n[DONE]\nmore", "def plus(:"]
    assert scores(task, answers) == {"pass_at_1": pytest.approx(2 / 3)}  # zero is of test_setup_code


def test_mbpp_in_chat(tmp_path: Path) -> None:
    task = load_task("mbpp_instruct_sandboxed", write_mbpp(tmp_path / "data"))
    prompt = first_prompt(task)
    assert prompt.count("```python") == 4 and prompt.count("```") == 7
    answers = ["def plus(x):\n  return x + 11\n```\nIt adds.", "def plus(x):\n  return x + 12", "It adds 13."]
    assert scores(task, answers) == {"pass_at_1": pytest.approx(2 / 3)}


def test_mbpp_without_its_examples(tmp_path: Path) -> None:
    folder = write_mbpp(tmp_path / "data")
    Dataset.from_list([{"task_id": 2}]).to_parquet(str(folder / "full/prompt-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match=r"the split 'prompt' has no task_id \[3, 4\], only \[2\]; expected the files"):
        load_task("mbpp_sandboxed", folder)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_bfcl(tmp_path: Path, version: str) -> None:
    task = load_task("bfcl_v2", write_bfcl(tmp_path / "data", version=version))
    prompt = first_prompt(task)
    assert '"name": "weather.get"' in prompt and prompt.endswith("Request: What is the weather in Paris, and 1 + 2?\n")
    kinds = [doc["category"].removeprefix("live_") for doc in task.eval_docs]
    assert kinds == [kind for kind in BFCL_ANSWERS for _ in range(3)] * 2
    assert scores(task, [RIGHT[kind] for kind in kinds]) == {"ast_match": 1.0, "ast_summary": 1.0}
    assert scores(task, ["The weather is fine."] * 24) == {"ast_match": 0.0, "ast_summary": 0.0}
    # Two documents of one category right: of 24 documents, and of 4 kinds with 2 categories of 3 documents.
    some = [RIGHT["simple"]] * 2 + ["[]"] * 22
    assert scores(task, some) == {"ast_match": pytest.approx(2 / 24), "ast_summary": pytest.approx(2 / 24)}


def test_bfcl_version_1_and_its_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = load_task("bfcl_v2", write_bfcl(tmp_path / "data", prefixes=("",)))
    assert len(task.eval_docs) == 12 and "no files of live_" in caplog.text
    items = [("simple", 1.0), ("simple", 0.0), ("live_simple", 1.0), ("multiple", 0.0), ("live_multiple", 1.0)]
    assert ast_summary(items) == pytest.approx(((0.5 + 1.0) / 2 + (0.0 + 1.0) / 2) / 2)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(a=1), g.h(b='x')]", [Call("f", {"a": 1}), Call("g.h", {"b": "x"})]),
        ("f()", [Call("f", {})]),
        ("f(a=-1.5), g()", [Call("f", {"a": -1.5}), Call("g", {})]),
        ("```\nf(a=[1, (2, 3)], b={'c': None})\n```", [Call("f", {"a": [1, (2, 3)], "b": {"c": None}})]),
        ("Here you are:\n```python\n[f()]\n```\nDone.", [Call("f", {})]),
        ("`f(a=True)`", [Call("f", {"a": True})]),
        ("f(a=name, b=g(1), c=[x.y])", [Call("f", {"a": "name", "b": "g(1)", "c": ["x.y"]})]),
        ("f(d={'k': v}, e=(w,))", [Call("f", {"d": {"k": "v"}, "e": ("w",)})]),
        ("", []),
        ("[]", []),
        ("f(1)", None),
        ("f(**{'a': 1})", None),
        ("f(a=1, a=2)", None),
        ("f", None),
        ("[f()][0]", None),
        ("f()()", None),
        ("I call f(a=1).", None),
        ("[f(a=1)", None),
        ("f(a=" + "(" * 5000 + ")" * 5000 + ")", None),
    ],
)  # fmt: skip
def test_calls_are_parsed(text: str, calls: list[Call] | None) -> None:
    assert parse_calls(text) == calls


@pytest.mark.parametrize(
    ("parameter", "allowed", "right", "wrong"),
    [
        ("place", ["New York, NY"], ["'new york ny'", "'New-York./NY'"], ["'New York'", "None", "['New York, NY']"]),
        ("place", ["it's"], ["'it\"s'", '"it\'s"'], ["'its'"]),
        ("place", ["a", None], ["'A'", "None"], ["''", "'None'", "0"]),
        ("days", [3], ["3"], ["3.0", "'3'", "True", "[3]", "4", "None"]),
        ("days", [1, "all"], ["1", "'All'", "all"], ["True", "''"]),
        ("days", [3, ""], ["3"], ["''", "[]"]),
        ("limit", [2.0], ["2", "2.0"], ["True", "'2.0'", "2.1"]),
        ("limit", [2], ["2", "2.0"], []),
        ("local", [True], ["True"], ["1", "'True'", "true", "False"]),
        ("sensors", [["A b", "c"], ["d"]], ["['ab', 'C']", "['d']"], ["['c', 'ab']", "['ab']", "('d',)", "'d'", "[]"]),
        ("sensors", [["a"], ""], ["[]", "['a']"], ["''", "['']"]),
        ("corner", [[1.0, 2.5]], ["(1, 2.5)", "[1.0, 2.5]"], ["(2.5, 1)", "(1,)", "1"]),
        ("options", [{"k": ["x", "y"], "n": [1, ""]}], ["{'k': 'X'}", "{'k': 'y', 'n': 1}"],
         ["{}", "{'n': 1}", "{'k': 'z'}", "{'k': 'x', 'm': 1}", "{'k': 'x', 'n': True}", "'x'", "[]"]),
        ("sensors", [[{"k": [1]}, {"k": [2]}]], ["[{'k': 1}, {'k': 2}]"],
         ["[{'k': 2}, {'k': 1}]", "[{'k': 1}]", "[1, 2]"]),
        ("options", [{"k": [{"deep": ["A b"]}]}], ["{'k': {'deep': ['ab']}}"], ["{'k': {'deep': 'ab'}}", "{'k': {}}"]),
    ],
)  # fmt: skip
def test_values_are_compared_by_type(parameter: str, allowed: list[Any], right: list[str], wrong: list[str]) -> None:
    answer = {"weather.get": {"place": ["p"], parameter: allowed}}
    for text in right + wrong:
        arguments = {"place": "'p'", parameter: text}
        calls = parse_calls(f"weather.get({', '.join(f'{name}={value}' for name, value in arguments.items())})")
        assert calls is not None
        assert answers_match(calls, [answer], [WEATHER, ADD]) == (text in right), text


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("weather.get(place='Paris')", True),
        ("weather.get(place='Paris', days=3)", True),
        ("weather.get(days=3)", False),  # required
        ("weather.get(place='Paris', days=2)", False),
        ("weather.get(place='Paris', local=True)", False),  # of the function, but not among the possible answers
        ("weather.get(place='Paris', colour=1)", False),
        ("weather_get(place='Paris')", False),
        ("get(place='Paris')", False),
        ("[weather.get(place='Paris'), weather.get(place='Paris')]", False),
    ],
)
def test_parameters_of_a_call(text: str, matches: bool) -> None:
    assert answers_match(parse_calls(text) or [], [PARIS], [WEATHER, ADD]) == matches
    needed = {"weather.get": {"place": ["Paris"], "days": [3]}}
    assert answers_match(parse_calls(text) or [], [needed], [WEATHER]) == (matches and "days" in text)


def test_each_answer_has_a_call_of_its_own() -> None:
    def add(a: list[int], b: list[int]) -> dict[str, Any]:
        return {"add": {"a": a, "b": b}}

    both = [add([1, 2], [0]), add([1], [0])]  # the first answer must not take the only call of the second
    for text in ("add(a=1, b=0), add(a=2, b=0)", "add(a=2, b=0), add(a=1, b=0)"):
        assert answers_match(parse_calls(text) or [], both, [ADD])
    for text in ("add(a=2, b=0), add(a=2, b=0)", "add(a=1, b=0)", "add(a=1, b=0), add(a=2, b=0), add(a=1, b=0)"):
        assert not answers_match(parse_calls(text) or [], both, [ADD])


def test_openrewrite(tmp_path: Path) -> None:
    task = load_task("openrewrite", write_openrewrite(tmp_path / "data"))
    assert first_prompt(task).startswith("Make it short.\n\nA long, long text.\n\n")
    assert task.eval_docs[1]["source"] == 'hi, "you"'
    result = scores(task, ["a TEXT", "Good day", "nothing"])
    assert result["rouge_l"] == pytest.approx((1 + 4 / 6 + 0) / 3)
    assert result["rouge_l_micro"] == pytest.approx(2 * (2 + 2) / (4 + 6 + 4))


def test_tldr9(tmp_path: Path) -> None:
    task = load_task("tldr9", write_tldr9(tmp_path / "data"))
    example, _, question = first_prompt(task).partition("\n\nSummarize")
    # The example is the first other document.
    assert "Post: Post 1. It is long.\n\nSummary: post 1 is long" in example
    assert question.endswith("Post: Post 0. It is long.\n\nSummary:")
    result = scores(task, ["post 0 is long", "long post", ""])
    assert result["rouge_l"] == pytest.approx((1 + 2 / 6 + 0) / 3)
    assert result["rouge_l_micro"] == pytest.approx(2 * (4 + 1) / (8 + 6 + 4))
    assert "Summary: post" not in first_prompt(load_task("tldr9", tmp_path / "data", num_fewshot=0))


def test_other_forms_of_the_files(tmp_path: Path) -> None:
    rows = [{"source": "a b", "instruction": "Swap.", "reference": "b a"}]
    write_lines(tmp_path / "lines/data.jsonl", rows)
    (tmp_path / "table").mkdir()
    Dataset.from_list(rows).to_parquet(str(tmp_path / "table/train.parquet"))
    for folder in ("lines", "table"):
        assert [dict(doc) for doc in load_task("openrewrite", tmp_path / folder).eval_docs] == rows


SCORER = RougeScorer(["rougeL"], use_stemmer=False)
WORDS = st.lists(st.sampled_from(["a", "b", "c", "Über-groß", "x9", "-"]), max_size=12).map(" ".join)


@settings(deadline=None)
@given(candidate=st.one_of(WORDS, st.text(max_size=30)), reference=st.one_of(WORDS, st.text(max_size=30)))
def test_rouge_is_that_of_rouge_score(candidate: str, reference: str) -> None:
    counts = rouge_l_counts(candidate, reference)
    assert rouge_l(counts) == pytest.approx(SCORER.score(reference, candidate)["rougeL"].fmeasure, abs=1e-12)


@settings(deadline=None)
@given(first=st.lists(st.sampled_from("abcd"), max_size=9), second=st.lists(st.sampled_from("abcd"), max_size=9))
def test_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(first, second) == table[-1][-1]


def test_rouge_over_documents() -> None:
    pairs = [("a b", "a b"), ("a b c d", "e f g h i j k l"), ("", "a")]
    counts = [rouge_l_counts(*pair) for pair in pairs]
    assert counts == [(2, 2, 2), (0, 4, 8), (0, 0, 1)]
    assert micro_rouge_l(counts) == pytest.approx(2 * 2 / 17)
    assert micro_rouge_l([list(count) for count in counts[:1]]) == 1.0  # as lists, after JSON
    assert micro_rouge_l([]) == 0.0


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("openrewrite", None, r"task openrewrite: .*/data: no such folder; expected one file .csv, .*/rewritelm;"),
        ("openrewrite", {}, "found no file of data; expected one file"),
        ("openrewrite", {"a.csv": "x", "b.jsonl": "y"}, "found a.csv, b.jsonl"),
        ("openrewrite", {"a.csv": "source,target\nx,y"}, r"a.csv:2: no column 'instruction' or 'comment' among \['so"),
        ("openrewrite", {"a.csv": "source,comment,target\nx,,y"}, "a.csv:2: column 'comment' is '', not a text"),
        ("openrewrite", {"a.csv": "source,comment,target\n"}, "a.csv: no rows"),
        ("openrewrite", {"a.jsonl": '{"source": 1}'}, "a.jsonl:1: column 'source' is 1, not a text"),
        ("tldr9", None, "task tldr9: .*/data: no such folder; expected test.*reddit_collector"),
        ("tldr9", {"train.json": "{}"}, "no file test"),
        ("tldr9", {"test.json": '{"document": "a", "summary": "b"}\n{"document"'}, "test.json:2: not one JSON object"),
        ("tldr9", {"test.json": "[1]"}, "test.json:1: a JSON list, not an object"),
        ("tldr9", {"test.json": '{"document": "a"}'}, "test.json:1: no column 'summary'"),
        ("bfcl_v2", None, "task bfcl_v2: .*/data: no such folder; expected BFCL_v2_simple.json.*huggingface.co"),
        ("bfcl_v2", {}, r"one file BFCL_v2_simple.json \(or v3, v4\) is needed, found none"),
        ("bfcl_v2", {"BFCL_v2_simple.json": "", "BFCL_v3_simple.json": ""}, "found BFCL_v2_simple.json, BFCL_v3_simp"),
        ("bfcl_v2", {"BFCL_v3_simple.json": ""}, "possible_answer/BFCL_v3_simple.json: no such file"),
    ],
)
def test_mistakes_in_files_are_named(name: str, files: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    for file, text in (files or {}).items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / file).write_text(text)
    if files == {}:
        (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=message):
        load_task(name, tmp_path / "data")


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ({"id": "s"}, {"id": "s", "ground_truth": []}, "simple.json:1: 'question' is None, not a list"),
        ({}, {"id": "t", "ground_truth": []}, "simple.json:1: no possible answer for id 's'"),
        ({}, {"id": "s", "ground_truth": {}}, "simple.json:1: 'ground_truth' is {}, not a list"),
        ({}, {"id": "s", "ground_truth": [{}]}, "possible answer {} is not {function: {parameter"),
        ({}, {"id": "s", "ground_truth": [{"h": {}}]}, r"possible answers call \['h'\], which are not on offer"),
        ({"question": [["x"]]}, {"id": "s", "ground_truth": [SUM]}, "question is not the messages"),
    ],
)
def test_mistakes_in_documents_of_bfcl(
    question: dict[str, Any], answer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_bfcl(tmp_path / "data")
    whole = {"id": "s", "question": [[{"role": "user", "content": "?"}]], "function": [ADD]}
    write_lines(folder / "BFCL_v3_simple.json", [question if question == {"id": "s"} else {**whole, **question}])
    write_lines(folder / "possible_answer/BFCL_v3_simple.json", [answer])
    with pytest.raises(ValueError, match=message):
        load_task("bfcl_v2", folder)


def test_some_files_of_live_are_not_enough(tmp_path: Path) -> None:
    folder = write_bfcl(tmp_path / "data")
    (folder / "BFCL_v3_live_parallel.json").unlink()
    with pytest.raises(ValueError, match="one file BFCL_v2_live_parallel.json"):
        load_task("bfcl_v2", folder)
