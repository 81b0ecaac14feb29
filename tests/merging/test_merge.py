"""The verb `merge` from end to end on two real specialists: its search, table, checkpoints, resumption and guards."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate

from mobilellm_pro.__main__ import main
from mobilellm_pro.config import ConfigError, JobError, load
from mobilellm_pro.convert.conversion import convert
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.evaluation.generate import generate
from mobilellm_pro.evaluation.harness_model import HarnessModel
from mobilellm_pro.evaluation.held_out import held_out
from mobilellm_pro.evaluation.local_datasets import local_datasets
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.evaluation.suite import load_suite
from mobilellm_pro.evaluation.text_model import StudentModel
from mobilellm_pro.model.checkpoint import checkpoint_problems, latest_checkpoint, load_model
from mobilellm_pro.model.registry import model_on_meta
from mobilellm_pro.pipeline import merge as merge_module
from mobilellm_pro.pipeline.merge import merge
from mobilellm_pro.pipeline.merge_plan import load_merge_plan
from mobilellm_pro.pipeline.merge_score import bits_per_byte, pack, read_text
from tests.evaluation.harness_world import few_tasks
from tests.merging.specialists import DOMAINS, Specialists, write_run
from tests.training.small_world import SmallWorld

FILES = ("candidates.jsonl", "tests.jsonl", "merge.json", "merge.md", "config.toml", "DONE", "search.png")


@pytest.fixture(scope="module")
def merged(specialists: Specialists) -> Path:
    """Its folder, made by the command line with words, as a pipeline does."""
    folder = specialists.folder / "by_words"
    parent = specialists.folder / "parent/checkpoint/step-1"
    words = ["merge", str(specialists.merge), "--output", str(folder), "--parent", str(parent)]
    assert main([*words, "--branches", *reversed(specialists.words)]) == 0
    return folder


def test_the_search_is_at_least_as_good_as_the_best_branch_and_as_uniform(merged: Path):
    result = json.loads((merged / "merge.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["pre-anneal", "specialist a", "specialist b", "uniform average", "searched average"]
    others = [rows[name]["dev_score"] for name in ("specialist a", "specialist b", "uniform average")]
    assert result["dev_score"] == rows["searched average"]["dev_score"] <= min(others)
    assert sum(result["weights"]["all"].values()) == pytest.approx(1, abs=1e-12)
    for row in rows.values():
        assert row["mean"] == pytest.approx(sum(row["bits_per_byte"][name] for name in DOMAINS) / 2)
    assert rows["specialist a"]["bits_per_byte"]["a"] < rows["pre-anneal"]["bits_per_byte"]["a"]
    assert rows["searched average"]["mean"] < min(rows["specialist a"]["mean"], rows["specialist b"]["mean"])
    candidates = [json.loads(line) for line in (merged / "candidates.jsonl").read_text().splitlines()]
    assert result["candidates"] == len(candidates) - 1 <= 16 and candidates[0]["model"] == "parent"
    assert min(c["score"] for c in candidates) == result["dev_score"]
    table = (merged / "merge.md").read_text()
    assert f"| searched average | {rows['searched average']['bits_per_byte']['a']:.4f}" in table
    assert f"**{rows['searched average']['mean']:.4f}**" in table, "the lowest is in bold"


def test_the_numbers_are_those_of_held_out(specialists: Specialists, merged: Path):
    """Packed rows with masks give what documents read alone give, of the checkpoint that was written."""
    config = load(specialists.folder / "job.toml")
    alone = held_out(str(merged), config, device="cpu")
    (row,) = [r for r in json.loads((merged / "merge.json").read_text())["rows"] if r["name"] == "searched average"]
    assert alone is not None
    assert alone["by_corpus"] == pytest.approx(row["bits_per_byte"], rel=1e-5)


def test_the_checkpoint_is_the_average(specialists: Specialists, merged: Path):
    weights = json.loads((merged / "merge.json").read_text())["weights"]["all"]
    branches = {name: load_model(specialists.folder / f"branch_{name}").model.state_dict() for name in DOMAINS}
    for name, tensor in load_model(merged).model.state_dict().items():
        truth = sum(weights[branch] * state[name].double() for branch, state in branches.items())
        torch.testing.assert_close(tensor.double(), truth, rtol=0, atol=1e-6)


def test_its_folder_is_a_run_folder(merged: Path, tmp_path: Path):
    config = load(merged / "config.toml")
    step = latest_checkpoint(merged / config.checkpoint.folder)
    assert step == merged / "checkpoint/step-0" and not checkpoint_problems(model_on_meta(config), step)
    assert config.job.dump_folder == str(merged) and config.checkpoint.initial_load_path.endswith(
        "parent/checkpoint/step-1"
    )
    convert(str(step), str(tmp_path / "converted"))
    ours = {path.name: path.read_bytes() for path in (merged / "hugging_face").iterdir()}
    assert ours == {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()}
    texts = [generate(str(folder), prompt="The", max_new_tokens=5) for folder in (merged, merged / "hugging_face")]
    assert texts[0] == texts[1]
    assert json.loads((merged / "DONE").read_text())["checkpoint"] == str(step)
    assert not [path.name for path in merged.iterdir() if "tmp" in path.name]


def test_the_next_phase_begins_with_it(specialists: Specialists, merged: Path):
    """A run that learns nothing ends with the merged weights, to the bit."""
    world = SmallWorld(specialists.folder, specialists.folder / "job.toml")
    changes = {
        "distill.objective": "ce",
        "optimizer.lr": "1e-30",
        "optimizer.implementation": "foreach",
        "lr_scheduler.warmup_steps": "0",
        "training.steps": "1",
        "training.local_batch_size": "2",
        "training.mixed_precision_param": "float32",
        "activation_checkpoint.mode": "none",
        "validation.enable": "false",
        "checkpoint.initial_load_path": str(merged / "checkpoint/step-0"),
    }
    words = [f"--{key}={value}" for key, value in changes.items()]
    after = load_model(world.run("next", 1, *words)).model.state_dict()
    before = load_model(merged).model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_second_start_does_nothing_and_another_merge_is_refused(
    specialists: Specialists, merged: Path, capsys: pytest.CaptureFixture[str]
):
    before = {name: (merged / name).stat().st_mtime_ns for name in FILES}
    result = merge(str(specialists.merge), output=str(merged))
    assert result == json.loads((merged / "merge.json").read_text())
    assert before == {name: (merged / name).stat().st_mtime_ns for name in FILES}
    other = specialists.file(specialists.folder / "other.toml", ("draws = 3", "draws = 4"))
    with pytest.raises(ValueError, match=r"search.draws: 3 there, 4 now"):
        merge(str(other), output=str(merged))
    with pytest.raises(ValueError, match="holds a run that is no merge"):
        merge(str(specialists.merge), output=str(specialists.folder / "parent"))
    assert "is DONE" in capsys.readouterr().out


def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(
    specialists: Specialists, merged: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed while it searches, while it writes and while it tests; nothing is scored twice."""
    whole = {name: (merged / name).read_bytes() for name in FILES}
    weights = {name: tensor.clone() for name, tensor in load_model(merged).model.state_dict().items()}
    backup = merged.with_name("backup")
    merged.rename(backup)
    try:
        calls = 0
        scored = merge_module.bits_per_byte

        def dies(most: int):
            def count(*args):
                nonlocal calls
                if calls >= most:
                    raise KeyboardInterrupt
                calls += 1
                return scored(*args)

            return count

        start = ["merge", str(specialists.merge), "--output", str(merged), "--branches", *specialists.words]
        total = len(whole["candidates.jsonl"].splitlines()) + len(whole["tests.jsonl"].splitlines())
        for most in (5, total - 7, total - 2):
            monkeypatch.setattr(merge_module, "bits_per_byte", dies(most))
            assert main(start) == 130
            assert not (merged / "DONE").exists()
        monkeypatch.setattr(merge_module, "bits_per_byte", scored)
        shutil.rmtree(merged / "checkpoint")
        shutil.rmtree(merged / "hugging_face")
        with monkeypatch.context() as patch:
            patch.setattr(merge_module, "write_hugging_face_copy", _no_space)
            with pytest.raises(OSError, match="no space"):
                main(start)
        assert (merged / "checkpoint/step-0/.metadata").is_file() and not (merged / "hugging_face").exists()
        monkeypatch.setattr(merge_module, "bits_per_byte", dies(total))
        assert main(start) == 0
        assert {name: (merged / name).read_bytes() for name in FILES} == whole
        assert all(torch.equal(load_model(merged).model.state_dict()[name], t) for name, t in weights.items())
    finally:
        shutil.rmtree(merged, ignore_errors=True)
        backup.rename(merged)


