"""The loop of plain_loop.py, exact at any number of workers; see docs/own-loop.md.

python own_loop.py
torchrun --standalone --nproc-per-node 2 own_loop.py
"""

import torch
from torch import nn

import samestep


torch.set_num_threads(1)
torch.manual_seed(0)
inputs = torch.randn(4_000, 20)
labels = inputs[:, :4].argmax(dim=1)
train = torch.utils.data.TensorDataset(inputs, labels)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
loop = samestep.Loop(model, micro_batches=8)

for epoch in range(3):
    for step in loop.steps(train, 64, epoch):
        optimizer.zero_grad()
        for x, y in step:
            loss = criterion(model(x), y)
            loss.backward()
            loop.add(loss=loss * len(y))
        optimizer.step()
    scheduler.step()
    loop.print(epoch, loop.mean(), loop.fingerprint())
