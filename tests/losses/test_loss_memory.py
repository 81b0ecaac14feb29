"""Memory beyond inputs and gradients stays within the budget, however many tokens there are.

Resident peak of a fresh process, since the allocator's own numbers do not see what the products take.

Shape suffixes: T tokens, V vocabulary, D width of student and teacher.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json
from pathlib import Path
import torch
from mobilellm_pro.losses import linear_distillation, token_chunks

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024

def step(tokens, vocabulary, dtype):
    hidden_TD, head_VD = torch.randn(tokens, 32).to(dtype), torch.randn(vocabulary, 32).to(dtype)
    labels = torch.zeros(tokens, dtype=torch.int64)
    inputs = [x.requires_grad_() for x in (hidden_TD, head_VD)]
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    linear_distillation(*inputs, hidden_TD.detach(), head_VD.detach(), labels, ce_weight=0.5).loss.backward()
    return status("VmHWM") - before

step(20, 500, torch.bfloat16)
token_chunks.LOGIT_BYTES["cpu"] = 32 * 2**20
print(json.dumps([step(500, 50000, torch.bfloat16), step(1000, 50000, torch.bfloat16)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_within_the_budget_whatever_the_number_of_tokens():
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    peaks = json.loads(done.stdout)
    # Logits, five tiles of 5 MiB, the head's gradient in fp32 and its conversion. All logits of the larger call would
    # be 381 MiB in fp32, and a peak that grew with the tokens would double.
    assert max(peaks) < 32 + 25 + 12 + 32, peaks
    assert peaks[1] < peaks[0] + 16, peaks
