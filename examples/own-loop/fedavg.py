"""Federated averaging in a loop of your own, under a pad: PyTorch and the functions of FedKL.

``python fedavg.py --folder runs/own`` trains; the same again, with more ``--rounds``, goes on. A
client shows all its images a round here and keeps a pad for several rounds, which teaches the loop;
what hides single images is in docs/findings.md. Updates are sent at one length, so that their size
does not tell how badly the model does on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fedkl
from fedkl.errors import KeyFileError

CLIENTS, RATE, RENEW_EVERY = 3, 0.05, 5
LENGTH = 1.5  # agreed by all; about how far a client moves in a round by itself
State = dict[str, Tensor]


def network() -> nn.Module:
    """Logits, (B, 10), of images (B, 1, 8, 8)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Client:
    """Has images, a key and a lock. What ``train`` returns leaves it; its folder never does."""

    def __init__(self, folder: Path, x: Tensor, y: Tensor) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / "client.key").exists():
            fedkl.Key.generate().save(folder / "client.key")
        self.folder, self.x, self.y = folder, x, y
        self.key = fedkl.Key.load(folder / "client.key")
        self.model = fedkl.lock(network(), self.key, scheme="pad", example=x[:2])
        if not self._file(0).exists():
            self._save(0)

    def train(self, shared: State, number: int) -> State:
        """One epoch; the update. A round that is asked for again gives the same one again."""
        self._load(shared, number - 1)
        torch.manual_seed(number)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9)
        fedkl.check_optimizer(self.model, optimizer)
        if number % RENEW_EVERY == 0:
            # Any number above that of the last pad. With optimizer=… an optimizer that is kept
            # from round to round forgets the old pad as well.
            fedkl.renew(self.model, self.key, epoch=number)
            self._settle(shared, RATE)
        self._epoch(optimizer)
        self._save(number)
        return fedkl.at_length(fedkl.shared_state(self.model), LENGTH, received=shared)

    def accuracy(self, shared: State, number: int, x: Tensor, y: Tensor) -> float:
        """Of the server's state after round ``number``, made the client's own before it is used."""
        self._load(shared, number)
        self._settle(shared, 0.1 * RATE)
        with torch.no_grad():
            return float((self.model.eval()(x).argmax(1) == y).float().mean())

    def _settle(self, shared: State, rate: float) -> None:
        """An epoch on the private part alone: it has to fit to what the others have learned."""
        mine = fedkl.private_state(self.model).keys()
        private = [p for name, p in self.model.named_parameters() if name in mine]
        self._epoch(torch.optim.SGD(private, lr=rate, momentum=0.9))
        fedkl.load_shared_state(self.model, shared)  # statistics of shared norms moved
        fedkl.calibrate(self.model, self.x.split(256))

    def _epoch(self, optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        for rows in torch.randperm(len(self.x)).split(32):
            self.model.zero_grad()
            nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number:04}.safetensors"

    def _save(self, number: int) -> None:
        # Which key it is of does not follow from the tensors.
        made = {"key": self.key.fingerprint}
        save_file(fedkl.private_state(self.model), self._file(number), made)

    def _check_key(self, number: int) -> None:
        with safe_open(self._file(number), "pt") as file:
            made, now = (file.metadata() or {}).get("key"), self.key.fingerprint
        if made not in (None, now):
            raise KeyFileError(
                f"{self._file(number)} was made with key {made}, and client.key is {now}; put that "
                "key back, or start again in another folder."
            )

    def _load(self, shared: State, number: int) -> None:
        self._check_key(number)
        fedkl.load_private_state(self.model, load_file(self._file(number)))
        fedkl.set_key(self.model, self.key)  # draws the pad that this private state is of
        fedkl.load_shared_state(self.model, shared)


def average(updates: list[State]) -> State:
    """The mean; of integers (``num_batches_tracked``), which have none, the first client's."""
    return {
        name: torch.stack([u[name] for u in updates]).mean(0) if t.is_floating_point() else t
        for name, t in updates[0].items()
    }


def main(folder: Path, rounds: int) -> list[float]:
    """Trains up to round ``rounds``; every client's accuracy, in [0, 1]."""
    digits = load_digits()
    x, y = torch.tensor(digits.images)[:, None].float() / 16, torch.tensor(digits.target)
    test, parts = slice(1400, None), torch.arange(1400).chunk(CLIENTS)
    clients = [Client(folder / f"client-{i}", x[p], y[p]) for i, p in enumerate(parts)]
    states = sorted(folder.glob("global-*.safetensors"))
    done = int(states[-1].stem.partition("-")[2]) if states else 0
    start = fedkl.shared_state(clients[0].model)  # any client's: nothing private is in it
    shared = load_file(states[-1]) if states else {n: t.clone() for n, t in start.items()}
    for number in range(done + 1, rounds + 1):
        shared = average([client.train(shared, number) for client in clients])
        save_file(shared, folder / f"global-{number:04}.safetensors")
    return [client.accuracy(shared, max(done, rounds), x[test], y[test]) for client in clients]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    print(*(f"{accuracy:.1%}" for accuracy in main(**vars(parser.parse_args()))))
