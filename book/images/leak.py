"""Draw the README's picture: a photograph, ResNet-18's gradient as an image, and the recovery."""

from __future__ import annotations

from pathlib import Path

import gradinv_edu as gi
import matplotlib.pyplot as plt
import torch
import torchvision
from torch import Tensor


def first_filters(gradient: Tensor) -> Tensor:
    """Return the 64 filters of the first layer's gradient as one picture, a frame around each."""
    # the gradient is signed and small: its own range becomes the range of the image
    shown = (gradient - gradient.min()) / (gradient.max() - gradient.min())
    framed = torch.nn.functional.pad(shown, (1, 1, 1, 1), value=1.0)
    return framed.reshape(8, 8, 3, 9, 9).permute(2, 0, 3, 1, 4).reshape(1, 3, 72, 72)


def main() -> None:
    """Write leak.png beside this file."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval().double()
    loss = torch.nn.CrossEntropyLoss()
    picture = gi.data.photo("rocket", size=32, dtype=torch.float64)
    update = gi.observe(model, loss, picture, torch.tensor([7]))
    recovery = gi.recover(model, update, input_shape=(3, 32, 32), loss=loss)
    panels = {
        "the client's photograph": picture,
        "of the gradient it sends": first_filters(update.gradients["conv1.weight"]),
        "what the server recovers": recovery.inputs,
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
    for axis, (title, pixels) in zip(axes, panels.items(), strict=True):
        axis.imshow(pixels[0].permute(1, 2, 0).clamp(0, 1))
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
