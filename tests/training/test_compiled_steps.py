"""What a compiled step of a long run must not do: break a graph, or compile again for other documents."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mobilellm_pro.config import load
from mobilellm_pro.model import attention_mask
from mobilellm_pro.training.distill_trainer import DistillTrainer
from mobilellm_pro.training.train_spec import register
from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
COMPILED = ["--compile.enable", "--compile.components", "model", "--compile.backend", "aot_eager"]


def compiled_steps(job: Path, folder: Path, dense_elements: int) -> tuple[dict[str, int], int, int]:
    """(graph breaks, graphs, layouts of documents) of eight steps, of which the last five may not compile anything."""
    attention_mask.DENSE_ELEMENTS = dense_elements
    register()
    trainer = DistillTrainer(load(job, ["--job.dump_folder", str(folder), "--training.steps", "8", *COMPILED]))
    layouts = set()

    def noted(batches: Iterator[Batch]) -> Iterator[Batch]:
        for rows, labels in batches:
            layouts.add(rows["document_ids"].numpy().tobytes())
            yield rows, labels

    batches = noted(trainer.batch_generator(trainer.dataloader))
    for step in range(8):
        torch._dynamo.config.error_on_recompile = step >= 3
        trainer.step += 1
        trainer.train_step(batches)
    counters = torch._dynamo.utils.counters
    return dict(counters["graph_break"]), counters["stats"]["unique_graphs"], len(layouts)


@pytest.mark.parametrize("dense_elements", [0, attention_mask.DENSE_ELEMENTS])
def test_nothing_is_compiled_again_for_other_documents(world: SmallWorld, tmp_path: Path, dense_elements: int) -> None:
    ((breaks, graphs, layouts),) = run_ranks(compiled_steps, 1, world.job, tmp_path, dense_elements)
    assert not breaks and graphs > 0 and layouts == 8
