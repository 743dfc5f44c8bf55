"""The command line: audit a network, read an update, or see a photograph leak."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import click
import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from . import models
from .engine.loading import load_model, load_weights, told
from .errors import GradientInversionError, InvalidArgumentError
from .rank import Audit, Verdict, audit
from .recursion import Recovery, recover
from .sharing import Update, observe

__all__ = ["app", "leak", "load_model", "main"]

FINE, LEAKS, WRONG = 0, 1, 2
STOPPED, UNREAD = 130, 141  # as a shell has it: 128 and the signal
LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "logistic": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
}
EPILOGUE = """Examples:

gradinv demo

gradinv audit resnet18 --input 3,224,224

gradinv audit mypackage.nets:make --input 1,28,28 --limit 0.5

gradinv audit gradinv:lenet --input 3,32,32 --json

gradinv recover --model mypackage.nets:make --weights sent.safetensors
 --update update.safetensors --input 1,28,28 --out picture.png

Exit codes: 0 done; 1 the network leaks beyond the limit, or the recovery is not exact;
2 something was wrong with what was given, and was told;
130 stopped by Ctrl-C; 141 nobody read on."""

app = typer.Typer(
    help="What does a gradient give away?",
    epilog=EPILOGUE,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is no shape; give, say, 3,32,32")
    return tuple(int(part) for part in parts)


def _loss(text: str) -> nn.Module:
    if text not in LOSSES:
        raise click.BadParameter(f"{text!r} is none of {', '.join(LOSSES)}")
    return LOSSES[text]()


MODEL = "module:factory, the name of a classifier in torchvision, or gradinv:NAME"
Input = Annotated[
    Any, typer.Option("--input", parser=_shape, metavar="C,H,W", help="One sample's.")
]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Eval = Annotated[bool, typer.Option("--eval", help="In eval mode (batch norm, dropout).")]
Jacobian = Annotated[bool, typer.Option("--jacobian", help="Rank of the whole network too.")]
Seconds = Annotated[
    float | None, typer.Option(min=0, help="Tell what is known after so many seconds.")
]
Progress = Annotated[bool, typer.Option("--progress", help="Tell the verdict so far, on stderr.")]
Limit = Annotated[
    float | None, typer.Option(min=0, max=1, help="Exit with 1 if a larger share leaks.")
]
Model = Annotated[str, typer.Option(help=MODEL)]
Sent = Annotated[Path, typer.Option("--update", help="File that Update.save wrote.")]
Weights = Annotated[Path | None, typer.Option(help="Safetensors file of the weights sent.")]
Loss = Annotated[Any, typer.Option(parser=_loss, metavar="|".join(LOSSES), help="The client's.")]
Batch = Annotated[int, typer.Option(help="Number of samples.")]
Polish = Annotated[bool, typer.Option("--polish", help="Win back digits that float32 lost.")]
Out = Annotated[Path | None, typer.Option(help="PNG file for the pictures.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, given as on a command line, by default the process's own.

    Returns the exit code: 0 done, 1 a leak beyond the limit or a recovery that is not exact, 2
    bad input or an answer that cannot be written, 130 Ctrl-C, 141 a pipe that was closed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(given, prog_name="gradinv", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return WRONG
    except (click.Abort, KeyboardInterrupt):
        return STOPPED
    except GradientInversionError as error:
        if "--json" in given:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"gradinv: {error}", file=sys.stderr)
        return WRONG
    except (SystemExit, BrokenPipeError):  # nobody reads on; click leaves by the first
        _silence()
        return UNREAD
    except OSError as error:
        _silence()
        print(f"gradinv: cannot write the answer: {error.strerror or error}.", file=sys.stderr)
        return WRONG
    return int(code or FINE)


def _silence() -> None:
    """Let Python's last flush go nowhere: what cannot be written would be tried again."""
    with suppress(OSError):  # there is no file below, in a notebook or a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leak(found: Audit) -> float:
    r""":math:`\operatorname{rank} / n`, the share of the input that the equations determine.

    Of the whole network's Jacobian where it was computed; else 1 where the recursion goes
    through, and where it does not, 0: what an attack by other means could find is then unknown.
    """
    if found.network is not None:
        return found.network.rank / found.network.unknowns
    return 1.0 if found.exact else 0.0


@app.command("audit", help=f"Which layers of MODEL ({MODEL}) give their input away; no data.")
def _audit(
    model: str,
    input_: Input,
    json_: Json = False,
    eval_: Eval = False,
    jacobian: Jacobian = False,
    limit: Limit = None,
    seconds: Seconds = None,
    progress: Progress = False,
) -> int:
    net = load_model(model, input_).train(not eval_)
    with told(model, net, input_):
        bar: bool | _SoFar = _SoFar() if progress else not json_ and sys.stderr.isatty()
        found = audit(net, input_, jacobian=jacobian or None, progress=bar, seconds=seconds)
    share = leak(found)
    if json_:
        print(json.dumps({**found.to_dict(), "leak": share}))
    else:
        keys = ("name", "unknowns", "weight_equations", "gradient_equations", "rank", "reason")
        rows = [[getattr(layer, key) for key in keys] for layer in found.layers]
        title = f"{found.model}, input {'×'.join(map(str, found.input_shape))}"
        _table(title, "layer|unknowns|weight eq.|gradient eq.|rank|verdict", rows)
        for stop in found.stops:
            _say(f"not undone: {stop.name} ({stop.kind}): {stop.reason}")
        for note in found.notes:
            _say(f"note: {note}")
        if found.untested:
            _say(f"not tested to the end: {', '.join(found.untested)}")
        _say(found.reason, bold=True)
        if found.network is not None:
            _say(f"share of the input that the whole gradient determines: {share:.3f}")
    return LEAKS if limit is not None and share > limit else FINE


