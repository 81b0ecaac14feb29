"""`datasets.toml`: every problem is reported with its key, and keys that a format does not read are problems."""

from pathlib import Path

import pytest

from mobilellm_pro.data.dataset_config import DatasetConfig, load_datasets_config
from mobilellm_pro.data.source import Document, Source

ROOT = Path(__file__).parents[2]


def load(folder: Path, *tables: str) -> list[DatasetConfig]:
    path = folder / "datasets.toml"
    path.write_text('tokenizer = "t"\noutput = "o"\n' + "".join(f"[[dataset]]\n{table}\n" for table in tables))
    return load_datasets_config(path).datasets


def test_all_problems_of_a_toml_at_once(tmp_path: Path):
    path = tmp_path / "datasets.toml"
    path.write_text(
        'tokeniser = "x"\noutput = 3\n[[dataset]]\nname = "a/b"\nsource = "x"\nholdout = 1.5\nformat = "csv"\n'
        '[[dataset]]\nname = "c"\nsource = []\ntext_colum = "y"\nbos = 1\nlanguages = "en"\n[[dataset]]\nname = "c"\n'
    )
    with pytest.raises(ValueError, match="did you mean") as error:
        load_datasets_config(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    for expected in (
        "tokeniser: unknown key; did you mean 'tokenizer'?",
        "tokenizer: expected a string, found None",
        "output: expected a string, found 3",
        "dataset[0].name: expected letters",
        "dataset[0].holdout: expected a share",
        "dataset[0].format: expected one of jsonl, parquet, folder, hub, megatron, found 'csv'",
        "dataset[1].source: expected a path or a list of paths",
        "dataset[1].text_colum: unknown key; did you mean 'text_column'?",
        "dataset[1].bos: expected bool, found 1",
        "dataset[1].languages: expected a list of strings, found 'en'",
        "dataset[2].source: missing",
        "dataset: the name 'c' occurs twice",
    ):
        assert any(expected in line for line in lines), expected


@pytest.mark.parametrize(("content", "message"), [("x = [", "not valid TOML"), ("", "at least one")])
def test_bad_toml(tmp_path: Path, content: str, message: str):
    (tmp_path / "d.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_datasets_config(tmp_path / "d.toml")
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        load_datasets_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("folder", 'text_column = "x"'),
        ("folder", 'id_column = ""'),
        ("megatron", "min_chars = 1"),
        ("megatron", "bos = true"),
        ("megatron", 'language_column = "x"'),
        ("jsonl", 'subset = "x"'),
        ("parquet", 'hub_split = "train"'),
        ("jsonl", 'hub_files = "x"'),
    ],
)
def test_keys_that_a_format_does_not_read(tmp_path: Path, format: str, key: str):
    name = key.split()[0]
    with pytest.raises(
        ValueError, match=rf"dataset\[0\]\.{name}: the format '{format}' does not read this key \(.* do\)"
    ):
        load(tmp_path, f'name = "a"\nsource = "x"\nformat = "{format}"\n{key}')


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('languages = ["en"]', "languages: needs language_column"),
        ('format = "hub"\nsubset = "x"\nhub_files = "y"', "subset: not read beside hub_files"),
        ("holdout = 0.5\ndev = 0.5", "dev: with holdout it takes 1 of the documents, expected below 1 together"),
        ("dev = -0.1", "dev: expected a share of at least 0 and below 1, found -0.1"),
        ("clusters = 1", "clusters: expected 0, or 2 to 65536, found 1"),
        ('text_column = ""', "text_column: expected the name of a column"),
        ('language_column = "l"\nlanguages = [1]', "languages: expected a list of strings"),
    ],
)
def test_keys_that_do_not_fit_together(tmp_path: Path, keys: str, message: str):
    with pytest.raises(ValueError, match=rf"dataset\[0\]\.{message}"):
        load(tmp_path, f'name = "a"\nsource = "x"\n{keys}')


def test_settings_are_json_values(tmp_path: Path):
    (dataset,) = load(tmp_path, 'name = "a"\nsource = ["x"]\nlanguage_column = "l"\nlanguages = ["en", "de"]')
    settings = dataset.settings()
    assert not {"dev", "clusters"} & set(settings), "clusters change no token, nor does a dev of 0"
    assert (settings["source"], settings["languages"], settings["hub_split"]) == (["x"], ["en", "de"], "train")


def test_rejects():
    dataset = DatasetConfig("a", ("x",), min_chars=3, language_column="l", languages=("en",))
    cases = {("ab", "en"): "short", (" \n\t ", "en"): "short", ("abc", "de"): "language", ("abc", "en"): ""}
    for (text, language), reason in cases.items():
        assert dataset.rejects(Document("", text, language)) == reason
    assert DatasetConfig("a", ("x",), min_chars=0).rejects(Document("", "")) == "short"
    assert DatasetConfig("a", ("x",)).rejects(Document("", "x", "fr")) == ""


def test_sources(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl", "sub/x", "sub/.hidden/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("12345")
    dataset = DatasetConfig("a", (f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl", f"{tmp_path}/absent*"))
    files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    assert dataset.sources() == [Source(str(file), file, 5) for file in files], (
        "each once, in the order of the patterns"
    )
    assert dataset.unmatched() == [f"{tmp_path}/absent*"]
    folder = DatasetConfig("a", (f"{tmp_path}/sub",), format="folder")
    assert folder.sources() == [Source(f"{tmp_path}/sub", tmp_path / "sub", 5)]


def test_shipped_configurations_load():
    files = sorted((ROOT / "train_configs").glob("*/datasets.toml"))
    assert len(files) == 2
    for file in files:
        assert len(load_datasets_config(file).datasets) >= 5
