"""Draw the README's picture: a photograph, its gradient as an image, and the recovery."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import gradinv_edu as gi


def gradient_of(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a client sends for one picture: weight and bias gradient of a perceptron."""
    model = gi.models.perceptron(picture.numel(), dtype=torch.float64)
    update = gi.observe(model, torch.nn.BCEWithLogitsLoss(), picture, torch.ones(1, 1).double())
    weight, bias = update.gradients.values()
    return weight.flatten(), bias.reshape(())


def as_image(x: Tensor, shape: torch.Size) -> Tensor:
    """Return pixels in [0, 1], channels last."""
    return x.reshape(shape)[0].permute(1, 2, 0).clamp(0, 1)


def main() -> None:
    """Write leak.png beside this file."""
    picture = gi.data.photo("astronaut", size=256, dtype=torch.float64)
    weight, bias = gradient_of(picture)
    recovered = gi.perceptron.recover_input(weight, bias)
    # the gradient is signed and small: its own range becomes the range of the image
    sent = (weight - weight.min()) / (weight.max() - weight.min())
    panels = {"the client's photograph": picture, "the gradient it sends": sent}
    panels["what the server recovers"] = recovered
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
    for axis, (title, pixels) in zip(axes, panels.items(), strict=True):
        axis.imshow(as_image(pixels, picture.shape))
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
