"""Sums over Gloo that begin in a loop's last backward pass, whatever a script does."""

import json
from pathlib import Path

from test_loop import by_workers


SCRIPT = """
import json, os, socket, torch, samestep
from torch import nn
from samestep.loop import overlap

overlap.BUCKET_BYTES = 300
if os.environ.get("GIVEN") == "alone":  # each on its own machine
    socket.gethostname = lambda: os.environ["RANK"]
sent = []  # of each bucket: whether the backward pass was under way
send = overlap.OverlappingGloo.send_bucket

def noted(exchange, bucket):
    sent.append(is_within)
    send(exchange, bucket)

overlap.OverlappingGloo.send_bucket = noted


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(9, 9) for _ in range(5)])

    def forward(self, x, skipped):
        for number, layer in enumerate(self.layers):
            if number not in skipped:
                x = torch.tanh(layer(x)) + x
        return x


def backward(loss):
    global is_within
    is_within = True
    loss.backward()
    is_within = False


def weigh(x):
    loop.weigh((x > 0).sum())


def compute(x, step):
    if kind == "weighed before":
        weigh(x)
    # The branch is that of the micro-batch, not of its place.
    skipped = {1, 4} if kind == "skipped" and x[0, 0] > 0 else {}
    backward(model(x, skipped).square().mean())
    if kind == "weighed after":
        weigh(x)
    if kind == "twice":
        backward(model(x, {2}).mean())
    if kind == "clipped" and step >= 2:
        for parameter in model.parameters():
            parameter.grad.data.clamp_(-0.001, 0.001)  # which autograd does not count
    if kind == "replaced":
        model.layers[3].weight.grad = None


torch.manual_seed(1)
data = torch.randn(72, 9)
is_within = False
for kind in KINDS:
    torch.manual_seed(0)
    model = Net()
    loop = samestep.Loop(
        model, micro_batches=6, exchange="gloo", balance="random"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == "given up":
        for x in next(loop.steps(data, 12, epoch=1)):
            backward(model(x, {}).mean())
            break
        loop.print(json.dumps(loop.gather(0.0)))  # other messages between
    early = []
    for step, batches in enumerate(loop.steps(data, 12, epoch=0)):
        sent.clear()
        for x in batches:
            compute(x, step)
        early.append(sum(sent))
        optimizer.step()
    found = loop.gather(early)
    loop.print(json.dumps([kind, loop.fingerprint(), found]))
"""

BUCKETS = 5
STEPS = 6
FIRST_ONLY = [BUCKETS, *[0] * (STEPS - 1)]
EARLY = {
    "plain": [BUCKETS] * STEPS,
    "weighed before": [BUCKETS] * STEPS,
    "weighed after": FIRST_ONLY,
    "twice": FIRST_ONLY,
    "clipped": [BUCKETS] * 3 + [0] * (STEPS - 3),
    "replaced": FIRST_ONLY,
    "given up": [BUCKETS] * STEPS,
    "skipped": None,
}
"""How many buckets leave during the backward pass, step by step."""


def test_gradients_leave_early_and_change_no_bit(tmp_path: Path) -> None:
    """A gradient that changes afterwards is sent again, and later ones not early.

    Workers of one machine send around a ring, those of several directly.
    """
    script = SCRIPT.replace("KINDS", str(list(EARLY)))
    groups = 1, 2, 3, "2=alone", "3=alone"
    lines = [line for line in by_workers(script, tmp_path, *groups) if "[[" in line]
    rows, kinds = [json.loads(line) for line in lines], len(EARLY)
    assert len(rows) == len(groups) * kinds
    alone, *others = (rows[i : i + kinds] for i in range(0, len(rows), kinds))
    for some in others:
        for (kind, sha256, early), (_, expected, _) in zip(some, alone, strict=True):
            assert sha256 == expected, kind
            if EARLY[kind] is not None:
                assert early == [EARLY[kind]] * len(early), kind
