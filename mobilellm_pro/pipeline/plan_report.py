"""A plan as text: Markdown tables with a column for each number of ranks, and the assumptions under them."""

from collections.abc import Callable, Iterable

from mobilellm_pro.config import JobConfig
from mobilellm_pro.pipeline.rank_plan import Assumptions, RankPlan
from mobilellm_pro.pipeline.step_time import Hardware

SECONDS_OF_A_DAY = 86_400

Row = tuple[str, list[str]]


def report(
    config: JobConfig, config_path: str, plans: list[RankPlan], given: Assumptions, cards: dict[str, Hardware]
) -> str:
    """Everything that the `plan` verb prints."""
    sections = [
        ("", _step_rows(config, plans)),
        ("Memory of a rank, GB", _memory_rows(plans, given, cards)),
        ("Operations of a step, all ranks, PFLOP", _flop_rows(plans)),
        ("Bytes that arrive at a rank in a step, GB", _transfer_rows(plans)),
    ]
    sections += [(f"Time on {card.name}, estimated", _time_rows(plans, key, given)) for key, card in cards.items()]
    lines = [f"# Plan of {config_path}", ""]
    for title, rows in sections:
        lines += ([f"## {title}", ""] if title else []) + _table(plans, rows) + [""]
    return "\n".join([*lines, *_assumption_lines(config, given, cards)])