def _no_space(*args: object) -> None:
    raise OSError("no space")


SUITE = f"""
name = "dev"
data = "{Path(__file__).parents[1] / "assets/evaluation_data"}"
limit = 8
[[column]]
task = "piqa"
name = "PIQA"
metric = "acc"
shots = 0
[[column]]
task = "openbookqa"
name = "OBQA"
metric = "acc"
shots = 0
"""


def test_groups_of_layers_and_the_kl_to_a_teacher(specialists: Specialists, world: SmallWorld, tmp_path: Path):
    file = specialists.file(
        tmp_path / "groups.toml",
        ("[search]", '[search]\nobjective = "kl"\nlayer_groups = [0, 2]\nmethod = "cma_es"\nmemory_gib = 0.0'),
    )
    job = tmp_path / "job.toml"
    job.write_text(job.read_text().replace(f"{specialists.folder}/teacher", str(world.folder / "teacher")))
    result = merge(str(file), output=str(tmp_path / "merged"))
    assert result is not None
    assert list(result["weights"]) == ["embedding", "layers 0 to 1", "layers 2 to end"]
    assert all(sum(row.values()) == pytest.approx(1) for row in result["weights"].values())
    candidates = [json.loads(line) for line in (tmp_path / "merged/candidates.jsonl").read_text().splitlines()]
    assert any(c["weights"][0] != c["weights"][1] for c in candidates[1:]), "groups were searched"
    truth = _kl(specialists, world, tmp_path / "merged", result["domains"])
    assert result["dev_score"] == pytest.approx(truth, rel=1e-4)


