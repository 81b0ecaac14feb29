"""What the degrees of parallelism must be to each other, to the batch, and to the number of processes."""

from collections.abc import Iterator

from mobilellm_pro.config.config_error import Issue, Problem
from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.config.teacher_checks import check_teacher_ranks


def check_world_size(config: JobConfig, world_size: int) -> list[Problem]:
    """Problems of the degrees of parallelism and of the batch with this number of processes.

    Args:
        config: a loaded configuration.
        world_size: number of processes of the job, one a device.
    """
    return [Problem("parallelism", issue.key, issue.found, issue.expected) for issue in _mesh(config, world_size)]


def smallest_world_size(config: JobConfig) -> int:
    """The least number of processes that the degrees of parallelism allow: a left-over shard degree counts as small.

    Where the student's degrees leave the number open, the teacher's may ask for more; what fits no number stays.
    """
    parallelism, own = config.parallelism, config.teacher.parallelism
    shard = parallelism.data_parallel_shard_degree
    if shard == -1:  # replicas without shards are refused
        shard = 2 if parallelism.data_parallel_replicate_degree > 1 else 1
    model_degrees = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    smallest = parallelism.data_parallel_replicate_degree * shard * model_degrees
    if parallelism.data_parallel_shard_degree != -1:
        return smallest
    enough = own.tensor_parallel_degree * own.expert_parallel_degree * max(1, own.data_parallel_shard_degree)
    sizes = range(smallest, smallest * enough + 1, smallest)
    return next((size for size in sizes if not any(check_teacher_ranks(config, size))), smallest)


def check_data_parallelism(config: JobConfig) -> Iterator[Issue]:
    """Degrees of data parallelism that no number of processes allows."""
    replicate = config.parallelism.data_parallel_replicate_degree
    shard = config.parallelism.data_parallel_shard_degree
    key = "parallelism.data_parallel_shard_degree"
    if shard != -1 and shard <= 0:
        yield Issue((key,), str(shard), "a positive number, or -1 for the ranks that the other degrees leave")
    if replicate > 1 and shard == 1:
        yield _replicate_only(replicate)


def _replicate_only(replicate: int) -> Issue:
    key = "parallelism.data_parallel_replicate_degree"
    found = f"{replicate} with data_parallel_shard_degree = 1, which would divide the gradients twice"
    expected = f"1, and data_parallel_shard_degree = {replicate}"
    return Issue((key, "parallelism.data_parallel_shard_degree"), found, expected)


def _mesh(config: JobConfig, world_size: int) -> Iterator[Issue]:
    parallelism = config.parallelism
    degrees = {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
    }
    others = 1
    for degree in degrees.values():
        others *= degree
    shard = parallelism.data_parallel_shard_degree
    said = " x ".join(f"{name} {degree}" for name, degree in degrees.items())
    key = "parallelism.data_parallel_shard_degree"
    if others <= 0 or world_size % others or (shard != -1 and shard * others != world_size):
        found = f"data_parallel_shard_degree {shard} x {said} for {world_size} processes"
        yield Issue((key,), found, _mesh_cure(world_size, others, shard))
        return
    shard = world_size // others
    if shard == 1 and parallelism.data_parallel_replicate_degree > 1:
        yield _replicate_only(parallelism.data_parallel_replicate_degree)
    data_ranks = shard * parallelism.data_parallel_replicate_degree
    unit = config.training.local_batch_size * data_ranks
    batch = config.training.global_batch_size
    if batch > 0 and batch % unit:
        expected = f"a multiple of {unit}: local_batch_size times {data_ranks} data parallel ranks"
        yield Issue(("training.global_batch_size",), str(batch), expected)
    yield from check_teacher_ranks(config, world_size)


def _mesh_cure(world_size: int, others: int, shard: int) -> str:
    if others > 0 and world_size % others == 0:
        return f"data_parallel_shard_degree = {world_size // others} or -1, or {max(shard, 1) * others} processes"
    return f"degrees whose product is {world_size}, or a multiple of {others} processes"
