"""Accelerate with DDP: other weights at each number of processes.

torchrun --nproc-per-node 2 accelerate_plain.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


accelerator = Accelerator(cpu=True)
set_seed(0)
inputs = torch.randn(4_000, 20)
samples = TensorDataset(inputs, inputs[:, :4].argmax(dim=1))
train, test = torch.utils.data.random_split(samples, [3_500, 500])
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader, test_loader = DataLoader(train, 64, shuffle=True), DataLoader(test, 100)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * len(loader))
model, optimizer, loader, test_loader, schedule = accelerator.prepare(
    model, optimizer, loader, test_loader, schedule
)
for epoch in range(3):
    model.train()
    for x, y in loader:
        loss = criterion(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    right = []
    for x, y in test_loader:
        with torch.no_grad():
            found = model(x).argmax(dim=1)
        found, y = accelerator.gather_for_metrics((found, y))
        right.append(found == y)
    accelerator.print(epoch, float(torch.cat(right).double().mean()))
accelerator.print(sum(float(p.detach().double().sum()) for p in model.parameters()))
accelerator.end_training()