def test_a_suite_of_tasks_as_objective(specialists: Specialists, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    suite = tmp_path / "suite.toml"
    suite.write_text(SUITE)
    file = specialists.file(
        tmp_path / "suite_merge.toml", ("[search]", f'[search]\nobjective = "suite"\nsuite = "{suite}"')
    )
    manager = few_tasks("piqa", "openbookqa")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: manager)
    result = merge(str(file), output=str(tmp_path / "merged"))
    assert result is not None and result["score"] == "1 - score"
    candidates = [json.loads(line) for line in (tmp_path / "merged/candidates.jsonl").read_text().splitlines()]
    assert all(set(c["by_domain"]) == {"piqa", "openbookqa"} for c in candidates)
    assert result["dev_score"] == min(c["score"] for c in candidates if "weights" in c)
    # The same as `evaluate` says of the merged checkpoint.
    loaded = load_student(str(tmp_path / "merged"))
    with local_datasets(load_suite(suite).data):
        found = simple_evaluate(
            HarnessModel(StudentModel(loaded.model, 64), Tokenizer.load(loaded.tokenizer)),
            tasks=["piqa", "openbookqa"], num_fewshot=0, limit=8, task_manager=manager, bootstrap_iters=0,
        )["results"]  # fmt: skip
    mean = (found["piqa"]["acc,none"] + found["openbookqa"]["acc,none"]) / 2
    assert result["dev_score"] == pytest.approx(1 - mean)


