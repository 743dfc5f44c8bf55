"""Figures with their bounds; audits as text, as a table for notebooks, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..rank import Audit, LayerAudit, Stop

__all__ = ["audit_dict", "audit_html", "audit_text", "show"]

COLUMNS = ("layer", "kind", "unknowns", "weight", "gradient", "rank", "index", "verdict")


def show(
    name: str,
    value: float,
    *,
    below: float | None = None,
    above: float | None = None,
    unit: str = "",
) -> None:
    """Print ``name ≈ 3e-16 (below 1e-12)``, and insist on the bound.

    What stands behind ≈ may differ from machine to machine; where notebooks are compared with
    what they print, it is left out (``tests/nbval.cfg``), and the bound is not.

    Parameters
    ----------
    name : str
        What was measured.
    value : float
        The figure; two digits of it are printed, or one and its power of ten.
    below, above : float, optional
        Bounds that must hold.
    unit : str
        Behind the figure and its bounds, such as ``"dB"``.

    Raises
    ------
    AssertionError
        If a bound does not hold.
    """
    unit = f" {unit}" if unit else ""
    bounds = []
    for word, bound, holds in (
        ("below", below, below is None or value < below),
        ("above", above, above is None or value > above),
    ):
        assert holds, f"{name} is {value:.3g}{unit}, not {word} {bound:g}{unit}"
        bounds += [] if bound is None else [f"{word} {bound:g}{unit}"]
    told = f" ({', '.join(bounds)})" if bounds else ""
    figure = f"{value:.0f}" if 10 <= abs(value) < 1e4 else f"{value:.2g}"
    figure = f"{value:.0e}" if 0 < abs(value) < 1e-2 else figure
    print(f"{name} ≈ {figure}{unit}{told}")


def audit_text(audit: Audit) -> str:
    """Columns of the layers, then remarks, a line each."""
    rows = [COLUMNS, *map(_row, audit.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, 1, 7) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_remarks(audit)])


def audit_html(audit: Audit) -> str:
    """The same as a table with a caption and a list."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in COLUMNS)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in map(_row, audit.layers)
    )
    shape = "×".join(map(str, audit.input_shape))
    caption = f"Audit of {escape(audit.model)} on inputs of {shape}"
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in _remarks(audit))
    return (
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table><ul>{remarks}</ul>"
    )


def audit_dict(audit: Audit) -> dict[str, object]:
    """Plain numbers, strings and lists, with what the audit says of itself."""
    whole = asdict(audit)
    for name in ("unknowns", "verdict", "reason", "parameter_bound"):
        whole[name] = getattr(audit, name)
    for entry, layer in zip(whole["layers"], audit.layers, strict=True):
        for name in ("rank_index", "verdict", "reason"):
            entry[name] = getattr(layer, name)
    plain = _plain(whole)
    assert isinstance(plain, dict)
    return plain


def _row(layer: LayerAudit) -> tuple[str, ...]:
    bounded = layer.method in ("at most", "undecided")
    sign = "≤" if bounded else "≈" if layer.method == "estimate" else ""
    numbers = (layer.unknowns, layer.weight_equations, layer.gradient_equations)
    ranks = (f"{sign}{layer.rank}", f"{sign}{layer.rank_index}")
    return (layer.name, layer.kind, *map(str, numbers), *ranks, layer.reason)


def _remarks(audit: Audit) -> list[str]:
    bound = "no fewer than" if audit.parameter_bound else "fewer than"
    lines = [
        f"{audit.parameters} parameters, {bound} the {audit.unknowns} entries of the input",
        *([] if audit.begins is None else [f"the recursion begins at {audit.begins}"]),
        *_grouped(audit.stops),
        *audit.notes,
    ]
    if audit.network is not None:
        kind = "full" if audit.network.full else "not full"
        rank = f"{audit.network.rank} of {audit.network.unknowns}"
        lines.append(f"whole network: the Jacobian has rank {rank} ({kind})")
    told = [] if audit.exact else [audit.reason]
    return [*lines, *told, f"exact: {'yes' if audit.exact else 'no'}"]


def _grouped(stops: Sequence[Stop]) -> list[str]:
    places: dict[tuple[str, str], list[str]] = {}
    for stop in stops:
        places.setdefault((stop.kind, stop.reason), []).append(stop.name)
    return [
        f"not undone, the layers below counted as if it were: {', '.join(names[:3])}"
        f"{f' and {len(names) - 3} more' * (len(names) > 3)} ({kind}): {reason}"
        for (kind, reason), names in places.items()
    ]


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