class _SoFar:
    """Tells each verdict that differs from the one before, and when."""

    def __init__(self) -> None:
        self.started, self.last = time.monotonic(), ""

    def __call__(self, found: Audit) -> None:
        told = sum(layer.verdict is not Verdict.UNKNOWN for layer in found.layers)
        line = f"{told} of {len(found.layers)} layers told; {found.reason}"
        if line != self.last:
            print(f"{time.monotonic() - self.started:5.1f} s: {line}", file=sys.stderr, flush=True)
        self.last = line


@app.command("recover", help="The input out of an update file.")
def _recover(
    model: Model,
    sent: Sent,
    input_: Input,
    json_: Json = False,
    weights: Weights = None,
    eval_: Eval = False,
    loss: Loss = "cross_entropy",
    batch: Batch = 1,
    polish: Polish = False,
    out: Out = None,
) -> int:
    net = load_model(model, input_).train(not eval_)
    if weights is not None:
        load_weights(net, weights)
    update, bar = Update.load(sent), not json_ and sys.stderr.isatty()
    with told(model, net, input_):
        found = recover(net, update, input_, loss, polish=polish, batch_size=batch, progress=bar)
    if out is not None:
        _draw(found.inputs, out)
    keys = ("name", "unknowns", "equations", "residual", "full_rank", "error")
    layers = [{key: getattr(layer, key) for key in keys} for layer in found.layers]
    extra = {"mismatch": found.mismatch, "answers": len(found.candidates), "layers": layers}
    return _tell(found, json_, out, extra)


@app.command("demo", help="A photograph leaks, here and now.")
def _demo(
    photo: Annotated[str, typer.Option(help="astronaut, cat, coffee, …")] = "cat",
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 32,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("recovered.png"),
    json_: Json = False,
) -> int:
    from .kit.data import photo as load_photo
    from .kit.metrics import psnr

    if size < 8:
        raise InvalidArgumentError(f"--size is at least 8, got {size}.")
    picture = load_photo(photo, size)
    shape, loss = tuple(picture.shape[1:]), nn.CrossEntropyLoss()
    model = models.cnn6(shape, outputs=10)
    update = observe(model, loss, picture, torch.tensor([3]))
    found = recover(model, update, shape, loss, progress=not json_ and sys.stderr.isatty())
    decibel = psnr(found.inputs, picture.double())
    pictures = torch.cat([picture.double(), found.inputs])
    _draw(pictures, out)
    code = _tell(found, json_, out, {"psnr": decibel})
    if not json_:
        _show(pictures)
        _say(f"One float32 gradient of six convolutions gave this back: {decibel:.0f} dB.")
    return code


# --- output -----------------------------------------------------------------------------------


def _say(content: object, bold: bool = False) -> None:
    console = Console(soft_wrap=not sys.stdout.isatty())
    console.print(content, style="bold" if bold else None, highlight=False)


def _table(title: str, headings: str, rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title)
    for heading, cell in zip(headings.split("|"), rows[0], strict=True):
        table.add_column(heading, justify="right" if isinstance(cell, int) else "left")
    for row in rows:
        table.add_row(*(f"{c:,}" if isinstance(c, int) else str(c) for c in row))
    _say(table)


def _tell(found: Recovery, json_: bool, out: Path | None, extra: Mapping[str, object]) -> int:
    labels = None if found.targets is None else found.targets.tolist()
    if json_:
        told = {"exact": found.exact, "targets": labels, **extra}
        print(json.dumps({**told, "out": None if out is None else str(out)}))
    else:
        ranks = ("deficient", "full")
        rows = [
            (r.name, r.unknowns, r.equations, f"{r.residual:.0e}", ranks[r.full_rank])
            for r in found.layers
        ]
        title = "from the last layer down to the input"
        _table(title, "layer|unknowns|equations|residual|rank", rows)
        trust = "exact: may be trusted" if found.exact else "not exact: do not trust the picture"
        _say(f"label: {labels}; {trust}", bold=True)
        if out is not None:
            _say(f"picture: {out}")
    return FINE if found.exact else LEAKS


def _show(pictures: Tensor) -> None:
    """Print them side by side, two pixels a character."""
    from torchvision.utils import make_grid

    row = make_grid(pictures.clamp(0, 1), len(pictures), padding=0).permute(1, 2, 0)
    pixels = (row * 255).round().int().tolist()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=False):
        line = Text()
        for a, b in zip(upper, lower, strict=True):
            line.append("▀", style="rgb({},{},{}) on rgb({},{},{})".format(*a, *b))
        _say(line)


def _draw(pictures: Tensor, path: Path) -> None:
    """Write them side by side into one PNG file."""
    from torchvision.utils import save_image

    shape = tuple(pictures.shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InvalidArgumentError(
            f"An input of shape {shape} is no picture: --out needs one or three channels."
        )
    try:
        save_image(pictures.clamp(0, 1), path, "PNG", nrow=len(pictures), padding=0)
    except OSError as error:
        raise InvalidArgumentError(f"Cannot write {path}: {error.strerror or error}.") from None


if __name__ == "__main__":
    sys.exit(main())
