"""Seconds of a step on stated hardware: products at a share of the peak, bytes at a bandwidth.

An estimate under assumptions that the caller states and a plan prints, not a measurement. What FSDP2 moves runs beside
the products of the same model and costs only what is longer than they are; everything else waits. A collective of ranks
on several nodes crosses each node's border once, on the network cards of its own ranks, as rings do.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from mobilellm_pro.pipeline.step_work import Transfer


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its links; bytes are decimal, bandwidths one way."""

    name: str
    memory_bytes: float
    peak_flops: float
    """bf16, dense."""

    memory_bandwidth: float
    """Bytes a second."""


HARDWARE = {
    "h100": Hardware("H100 SXM", 80e9, 989e12, 3.35e12),
    "h200": Hardware("H200 SXM", 141e9, 989e12, 4.8e12),
}


@dataclass(frozen=True)
class Links:
    """How ranks reach each other."""

    node_bandwidth: float
    """Bytes a second that one rank receives inside a node."""

    network_bandwidth: float
    """Bytes a second that one rank receives from other nodes, on a card of its own."""

    ranks_per_node: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    products: dict[str, float]
    """Of student, teacher and loss."""

    transfers: dict[str, float]
    """Of every kind, its groups added up, whether something else runs beside it or not."""

    waiting: float
    """What the transfers add to the step."""

    from_memory: dict[str, float]
    """Optimizer, and the loss' passes over logits."""

    @property
    def total(self) -> float:
        """All that is not hidden behind something else."""
        return sum(self.products.values()) + self.waiting + sum(self.from_memory.values())


def transfer_seconds(transfer: Transfer, links: Links) -> float:
    """Seconds of one, by the slower of the links inside a node and those between nodes."""
    on_nodes = Counter(rank // links.ranks_per_node for rank in transfer.members)
    per_node, nodes = max(on_nodes.values()), len(on_nodes)
    inside = transfer.num_bytes / links.node_bandwidth if per_node > 1 else 0.0
    if nodes == 1:
        return inside
    whole = transfer.num_bytes * transfer.ranks / (transfer.ranks - 1)
    from_outside = whole * (nodes - 1) / nodes
    if transfer.kind.startswith("teacher tokens"):
        # All-to-all: what comes from other nodes comes for this rank alone.
        from_outside = whole * (transfer.ranks - per_node) / transfer.ranks * per_node
    return max(inside, from_outside / (per_node * links.network_bandwidth))


def step_time(
    flops: dict[str, float],
    transfers: list[Transfer],
    memory_traffic: dict[str, float],
    hardware: Hardware,
    links: Links,
    *,
    utilisation: float,
) -> StepTime:
    """Time of the busiest rank.

    Args:
        flops: operations of "student", "teacher" and "loss" in a step.
        transfers: of a step.
        memory_traffic: bytes that element-wise work reads and writes, by kind.
        hardware: the accelerator.
        links: between ranks.
        utilisation: share of the peak at which products run, recomputed ones included.
    """
    products = {kind: amount / (hardware.peak_flops * utilisation) for kind, amount in flops.items()}
    by_kind: dict[str, float] = defaultdict(float)
    by_model: dict[str, float] = defaultdict(float)
    for transfer in transfers:
        # One kind may move in groups of several sizes: the teacher's experts are gathered by fewer ranks.
        seconds = transfer_seconds(transfer, links)
        by_kind[transfer.kind] += seconds
        by_model[transfer.hidden_behind] += seconds
    waiting = by_model[""] + sum(max(0.0, by_model[model] - products[model]) for model in ("student", "teacher"))
    from_memory = {kind: amount / hardware.memory_bandwidth for kind, amount in memory_traffic.items()}
    return StepTime(products, dict(by_kind), waiting, from_memory)
