"""Feed-forward layers that route every token to one expert, with the experts on this rank or spread over several.

A token's *input* is scaled by the sigmoid of its router logit, and a shared expert is always added. With an
`expert_group` each rank holds some of the experts: tokens travel to the rank of their expert, ordered by expert, and
their outputs travel back. With tensor parallelism every expert is a slice of its columns and the result is this rank's
summand; the layer adds them up.

Shapes: B rows, S tokens of a row, T tokens, D width, E experts, L experts on this rank, F width of an expert (here).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm_pro.model.student import GatedMLP


class Experts(nn.Module):
    """Gated feed-forward weights of some experts, in Hugging Face's layout [L, in, out]."""

    def __init__(self, num_experts: int, width: int, hidden_width: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, width, 2 * hidden_width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_width, width))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Tokens sorted by expert [T, D], with the end of each expert's tokens [L] int32 -> [T, D]."""
        gate, up = _grouped_product(x, self.weight("gate_up_proj"), ends).chunk(2, dim=-1)
        return _grouped_product(F.silu(gate) * up, self.weight("down_proj"), ends)

    def weight(self, name: str) -> Tensor:
        """A parameter as the product needs it; stored in another form, it is restored here."""
        return getattr(self, name)


def _grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x[ends[e-1]:ends[e]] @ weight[e] for every expert e, [T, in] and [L, in, out] -> [T, out]."""
    if x.dtype == torch.bfloat16 or x.device.type == "cpu":
        return F.grouped_mm(x, weight, offs=ends)
    # On an accelerator the grouped kernel knows bf16 only.
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ matrix for part, matrix in zip(x.split(sizes), weight, strict=True)])


class MoE(nn.Module):
    """Top-1 routing beside a shared expert.

    Args:
        width: D.
        hidden_width: F, of one expert on this rank.
        num_experts: E, of all ranks.
        num_local_experts: L; the ranks of `expert_group` hold consecutive experts in their order.
    """

    def __init__(self, width: int, hidden_width: int, num_experts: int, num_local_experts: int):
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = Experts(num_local_experts, width, hidden_width)
        self.shared_expert = GatedMLP(width, hidden_width)
        self.expert_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        tokens = x.flatten(0, -2)
        logit, expert = self.router(tokens).max(dim=-1)
        scaled = tokens * torch.sigmoid(logit.float()).to(tokens.dtype).unsqueeze(-1)
        order = expert.argsort(stable=True)
        run = self.experts if self.expert_group is None else self._run_elsewhere
        routed = run(scaled[order], _ends(expert[order], self.router.out_features))
        # A stable sort has an inverse permutation; gathering with it is cheaper than a scatter of rows.
        return self.shared_expert(x) + routed[order.argsort()].view_as(x)

    def _run_elsewhere(self, x: Tensor, ends: Tensor) -> Tensor:
        """`Experts.forward` where every rank of the group has other tokens and other experts, [T, D] -> [T, D]."""
        group = self.expert_group
        num_ranks = dist.get_world_size(group)
        sent = ends.diff(prepend=ends.new_zeros(1))
        received = torch.empty_like(sent)  # [ranks · L]: of every rank, how many for each expert here
        dist.all_to_all_single(received, sent, group=group)
        sizes = torch.stack((sent, received)).unflatten(1, (num_ranks, -1)).sum(-1)
        sent_sizes, received_sizes = sizes.tolist()  # the host waits for the device: it launches the exchange
        arrived = _exchange(x, sent_sizes, received_sizes, group)
        num_local = received.numel() // num_ranks
        local = torch.arange(num_local, device=x.device).repeat(num_ranks)
        expert = local.repeat_interleave(received, output_size=arrived.shape[0])
        order = expert.argsort(stable=True)
        done = self.experts(arrived[order], _ends(expert[order], num_local))
        return _exchange(done[order.argsort()], received_sizes, sent_sizes, group)


def _ends(sorted_experts: Tensor, num_experts: int) -> Tensor:
    """Where each expert's tokens end, [T] -> [E] int32. Unlike a count it has a fixed shape: the device never waits."""
    experts = torch.arange(num_experts, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sends `sent[r]` consecutive rows to rank r of the group and returns what the ranks sent here, in their order."""
    arrived = x.new_empty(sum(received), x.shape[1])
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group=group)
    return arrived