def _kl(specialists: Specialists, world: SmallWorld, checkpoint: Path, domains: list[str]) -> float:
    """Mean over domains of KL(teacher || student), nats a token, document by document, from full logits."""
    from mobilellm_pro.evaluation.held_out import held_out_documents

    plan = load_merge_plan(specialists.merge)
    student, teacher = load_model(checkpoint).model, load_model(world.folder / "teacher").model
    settings = {"corpora": [[name, str(specialists.folder / "tokens" / name), 1.0] for name in domains]}
    settings |= {"tokens": plan.dev_tokens * len(domains), "longest_document_tokens": 64, "split": "dev"}
    sums, counts = dict.fromkeys(domains, 0.0), dict.fromkeys(domains, 0)
    for name, ids in held_out_documents(settings, Tokenizer.load(plan.job.data.tokenizer)):
        tokens = torch.from_numpy(ids[:-1].astype(np.int64))[None]
        theirs, ours = (model(tokens).double().log_softmax(-1) for model in (teacher, student))
        sums[name] += float((theirs.exp() * (theirs - ours)).sum())
        counts[name] += len(ids) - 1
    return sum(sums[name] / counts[name] for name in domains) / len(domains)


def test_given_weights_and_warnings(specialists: Specialists, tmp_path: Path):
    file = specialists.file(
        tmp_path / "given.toml",
        ("[search]", '[search]\nmethod = "given"'),
        ('name = "a"', 'name = "a"\nweight = 0.25'),
        ('name = "b"', 'name = "b"\nweight = 0.75'),
        ("barrier_points = 2", "barrier_points = 1\ndistance = 0.01\nbarrier = 0.0"),
    )
    result = merge(str(file), output=str(tmp_path / "merged"), device="cpu")
    assert result is not None and result["weights"] == {"all": {"a": 0.25, "b": 0.75}}
    assert result["rows"][-1]["name"] == "given weights" and result["candidates"] == 6
    parent, branch = (load_model(specialists.folder / n).model.state_dict() for n in ("parent", "branch_a"))
    flat = [torch.cat([tensor.flatten() for tensor in state.values()]).double() for state in (parent, branch)]
    expected = float((flat[1] - flat[0]).norm() / flat[0].norm())
    assert result["distances"]["a"] == pytest.approx(expected, rel=1e-6)
    assert sum("more than warnings.distance = 0.01" in warning for warning in result["warnings"]) == 2
    assert all(value is not None and value < 0 for value in result["barriers"].values())


