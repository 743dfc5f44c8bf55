"""The command line: audit a network, read an update, or see a photograph leak."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import exported, models
from .errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
    UpdateFileError,
)
from .rank import Audit, audit
from .recursion import Recovery, recover
from .sharing import Update, observe

if TYPE_CHECKING:
    from rich.console import Console

FINE, LEAKS, WRONG = 0, 1, 2
LOSSES = {
    "cross_entropy": nn.CrossEntropyLoss,
    "logistic": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
}
NETS = ("cnn6", "cnn6_d", "lenet", "photo_cnn", "resnet", "wide_cnn")

MODEL = "module:factory, a name in torchvision, gradinv:NAME, or a file of torch.export (.pt2)"

EPILOGUE = """examples:
  gradinv demo                                           a photograph leaks, in the terminal
  gradinv audit resnet18 --input 3,224,224               a network of torchvision
  gradinv audit mypackage.nets:make --input 1,28,28      your own, made by make()
  gradinv audit saved.pt2 --input 1,28,28                one that torch.export.save wrote
  gradinv audit gradinv:lenet --input 3,32,32 --json     one of the course, for machines
  gradinv audit mypackage.nets:make --input 1,28,28 --limit 0.5   exit code 1 above one half
  gradinv recover --model mypackage.nets:make --weights sent.safetensors \\
      --update update.safetensors --input 1,28,28 --out picture.png

exit codes: 0 done; 1 the network leaks beyond the limit, or the recovery is not exact;
2 something was wrong with what was given, and was told."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        As on a command line; those of the process by default.

    Returns
    -------
    int
        Exit code: 0 done, 1 a leak beyond the limit or a recovery that is not exact, 2 bad input.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except GradientInversionError as error:
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"gradinv: {error}", file=sys.stderr)
        return WRONG
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradinv",
        description="What does a gradient give away?",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = _command(commands, "audit", _audit, "which layers give their input away; no data")
    command.add_argument("model", help=MODEL)
    _common(command)
    command.add_argument("--eval", action="store_true", help="in eval mode (batch norm, dropout)")
    command.add_argument("--jacobian", action="store_true", help="rank of the whole network too")
    command.add_argument(
        "--limit",
        type=_share,
        metavar="SHARE",
        help="exit with 1 if more than this share of the input leaks",
    )
    command = _command(commands, "recover", _recover, "the input out of an update file")
    command.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    command.add_argument("--weights", type=Path, help="safetensors file of the weights sent")
    command.add_argument("--update", type=Path, required=True, help="file that Update.save wrote")
    _common(command)
    command.add_argument("--eval", action="store_true", help="the client trains in eval mode")
    command.add_argument("--loss", choices=LOSSES, default="cross_entropy")
    command.add_argument("--batch", type=int, default=1, help="number of samples (default 1)")
    command.add_argument("--polish", action="store_true", help="win back digits that float32 lost")
    command.add_argument("--out", type=Path, help="PNG file for the pictures")
    command = _command(commands, "demo", _demo, "a photograph leaks, here and now")
    command.add_argument("--photo", default="cat", help="astronaut, cat, coffee, … (default cat)")
    command.add_argument("--size", type=int, default=32, help="pixels a side (default 32)")
    command.add_argument("--out", type=Path, default=Path("recovered.png"), help="PNG file")
    command.add_argument("--json", action="store_true", help="for machines")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: object,
    text: str,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input", type=_shape, required=True, metavar="C,H,W", help="shape of one sample"
    )
    command.add_argument("--json", action="store_true", help="for machines")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give, say, 3,32,32")
    return shape


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return share


# --- models -----------------------------------------------------------------------------------


def load_model(name: str, input_shape: tuple[int, ...] = ()) -> nn.Module:
    """Make the model that a name stands for.

    Parameters
    ----------
    name : str
        ``module:factory`` (a function of nothing, or a module object), the name of a model in
        torchvision, ``gradinv:NAME`` for a network of :mod:`gradinv_edu.models`, or a file that
        ``torch.export.save`` wrote (:func:`gradinv_edu.exported.load`).
    input_shape : tuple of int
        Given to the networks of :mod:`gradinv_edu.models`.

    Returns
    -------
    nn.Module
        In train mode, as a client trains it; a saved program in the mode of its export.

    Raises
    ------
    UnknownNameError
        If there is no such module, factory or model.
    InvalidArgumentError
        If what the name stands for makes no ``nn.Module``.
    ModelFileError, UnsupportedLayerError
        If a file holds no program, or one that is not made of layers.
    """
    if name.endswith(".pt2") or Path(name).is_file():
        return exported.load(name)
    home, _, factory = name.partition(":")
    if home == "gradinv":
        if factory not in NETS:
            raise UnknownNameError(f"No network {factory!r} in the course; {', '.join(NETS)}.")
        try:
            return getattr(models, factory)(input_shape or (3, 32, 32)).train()  # type: ignore[no-any-return]
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from None
    return (_imported(home, factory) if factory else _torchvision(name)).train()


