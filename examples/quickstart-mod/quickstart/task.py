"""The network, the data and the loops: nothing here knows of Flower or of locks."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLE = torch.zeros(2, 1, 8, 8)


class Net(nn.Module):
    """Two convolutions and a linear layer for 8×8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, 10), of images (B, 1, 8, 8) in [0, 1]."""
        out: Tensor = self.layers(x)
        return out


def loaders(partition: int, partitions: int) -> tuple[DataLoader, DataLoader]:
    """Training and test images of one client."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    rows = torch.arange(partition, len(y), partitions)
    cut = int(0.8 * len(rows))
    train, test = (TensorDataset(x[r], y[r]) for r in (rows[:cut], rows[cut:]))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=256)


def train(model: nn.Module, loader: DataLoader, lr: float) -> float:
    """One epoch; the mean loss."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    total = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += float(loss) * len(y)
    return total / len(loader.dataset)


def test(model: nn.Module, loader: DataLoader) -> float:
    """Accuracy in [0, 1]."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)
