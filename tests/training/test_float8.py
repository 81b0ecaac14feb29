"""Linear layers that multiply in float8: torchtitan's converter on our student, emulated where no GPU can do it."""

import pytest

from mobilellm_pro.evaluation.student_checkpoint import load_student
from tests.training.small_world import SmallWorld, losses

FLOAT8 = ("--model.converters", "quantize.linear.float8", "--quantize.linear.float8.emulate")


def test_losses_differ_by_rounding_and_checkpoints_load(world: SmallWorld) -> None:
    plain = losses(world.run("float8/plain", 1))
    one = world.run("float8/one", 1, *FLOAT8, "--checkpoint.enable", "--checkpoint.interval", "3")
    assert losses(one) == pytest.approx(plain, rel=1e-2) and losses(one) != plain
    sharded = losses(world.run("float8/two", 2, *FLOAT8, "--training.local_batch_size", "2"))
    assert sharded == pytest.approx(losses(one), rel=1e-3)  # a rank scales its own rows
    load_student(str(one))