def _table(plans: list[RankPlan], rows: Iterable[Row]) -> list[str]:
    header = ("", [f"{one.shape.world_size:,} rank{'s' * (one.shape.world_size > 1)}" for one in plans])
    cells = [[name, *values] for name, values in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    padded = [
        f"| {row[0]:<{widths[0]}} | " + " | ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:])) + " |"
        for row in cells
    ]
    rule = f"|{'-' * (widths[0] + 2)}|" + "|".join(f"{'-' * (width + 1)}:" for width in widths[1:]) + "|"
    return [padded[0], rule, *padded[1:]]


def _row(name: str, plans: list[RankPlan], value: "Callable[[RankPlan], str]") -> Row:
    return name, [value(one) for one in plans]


def _step_rows(config: JobConfig, plans: list[RankPlan]) -> list[Row]:
    rows = [
        _row("student: parameters", plans, lambda p: f"{p.student_parameters:,}"),
        _row("student: replicas x shards x context x tensor", plans, _student_degrees),
    ]
    if plans[0].teacher_parameters:
        rows += [
            _row("teacher: parameters", plans, lambda p: f"{p.teacher_parameters:,}"),
            _row("teacher: tensor, expert, shard", plans, lambda p: ", ".join(map(str, p.teacher_degrees.values()))),
        ]
    return [
        *rows,
        _row("rows of a micro-batch and rank", plans, lambda p: str(p.shape.rows)),
        _row("tokens of it on the rank", plans, lambda p: f"{p.shape.tokens:,}"),
        _row("micro-batches of a step", plans, lambda p: str(p.shape.micro_batches)),
        _row("rows of a step, all ranks", plans, lambda p: f"{p.shape.step_rows:,}"),
        _row("tokens of a step, all ranks", plans, lambda p: f"{p.shape.step_tokens:,}"),
        _row(f"tokens of {config.training.steps:,} steps", plans, lambda p: _count(p.shape.step_tokens * p.steps)),
    ]


def _student_degrees(one: RankPlan) -> str:
    shape = one.shape
    return f"{shape.replicate} x {shape.shard // shape.context} x {shape.context} x {shape.tensor}"


def _memory_rows(plans: list[RankPlan], given: Assumptions, cards: dict[str, Hardware]) -> list[Row]:
    first = plans[0].memory
    used = plans[0].shape.checkpointing
    rows = [_row(name, plans, lambda p, name=name: _gb(p.memory.held[name])) for name in first.held]  # type: ignore[misc]
    for name in first.at_work:
        if name != "student activations" and any(p.memory.at_work[name] for p in plans):
            rows.append(_row(name, plans, lambda p, name=name: _gb(p.memory.at_work[name])))  # type: ignore[misc]
    for mode in first.activations:
        mark = " (as configured)" if mode == used else ""
        text = f'student activations, checkpointing "{mode}"{mark}'
        rows.append(_row(text, plans, lambda p, mode=mode: _gb(p.memory.activations[mode])))  # type: ignore[misc]
    for moment in first.moments:
        rows.append(_row(f"at {moment}", plans, lambda p, moment=moment: _gb(p.memory.moments[moment])))  # type: ignore[misc]
    rows.append(_row("**peak**", plans, lambda p: f"**{_gb(p.memory.peak)}** at {p.memory.peak_moment}"))
    for card in cards.values():
        text = f"fits {card.name}, {card.memory_bytes / 1e9:g} GB less {given.allowance_bytes / 1e9:g}"
        rows.append(_row(text, plans, lambda p, card=card: _fits(p.memory.peak, card, given)))  # type: ignore[misc]
    return rows


def _fits(peak: int, card: Hardware, given: Assumptions) -> str:
    left = card.memory_bytes - given.allowance_bytes - peak
    return f"yes, {_gb(left)} left" if left >= 0 else f"NO, {_gb(-left)} too much"


def _flop_rows(plans: list[RankPlan]) -> list[Row]:
    rows = [
        _row(name, plans, lambda p, name=name: f"{p.flops[name] / 1e15:.3g}")  # type: ignore[misc]
        for name in plans[0].flops
        if any(p.flops[name] for p in plans)
    ]
    rows.append(_row("**all**", plans, lambda p: f"**{sum(p.flops.values()) / 1e15:.4g}**"))
    rows.append(_row("GFLOP a token", plans, lambda p: f"{sum(p.flops.values()) / p.shape.step_tokens / 1e9:.1f}"))
    mean = "busiest rank over the mean"
    rows.append(_row(mean, plans, lambda p: f"{_busiest(p):.3f}"))
    return rows


def _busiest(one: RankPlan) -> float:
    return sum(one.busiest_flops.values()) * one.shape.world_size / sum(one.flops.values())


def _transfer_rows(plans: list[RankPlan]) -> list[Row]:
    kinds = dict.fromkeys(transfer.kind for one in plans for transfer in one.transfers)

    def moved(one: RankPlan, kind: str) -> str:
        return _gb(sum(transfer.num_bytes for transfer in one.transfers if transfer.kind == kind))

    return [_row(kind, plans, lambda p, kind=kind: moved(p, kind)) for kind in kinds]  # type: ignore[misc]


def _time_rows(plans: list[RankPlan], key: str, given: Assumptions) -> list[Row]:
    first = plans[0].times[key]
    rows = [
        _row(f"{name}: products, s", plans, lambda p, name=name: f"{p.times[key].products[name]:.3f}")  # type: ignore[misc]
        for name in first.products
    ]
    rows += [
        _row(f"{name}: memory, s", plans, lambda p, name=name: f"{p.times[key].from_memory[name]:.3f}")  # type: ignore[misc]
        for name in first.from_memory
    ]
    for kind in dict.fromkeys(kind for one in plans for kind in one.times[key].transfers):
        rows.append(_row(f"({kind}, s)", plans, lambda p, kind=kind: f"{p.times[key].transfers.get(kind, 0):.3f}"))  # type: ignore[misc]
    rows.append(_row("waiting for transfers, s", plans, lambda p: f"{p.times[key].waiting:.3f}"))
    rows.append(_row("**step, s**", plans, lambda p: f"**{p.times[key].total:.3f}**"))
    rows.append(_row("tokens/s of a rank", plans, lambda p: f"{_speed(p, key) / p.shape.world_size:,.0f}"))
    tokens = "the phase" if given.tokens is None else f"{_count(given.tokens)} tokens"

    def days(one: RankPlan) -> float:
        wanted = one.shape.step_tokens * one.steps if given.tokens is None else given.tokens
        return wanted / _speed(one, key) / SECONDS_OF_A_DAY

    rows.append(_row(f"**days of {tokens}**", plans, lambda p: f"**{days(p):.2f}**"))
    return rows


def _speed(one: RankPlan, key: str) -> float:
    return one.shape.step_tokens / one.times[key].total


def _assumption_lines(config: JobConfig, given: Assumptions, cards: dict[str, Hardware]) -> list[str]:
    links = given.links
    peaks = "; ".join(
        f"{card.name} {card.peak_flops / 1e12:g} TFLOP/s in bf16, {card.memory_bandwidth / 1e12:g} TB/s"
        for card in cards.values()
    )
    documents = (
        "a row is one document, which is most" if given.document_tokens is None else f"of {given.document_tokens:,}"
    )
    masked = {config.attention.student_mask, config.attention.teacher_mask} != {"causal"}
    return [
        "Assumed, not measured:",
        f"- products run at {given.utilisation:.0%} of the peak, recomputed ones included; {peaks}",
        f"- {links.node_bandwidth / 1e9:g} GB/s a rank inside a node of {links.ranks_per_node}, "
        f"{links.network_bandwidth / 1e9:g} GB/s a rank between nodes",
        "- a collective crosses the border of each node once, on the network cards of all its ranks there",
        "- FSDP2's transfers run beside the products of the same model; all others wait",
        f"- keys of a query, tokens: {documents if masked else 'the row before it'}; experts are balanced",
        f"- {given.allowance_bytes / 1e9:g} GB of a card for CUDA's context, NCCL's buffers and fragmentation",
        "- activations as eager layers keep them; compiled ones keep less. GB are 10^9 bytes",
    ]


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}" if num_bytes >= 5e6 or num_bytes == 0 else f"{num_bytes / 1e9:.1g}"


def _count(tokens: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= scale:
            return f"{tokens / scale:.3g}{unit}"
    return f"{tokens:,.0f}"
