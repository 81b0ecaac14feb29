"""Recorded losses: a change that does not mean to touch the numbers must leave them as they are.

    bash launch/check.sh golden            compare
    bash launch/check.sh golden --write    record anew, after a change that means to

The tolerance is for other processors, whose matrix products add up in another order.
"""

import json
from pathlib import Path

import pytest

from tests.training.small_world import SmallWorld, losses

JOBS = {
    "kl": (),
    "ce": ("--distill.objective", "ce"),
    "weighted": ("--distill.objective", "weighted", "--distill.ce_weight", "0.5", "--distill.temperature", "2.0"),
    "causal_reset": ("--attention.student_mask", "causal", "--attention.positions", "reset"),
    "teacher": ("--model.name", "llama4_text", "--distill.objective", "ce"),
}


@pytest.mark.parametrize("name", JOBS)
def test_losses_are_as_recorded(world: SmallWorld, request: pytest.FixtureRequest, name: str) -> None:
    folder = world.run(f"golden/{name}", 1, "--training.steps", "5", *JOBS[name])
    found = {key: losses(folder, key) for key in ("loss", "grad_norm")}
    path = Path(__file__).with_name(f"{name}.json")
    if request.config.getoption("--write"):
        path.write_text(json.dumps(found, indent=2) + "\n")
    recorded = json.loads(path.read_text())
    for key, values in recorded.items():
        assert found[key] == pytest.approx(values, rel=1e-4), key
