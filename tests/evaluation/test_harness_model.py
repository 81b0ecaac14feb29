"""Our model in lm-eval: the numbers of the harness' own `hf` model on the same folder, past the sliding window."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation import lm_eval_command
from mobilellm_pro.evaluation.harness_model import CheckpointModel, HarnessModel
from mobilellm_pro.evaluation.local_datasets import DataMissing, local_datasets
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.evaluation.text_model import Ending, StudentModel
from tests.data.synthetic import DEBUG_TOKENIZER
from tests.evaluation.harness_world import few_tasks, task_folder, write_sharp_student

DATA = Path(__file__).parents[1] / "assets/evaluation_data"
TASKS = ["boolq", "piqa", "social_iqa", "openbookqa", "nq_open"]
WORDS = "What has a window of sixteen tokens and still remembers? A student does. ".split(" ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharp_student(tmp_path_factory.mktemp("student") / "tiny")


@pytest.fixture(scope="module")
def stock(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def ours(folder: Path) -> CheckpointModel:
    return CheckpointModel(str(folder), tree_tokens=300)


def text(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(length))


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, values, number) for number, values in enumerate(arguments)]  # type: ignore[arg-type]


def test_likelihoods_are_those_of_hf(stock: HFLM, ours: CheckpointModel):
    contexts = ["", "a ", text(1, 5), text(1, 40), text(1, 40) + " and more ", text(2, 90), text(3, 600)]
    asked = requests("loglikelihood", *((c, e) for c in contexts for e in (" yes", " no, not at all", "?", " " + c)))
    asked = [request for request in asked if len(request.args[1]) < 1000]
    expected, found = stock.loglikelihood(asked, True), ours.loglikelihood(asked, True)
    assert [a[0] for a in found] == pytest.approx([b[0] for b in expected], abs=1e-4)
    assert [a[1] for a in found] == [b[1] for b in expected]
    assert len({round(a[0], 3) for a in found}) > len(asked) // 2


def test_an_answer_that_melts_into_the_question_is_scored(ours: CheckpointModel):
    assert ours._text.encode(" ax") == ours._text.encode(" ax")[:1]
    melted, apart = ours.loglikelihood(requests("loglikelihood", ("b a", "x"), ("b a", " x")), True)
    assert melted[0] < 0 and melted != apart


def test_rolling_likelihoods_are_those_of_hf(stock: HFLM, ours: CheckpointModel):
    asked = requests("loglikelihood_rolling", (text(1, 3),), (text(2, 70),), (text(3, 700),))
    assert ours.loglikelihood_rolling(asked, True) == pytest.approx(stock.loglikelihood_rolling(asked, True), rel=1e-5)


def test_continuations_are_those_of_hf(stock: HFLM, ours: CheckpointModel):
    settings = {"until": ["e", "\n"], "max_gen_toks": 24, "do_sample": False}
    prompts = [text(seed, 5 + 20 * (seed % 3)) for seed in range(7)]
    asked = requests("generate_until", *((prompt, settings) for prompt in prompts))
    asked += requests("generate_until", (prompts[0], {**settings, "until": []}))
    single = HFLM(pretrained=stock.model, tokenizer=stock.tokenizer, batch_size=1)
    assert ours.generate_until(asked, True) == single.generate_until(asked, True)
    assert len(set(ours.generate_until(asked, True))) > 3


@pytest.mark.parametrize("task", TASKS)
def test_scores_of_real_tasks_are_those_of_hf(task: str, stock: HFLM, ours: CheckpointModel):
    manager, results = few_tasks(task), []
    for model in (stock, ours):
        with local_datasets(DATA):
            results.append(simple_evaluate(model, tasks=[task], num_fewshot=2, task_manager=manager, bootstrap_iters=0))
    expected, found = results
    assert found["results"] == expected["results"]
    for a, b in zip(found["samples"][task], expected["samples"][task], strict=True):
        assert a["doc_hash"] == b["doc_hash"] and a["arguments"] == b["arguments"]
        if task == "nq_open":
            assert a["resps"] == b["resps"]
        else:
            likelihoods = [[response[0][0] for response in sample["resps"]] for sample in (a, b)]
            assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)


@pytest.mark.parametrize("tree_tokens", [1, 40, 10_000])
def test_how_sequences_are_put_together_does_not_matter(folder: Path, tree_tokens: int):
    loaded = load_student(str(folder))
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    ids = torch.randint(4000, (90,), generator=generator).tolist()
    endings = [Ending([*ids[:length], length, 7], 2 + length % 3) for length in (3, 30, 31, 60, 90)]
    endings += [Ending([*ids[:60], 5], 1), Ending([*ids[:60], 6], 1), Ending(ids[:60], 59)]
    found = dict(StudentModel(model, 400, tree_tokens=tree_tokens).scores(endings))
    for number, (sequence, scored) in enumerate(endings):
        logits = model(torch.tensor([sequence[:-1]]))[0, -scored:].log_softmax(-1)
        targets = torch.tensor(sequence[-scored:])
        assert found[number].log_likelihood == pytest.approx(float(logits[range(scored), targets].sum()), abs=1e-4)
        assert found[number].is_greedy == bool((logits.argmax(-1) == targets).all())


def test_common_beginnings_are_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = StudentModel(load_student(str(folder)).model, 400)
    rows: list[int] = []
    forward = model.student.forward

    def counted(tokens: torch.Tensor, **rest: object) -> object:
        rows.append(tokens.numel())
        return forward(tokens, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model.student, "forward", counted)
    list(model.scores([Ending([*range(100), choice], 1) for choice in range(4)]))
    assert rows == [100]


def test_it_is_a_model_of_the_harness(folder: Path):
    assert get_model("mobilellm_pro") is CheckpointModel
    made = get_model("mobilellm_pro").create_from_arg_string(f"checkpoint={folder},max_length=77", {"batch_size": "3"})
    assert isinstance(made, HarnessModel) and made.max_length == 77
    with pytest.raises(ValueError, match="chekpoint"):
        get_model("mobilellm_pro").create_from_arg_string(f"checkpoint={folder},chekpoint=2")


def test_long_answers_and_odd_settings_are_refused(ours: CheckpointModel):
    with pytest.raises(ValueError, match="an answer of .* tokens for a model of 400"):
        ours.loglikelihood(requests("loglikelihood", ("a", text(1, 900))), True)
    with pytest.raises(ValueError, match="400 new tokens"):
        ours.generate_until(requests("generate_until", ("a", {"max_gen_toks": 400})), True)
    with pytest.raises(ValueError, match="num_beams"):
        ours.generate_until(requests("generate_until", ("a", {"num_beams": 4})), True)


def test_sampling_follows_the_seed(folder: Path):
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": []}
    asked = requests("generate_until", ("a b c", settings), ("d e f", settings))
    first, again = (CheckpointModel(str(folder)).generate_until(asked, True) for _ in range(2))
    assert first == again
    for request in asked:
        request.arguments = (request.args[0], {**settings, "do_sample": False})
    assert first != CheckpointModel(str(folder)).generate_until(asked, True)


def test_conversations_have_special_tokens(ours: CheckpointModel):
    chat = CheckpointModel.apply_chat_template
    model = HarnessModel(ours._model, Tokenizer.load(str(DEBUG_TOKENIZER)))
    written = chat(model, [{"role": "user", "content": "Hi <|eot"}])  # type: ignore[arg-type]
    ids = model.tok_encode(written)
    special = model._text.special_ids
    assert ids[:2] == [special["<|begin_of_text|>"], special["<|header_start|>"]]
    assert ids.count(special["<|eot|>"]) == 1 and ids.count(special["<|header_end|>"]) == 2
    assert model._text.decode(ids) == written
    assert special["<|eot|>"] not in ours.tok_encode(written.removeprefix("<|begin_of_text|>" + "<|header_start|>"))


def test_missing_data_names_the_dataset_and_the_cure(tmp_path: Path):
    import datasets

    with local_datasets(tmp_path), pytest.raises(DataMissing, match="hf download --repo-type dataset Rowan/hellaswag"):
        datasets.load_dataset("Rowan/hellaswag", "x")
    with pytest.raises(FileNotFoundError, match="no such folder of evaluation data"), local_datasets(tmp_path / "no"):
        pass


def test_lm_evals_own_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm_eval_command, "OWN_TASKS", task_folder("piqa"))
    model_args = f"checkpoint={folder},tree_tokens=200"
    words = [
        "lm_eval",
        "--model",
        "mobilellm_pro",
        "--model_args",
        model_args,
        "--tasks",
        "piqa",
        "--limit",
        "3",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("sys.argv", [*words, "--output_path", str(tmp_path / "out")])
    with local_datasets(DATA):
        lm_eval_command.main()
    (written,) = tmp_path.rglob("results*.json")
    assert json.loads(written.read_text())["results"]["piqa"]["sample_len"] == 3
