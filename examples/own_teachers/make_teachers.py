"""Two parties each train a small network on their own digits and hand over nothing but a safetensors file.

Plain PyTorch, without dfkd_dist: a stand-in for the networks that you have already. The two differ in what they saw, in
how they normalise and in the order of their classes:

    party_a: mostly 0-4; grey, mean 0.3 and deviation 0.3; classes 0, 1, ..., 9
    party_b: mostly 5-9; colour, mean and deviation 0.5;   classes 9, 8, ..., 0

Beside them goes heldout.npz, test digits that neither has seen, only to measure what came out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIZE = 16
RARE = 2
"""Images that a party has of each class that is not its own."""


@dataclass(frozen=True)
class Party:
    """What a party has and how it feeds its network; `classes[i]` is the digit that logit i stands for."""

    name: str
    own: tuple[int, ...]
    classes: tuple[int, ...]
    channels: int
    mean: float
    std: float


PARTIES = (
    Party("party_a", (0, 1, 2, 3, 4), tuple(range(10)), channels=1, mean=0.3, std=0.3),
    Party("party_b", (5, 6, 7, 8, 9), tuple(reversed(range(10))), channels=3, mean=0.5, std=0.5),
)


class Net(nn.Module):
    """Three convolutions. Layers and names are those of dfkd_dist's `tiny`, so a recipe can call it `arch: tiny`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(48)
        self.conv3 = nn.Conv2d(48, 96, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(96)
        self.fc = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 10]` of normalised images `[N, channels, 16, 16]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean(dim=(2, 3)))


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in random order: `[N, 1, 16, 16]` in [0, 1], and which digit each is."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(found.images / 16).float()[:, None]
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images[order], torch.from_numpy(found.target)[order]


def share(digit: Tensor, party: Party) -> Tensor:
    """Positions of a party's images: its own classes without RARE images each, which are what the other party has."""
    kept = []
    for value in range(10):
        positions = torch.nonzero(digit == value).flatten()
        kept.append(positions[RARE:] if value in party.own else positions[:RARE])
    return torch.cat(kept)


def prepared(images: Tensor, party: Party) -> Tensor:
    """Images in [0, 1] as the party's network wants them."""
    return (images.expand(-1, party.channels, -1, -1) - party.mean) / party.std


def train(party: Party, images: Tensor, digit: Tensor, epochs: int) -> Net:
    """A network of the party's own, trained on its share."""
    torch.manual_seed(1)
    net, batch = Net(party.channels), 32
    target = torch.tensor([party.classes.index(value) for value in digit.tolist()])
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: len(images) // batch * batch].view(-1, batch):
            # Shifted by up to one pixel, so that a few hundred images last for some epochs.
            down, right = torch.randint(-1, 2, (2,)).tolist()
            moved = images[chosen].roll((down, right), dims=(2, 3))
            loss = F.cross_entropy(net(prepared(moved, party)), target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: Net, party: Party, images: Tensor, digit: Tensor) -> float:
    """Percent of the images that a network names right."""
    said = torch.tensor(party.classes)[net(prepared(images, party)).argmax(dim=1)]
    return 100.0 * float((said == digit).float().mean())


def main() -> None:
    """Train both, write the files, print what each can do alone."""
    parser = argparse.ArgumentParser(description="Train two private teachers on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("runs/own-teachers"))
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    images, digit = digits()
    test, test_digit = images[:600], digit[:600]
    images, digit = images[600:], digit[600:]
    for party in PARTIES:
        mine = share(digit, party)
        net = train(party, images[mine], digit[mine], given.epochs)
        file = given.out / f"{party.name}.safetensors"
        save_file(net.state_dict(), file)
        own = torch.isin(test_digit, torch.tensor(party.own))
        alone, at_home = accuracy(net, party, test, test_digit), accuracy(net, party, test[own], test_digit[own])
        print(f"{file}: {len(mine)} images, {alone:.1f} % right, {at_home:.1f} % on its own five digits")

    pixels = (test[:, 0] * 255).round().to(torch.uint8).numpy()
    names = np.array([str(value) for value in range(10)])
    np.savez(given.out / "heldout.npz", test_x=pixels, test_y=test_digit.numpy(), classes=names)
    print(f"{given.out / 'heldout.npz'}: {len(pixels)} test images")


if __name__ == "__main__":
    main()
