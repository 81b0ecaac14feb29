"""The resolved configuration is TOML and loads to an equal configuration."""

import tomllib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from test_config_checks import valid

from mobilellm_pro.config import JobConfig, load, resolved_toml
from mobilellm_pro.config.job_config import Dataset
from mobilellm_pro.config.no_effect import has_no_effect, value_at
from mobilellm_pro.config.typed_values import all_keys


def test_round_trip(tmp_path: Path):
    config = valid(
        attention__global_layers=[0, 3],
        attention__rope_base=5e5,
        optimizer__lr=1e-5,
        optimizer__eps=1e-08,
        checkpoint__exclude_from_loading=["a", 'b"c'],
        training__dataloader__num_workers=2,
        training__max_norm=2,
        job__description='quotes " and \\ and\nlines and \x7f and ü',
    )
    path = tmp_path / "resolved.toml"
    path.write_text(resolved_toml(config), encoding="utf-8")
    again = load(path)
    assert again == config
    assert resolved_toml(again) == resolved_toml(config)


text = st.text(st.characters(codec="utf-8"), min_size=1)


@settings(max_examples=50, deadline=None)
@given(
    description=text,
    datasets=st.lists(
        st.builds(Dataset, text, text, st.floats(1e-9, 1e9)), min_size=1, unique_by=lambda item: item.name
    ),
    rope_base=st.floats(1e-300, 1e300),
    layers=st.none() | st.lists(st.integers(0, 2**31)),
)
def test_any_values_survive(description: str, datasets: list[Dataset], rope_base: float, layers: list[int] | None):
    config = valid(job__description=description, attention__rope_base=rope_base, attention__global_layers=layers)
    config.data.datasets = datasets
    values = tomllib.loads(resolved_toml(config))
    assert values["job"]["description"] == description
    assert values["attention"]["rope_base"] == rope_base
    assert values["attention"].get("global_layers") == layers
    assert [Dataset(**table) for table in values["data"]["datasets"]] == datasets


def test_it_holds_every_key_that_is_set_and_has_an_effect():
    values = tomllib.loads(resolved_toml(valid()))
    for key, _ in all_keys(JobConfig):
        *sections, name = key.split(".")
        table = values
        for section in sections:
            table = table.get(section, {})
        assert (name in table) == (value_at(valid(), key) is not None and not has_no_effect(key)), key


def test_a_key_that_is_set_by_default_and_has_an_effect_can_always_be_written():
    """TOML cannot say None, so no optional key may have another default: it could not be unset in a file."""
    for key, hint in all_keys(JobConfig):
        optional = "None" in str(hint)
        assert not optional or has_no_effect(key) or value_at(JobConfig(), key) is None, key