def _imported(home: str, factory: str) -> nn.Module:
    sys.path.insert(0, "")  # as python -m does: modules in the present folder
    try:
        made: object = importlib.import_module(home)
    except ImportError as error:
        raise UnknownNameError(f"Cannot import {home!r}: {error}.") from None
    finally:
        sys.path.remove("")
    try:
        for part in factory.split("."):
            made = getattr(made, part)
    except AttributeError:
        raise UnknownNameError(f"{home!r} has no {factory!r}.") from None
    if not isinstance(made, nn.Module) and callable(made):
        try:
            made = made()
        except Exception as error:  # the factory is the user's: whatever it raises is told
            raise InvalidArgumentError(
                f"{home}:{factory}() raised {type(error).__name__}: {error}"
            ) from error
    if not isinstance(made, nn.Module):
        raise InvalidArgumentError(
            f"{home}:{factory} makes a {type(made).__name__}, not a torch.nn.Module."
        )
    return made


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise UnknownNameError(
            f"torchvision has no model {name!r}, and it is no file; for your own give "
            f"module:factory, for one of the course gradinv:NAME ({', '.join(NETS)})."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = get_model(name, weights=None)
    return model


def _with_weights(model: nn.Module, path: Path | None) -> nn.Module:
    if path is None:
        return model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UpdateFileError(
            f"Cannot read weights from {path}: {error}. Give a safetensors file."
        ) from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InvalidTensorError(
            f"The weights in {path} are another model's: {' '.join(str(error).split())}"
        ) from None
    return model


# --- commands ---------------------------------------------------------------------------------


def leak(found: Audit) -> float:
    r""":math:`\operatorname{rank} / n`, the share of the input that the equations determine.

    Of the whole network's Jacobian where it was computed; else 1 where the recursion goes
    through, and where it does not, 0: what an attack by other means could find is then unknown.

    Parameters
    ----------
    found : Audit
        From :func:`gradinv_edu.rank.audit`.
    """
    if found.network is not None:
        return found.network.rank / found.network.unknowns
    return 1.0 if found.exact else 0.0


def _audit(options: argparse.Namespace) -> int:
    model = load_model(options.model, options.input)
    found = audit(
        model.eval() if options.eval else model,
        options.input,
        jacobian=options.jacobian or None,
        progress=not options.json and sys.stderr.isatty(),
    )
    share = leak(found)
    if options.json:
        print(json.dumps({**found.to_dict(), "leak": share}))
    else:
        _show_audit(found, share)
    return LEAKS if options.limit is not None and share > options.limit else FINE


def _show_audit(found: Audit, share: float) -> None:
    from rich.table import Table

    table = Table(title=f"{found.model}, input {'×'.join(map(str, found.input_shape))}")
    table.add_column("layer")
    for heading in ("unknowns", "weight eq.", "gradient eq.", "rank"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for layer in found.layers:
        counts = (layer.unknowns, layer.weight_equations, layer.gradient_equations, layer.rank)
        table.add_row(layer.name, *(f"{count:,}" for count in counts), layer.verdict)
    console = _console()
    console.print(table)
    for stop in found.stops:
        console.print(f"stops at {stop.name} ({stop.kind}): {stop.reason}", highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)
    console.print(found.verdict, style="bold", highlight=False)
    if found.network is not None:
        console.print(f"share of the input that the whole gradient determines: {share:.3f}")


def _recover(options: argparse.Namespace) -> int:
    model = _with_weights(load_model(options.model, options.input), options.weights)
    found = recover(
        model.eval() if options.eval else model,
        Update.load(options.update),
        options.input,
        LOSSES[options.loss](),
        polish=options.polish,
        batch_size=options.batch,
        progress=not options.json and sys.stderr.isatty(),
    )
    if options.out is not None:
        _draw(found.inputs, options.out)
    _tell(found, options)
    return FINE if found.exact else LEAKS


def _tell(found: Recovery, options: argparse.Namespace) -> None:
    labels = None if found.targets is None else found.targets.tolist()
    if options.json:
        answer = {
            "exact": found.exact,
            "targets": labels,
            "mismatch": found.mismatch,
            "answers": len(found.candidates),
            "layers": [
                {"name": r.name, "unknowns": r.unknowns, "equations": r.equations}
                | {"residual": r.residual, "full_rank": r.full_rank, "error": r.error}
                for r in found.layers
            ],
            "out": None if options.out is None else str(options.out),
        }
        print(json.dumps(answer))
        return
    _show_recovery(found, labels)
    if options.out is not None:
        _console().print(f"picture: {options.out}", highlight=False)


def _show_recovery(found: Recovery, labels: object) -> None:
    from rich.table import Table

    table = Table(title="from the last layer down to the input")
    table.add_column("layer")
    for heading in ("unknowns", "equations", "residual"):
        table.add_column(heading, justify="right")
    table.add_column("rank")
    for r in found.layers:
        rank = "full" if r.full_rank else "deficient"
        table.add_row(r.name, f"{r.unknowns:,}", f"{r.equations:,}", f"{r.residual:.0e}", rank)
    console = _console()
    console.print(table)
    trust = "exact: may be trusted" if found.exact else "not exact: do not trust the picture"
    console.print(f"label: {labels}; {trust}", style="bold", highlight=False)


def _demo(options: argparse.Namespace) -> int:
    from .data import photo
    from .metrics import psnr

    if options.size < 8:
        raise InvalidArgumentError(f"--size is at least 8, got {options.size}.")
    picture = photo(options.photo, options.size)
    shape = tuple(picture.shape[1:])
    model, loss = models.cnn6(shape, outputs=10), nn.CrossEntropyLoss()
    update = observe(model, loss, picture, torch.tensor([3]))
    found = recover(model, update, shape, loss, progress=not options.json and sys.stderr.isatty())
    decibel = psnr(found.inputs, picture.double())
    _draw(torch.cat([picture.double(), found.inputs]), options.out)
    if options.json:
        answer = {"psnr": decibel, "exact": found.exact, "targets": found.targets.tolist()}  # type: ignore[union-attr]
        print(json.dumps({**answer, "out": str(options.out)}))
        return FINE if found.exact else LEAKS
    _show_recovery(found, found.targets.tolist())  # type: ignore[union-attr]
    _show_pictures(picture[0], found.inputs[0])
    console = _console()
    console.print(f"One float32 gradient of six convolutions gave this back: {decibel:.0f} dB.")
    console.print(f"truth and recovery: {options.out}", highlight=False)
    return FINE if found.exact else LEAKS


# --- pictures ---------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def _show_pictures(truth: Tensor, recovered: Tensor) -> None:
    """Both side by side, two pixels a character."""
    from rich.text import Text

    side = torch.cat([truth.double(), torch.ones(3, truth.shape[1], 2), recovered.cpu()], dim=2)
    pixels = (side.clamp(0, 1) * 255).round().int()
    pixels = pixels[:, : pixels.shape[1] // 2 * 2]
    for row in range(0, pixels.shape[1], 2):
        line = Text()
        for column in range(pixels.shape[2]):
            upper, lower = (
                "#{:02x}{:02x}{:02x}".format(*pixels[:, row + k, column].tolist()) for k in (0, 1)
            )
            line.append("▀", style=f"{upper} on {lower}")
        _console().print(line)


def _draw(pictures: Tensor, path: Path) -> None:
    """Pictures side by side in one PNG file."""
    from PIL import Image

    shape = tuple(pictures.shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InvalidArgumentError(
            f"An input of shape {shape} is no picture: --out needs one or three channels."
        )
    row = torch.cat([p.expand(3, -1, -1) for p in pictures.detach().cpu()], dim=2)
    pixels = (row.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    try:
        Image.fromarray(pixels).save(path, format="PNG")
    except OSError as error:
        raise InvalidArgumentError(f"Cannot write {path}: {error.strerror or error}.") from None


if __name__ == "__main__":
    sys.exit(main())