def test_the_file_is_read_strictly(specialists: Specialists, tmp_path: Path):
    """All problems at once."""
    file = specialists.file(
        tmp_path / "bad.toml",
        ('name = "b"', 'name = "a"\nweight = -0.5'),
        ("budget = 16", "budgets = 16\nlayer_groups = [2]\nconcentration = 0"),
        ("barrier_points = 2", "barrier_points = -1"),
    )
    with pytest.raises(ConfigError) as error:
        load_merge_plan(file)
    text = str(error.value)
    for expected in (
        'branch[1].name: found "a" a second time',
        "branch[0].weight: found nothing; expected a weight of every branch, or of none",
        "branch[1].weight: found -0.5; expected a number of at least 0, or search.allow_negative = true",
        "did you mean budget?",
        "search.layer_groups: found [2]; expected first layers in ascending order, beginning with 0",
        "search.concentration: found 0.0",
        "warnings.barrier_points: found -1",
    ):
        assert expected in text
    for weights, message in (((0.5, 0.6), "weights that sum to 1.1"), ((0.5, 0.5000005), None)):
        file = specialists.file(
            tmp_path / "sum.toml",
            *((f'name = "{name}"', f'name = "{name}"\nweight = {w}') for name, w in zip("ab", weights)),
            ("budget = 16", 'method = "given"'),
        )
        if message is None:
            assert load_merge_plan(file).given == [0.5, 0.5000005]
        else:
            with pytest.raises(ConfigError, match=message):
                load_merge_plan(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x"], "found no b; expected all branches of the file"),
        (["a=x", "b=y", "a=z"], '"a" a second time'),
        (["a=x", "b=y", "bb=z"], 'found "bb"; expected one of a, b; did you mean b'),
        (["a=x", "b"], 'found "b"; expected name=checkpoint'),
    ],
)
def test_words_name_every_branch_once(specialists: Specialists, words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_merge_plan(specialists.merge, branches=words)


def test_checkpoints_that_do_not_belong_together(specialists: Specialists, tmp_path: Path):
    """Another parent, another architecture, a checkpoint twice, no dev part: everything is said at once."""
    job, parent = specialists.folder / "job.toml", specialists.folder / "parent"
    other = write_run(tmp_path / "other", job, load_model(parent).model, tmp_path / "elsewhere/step-9")
    shape = ("--attention.window", "8")
    deviating = write_run(tmp_path / "window", job, load_model(parent).model, parent / "checkpoint/step-1", *shape)
    same = specialists.folder / "branch_a"
    fresh = write_run(tmp_path / "fresh", job, load_model(parent).model)
    file = specialists.file(
        tmp_path / "3_merge.toml",
        (f'checkpoint = "{specialists.folder}/branch_b"', f'checkpoint = "{same}/checkpoint/step-1"'),
        ("[search]", f'[[branch]]\nname = "c"\ncheckpoint = "{other}"\n[search]'),
        ("[warnings]", f'[[branch]]\nname = "d"\ncheckpoint = "{deviating}"\n[warnings]'),
        ("budget = 16", "budget = 30"),
    )
    text = (
        file.read_text()
        + f'[[branch]]\nname = "e"\ncheckpoint = "{fresh}"\n[[branch]]\nname = "f"\ncheckpoint = "no"\n'
    )
    file.write_text(text + f'[[domain]]\nname = "a"\npath = "{specialists.folder}/first/tokens/a"\n')
    with pytest.raises(JobError) as error:
        merge(str(file), parent=str(parent), output=str(tmp_path / "merged"))
    text = str(error.value)
    for expected in (
        f"branch b: {same}/checkpoint/step-1 is a's checkpoint too",
        "the branches began from different checkpoints",
        "elsewhere/step-9",
        "branch d: sliding_window is 8, the parent's is 16",
        "branch e: ",
        "began from random weights",
        "branch f: no: expected a run folder",
        "domain a: ",
    ):
        assert expected in text, text
    assert not (tmp_path / "merged").exists(), "nothing is written before all is checked"


def test_a_parent_that_is_not_the_branches(specialists: Specialists):
    with pytest.raises(JobError, match=r"parent: .*branch_a/checkpoint/step-1, but the branches began from others"):
        merge(str(specialists.merge), parent=str(specialists.folder / "branch_a"))


def test_the_shipped_files_merge_the_same_branches():
    folder = Path(__file__).parents[2] / "train_configs"
    debug, real = (load_merge_plan(folder / name / "3_merge.toml") for name in ("debug", "mobilellm_pro_1b"))
    names = ["knowledge", "code", "mathematics", "questions"]
    assert [branch.name for branch in debug.branches] == [branch.name for branch in real.branches] == names
    for plan in (debug, real):
        assert plan.parent == plan.job.job.dump_folder and plan.given is None
        assert {domain.path for domain in plan.domains} == {dataset.path for dataset in plan.job.data.datasets}
        assert all(branch.checkpoint.endswith(f"3_specialist_{branch.name}") for branch in plan.branches)


def test_rows_hold_whole_documents():
    documents = [np.arange(1, n + 2) * 10 for n in (5, 3, 4, 8, 1)]
    tokens, labels, numbers = pack(documents, 8)
    assert tokens.shape == (4, 8)
    assert tokens[0].tolist() == [10, 20, 30, 40, 50, 10, 20, 30] and labels[0].tolist()[:6] == [20, 30, 40, 50, 60, 20]
    assert numbers[0].tolist() == [0] * 5 + [1] * 3 and numbers[1].tolist() == [0] * 4 + [1] * 4
    assert labels[1].tolist() == [20, 30, 40, 50, -100, -100, -100, -100]
    assert (labels >= 0).sum() == sum(len(ids) - 1 for ids in documents)


def test_one_text_for_all_candidates(specialists: Specialists):
    plan = load_merge_plan(specialists.merge)
    text = read_text(plan, "dev", Tokenizer.load(plan.job.data.tokenizer), "cpu")
    assert all(plan.dev_tokens * 0.8 < domain.num_tokens <= plan.dev_tokens for domain in text.values())
    model = load_model(specialists.folder / "parent").model
    first, second = (bits_per_byte(model, text) for _ in range(2))  # type: ignore[arg-type]
    assert first == second and all(math.isfinite(value) for value in first.values())
