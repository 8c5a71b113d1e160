"""A plain training loop; own_loop.py has the same loop made exact.

python plain_loop.py
"""

import torch
from torch import nn


torch.set_num_threads(1)
torch.manual_seed(0)
inputs = torch.randn(4_000, 20)
labels = inputs[:, :4].argmax(dim=1)
train = torch.utils.data.TensorDataset(inputs, labels)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)

for epoch in range(3):
    total = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        total += loss.item() * len(y)
        optimizer.step()
    scheduler.step()
    print(epoch, total / len(train))
