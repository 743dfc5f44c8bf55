"""Windows of max pooling: which entries may hold which maximum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InvalidTensorError, UnsupportedLayerError

__all__ = ["Winners", "find_winners", "windows"]

SAME = 0.1  # of the tolerance

LISTED = tuple(getattr(nn, f"{kind}MaxPool{d}d") for kind in ("", "Adaptive") for d in (1, 2, 3))


def windows(pool: nn.Module, map_shape: tuple[int, ...]) -> Tensor:
    r""":math:`\Omega_w`: the entries that each window of a max pooling looks at.

    A window is a product of intervals, one an axis, so it is enough to pool a slab for each
    coordinate of each axis: any kernel, stride, padding, dilation, rounding, adaptive or not.

    Parameters
    ----------
    pool : nn.Module
        A max pooling of torch's, of any dimension, but not a fractional one.
    map_shape : tuple of int
        Spatial shape of one map that it pools.

    Returns
    -------
    Tensor
        ``(windows, entries)``, places in the flattened map; −1 fills up the shorter ones.

    Raises
    ------
    UnsupportedLayerError
        If the windows cannot be listed.
    InvalidTensorError
        If the pooling does not take maps of this shape.
    """
    if not isinstance(pool, LISTED):
        raise UnsupportedLayerError(
            f"The windows of {type(pool).__name__} cannot be listed: they are not fixed, or it is "
            "no max pooling."
        )
    axes = []
    for axis, length in enumerate(map_shape):
        shape = [length, *(1,) * len(map_shape)]
        shape[1 + axis] = length
        slabs = torch.eye(length).reshape(shape).expand(length, *map_shape)
        try:
            pooled = pool(slabs[:, None].contiguous())
        except RuntimeError as error:
            raise InvalidTensorError(
                f"{type(pool).__name__} does not take maps of shape {map_shape}: {error}"
            ) from error
        pooled = pooled[0] if isinstance(pooled, tuple) else pooled
        pooled = pooled[:, 0].movedim(1 + axis, 1)
        inside = pooled.reshape(*pooled.shape[:2], -1)[:, :, 0].T > 0  # window, coordinate
        most = int(inside.sum(1).max())
        order = torch.sort((~inside).long(), dim=1, stable=True).indices[:, :most]
        axes.append(torch.where(inside.gather(1, order), order, -1))
    places = axes[0]
    for more, length in zip(axes[1:], map_shape[1:], strict=True):
        joint = places[:, None, :, None] * length + more[None, :, None, :]
        seen = (places[:, None, :, None] >= 0) & (more[None, :, None, :] >= 0)
        joint = torch.where(seen, joint, -1)
        places = joint.reshape(len(places) * len(more), -1)
    return places


@dataclass(frozen=True)
class Winners:
    """Distinct maxima of a max pooling, and the places in the map where each may be.

    Attributes
    ----------
    filters : Tensor
        ``(N,)``, map of each winner.
    values : Tensor
        ``(N,)``, the maximum.
    k : Tensor
        ``(N,)``, ``∂L/∂`` of it: the sum over the windows that it won.
    places : Tensor
        ``(N, m)``, candidates in the flattened map; −1 fills up.
    bounds : Tensor
        ``(maps, entries)``: the least maximum of an entry's windows, which it cannot exceed.
    map_shape : tuple of int
        Spatial shape of one map.
    """

    filters: Tensor
    values: Tensor
    k: Tensor
    places: Tensor
    bounds: Tensor
    map_shape: tuple[int, ...]

    @property
    def possible(self) -> Tensor:
        """Bool ``(N, m)``: which columns of ``places`` are candidates."""
        return self.places >= 0

    @property
    def arrangements(self) -> float:
        """Decimal digits of the number of ways to place all winners."""
        return float(self.possible.sum(1).double().log10().sum())

    @property
    def index(self) -> Tensor:
        """``(N, m)``, candidates in all maps end to end; fillers point at a map's first entry."""
        return self.filters[:, None] * self.bounds.shape[1] + self.places.clamp_min(0)

    def gather(self, maps: Tensor) -> Tensor:
        """``(N, m)``: entries of ``(1, maps, *map_shape)`` at the candidates."""
        return maps.reshape(-1)[self.index]

    def scatter(self, values: Tensor) -> Tensor:
        """Add ``(N, m)`` up in maps ``(1, maps, *map_shape)``: the adjoint of :meth:`gather`."""
        maps = values.new_zeros(self.bounds.numel())
        maps.index_add_(0, self.index.reshape(-1), (values * self.possible).reshape(-1))
        return maps.reshape(1, len(self.bounds), *self.map_shape)

    def at(self, choice: Tensor) -> Tensor:
        """``(N,)``: places of the chosen columns, in all maps end to end."""
        return self.index.gather(1, choice[:, None])[:, 0]


def find_winners(
    values: Tensor,
    k: Tensor,
    live: Tensor,
    bounds: Tensor,
    places: Tensor,
    map_shape: tuple[int, ...],
    tolerance: float,
) -> Winners:
    r""":math:`\{\ell \in \Omega_w : \min_{w' \ni \ell} v_{w'} \ge v_w\}`: where the maximum may be.

    An entry that another window bounds by less is none. Windows that overlap and have equal
    maxima share one winner, in their common part, if such an entry exists.

    Parameters
    ----------
    values, k : Tensor
        ``(maps, windows)``: maxima, and the loss's gradient by them.
    live, bounds : Tensor
        ``(maps, windows)``, bool: whose maximum is known; and what no entry of the window exceeds
        (the maximum itself; 0 where a ReLU follows and gave 0; infinite where nothing is known).
    places : Tensor
        As :func:`windows` lists them.
    map_shape : tuple of int
        Spatial shape of one map.
    tolerance : float
        A bound lower by less rules no entry out; maxima that differ by a tenth of it are equal:
        two that are the same entry may still be placed there, two that are not must not be joined.
    """
    maps, n = len(values), math.prod(map_shape)
    count, size = places.shape
    at = torch.where(places < 0, n, places)  # fillers in a place of their own
    least = values.new_full((maps, n + 1), torch.inf)
    spread = bounds[:, :, None].expand(maps, count, size).reshape(maps, -1)
    least.scatter_reduce_(1, at.reshape(-1).expand(maps, -1), spread, "amin")
    may = live[:, :, None] & (places >= 0) & (least[:, at] >= values[:, :, None] - tolerance)
    # one row for each window that is alive, one column for each of its entries
    f, w = live.nonzero(as_tuple=True)
    none = ~may.any(2, keepdim=True)  # noise alone rules them all out
    may = torch.where(none, places >= 0, may)
    may, entry = may[f, w], (f[:, None] * n + places[w].clamp_min(0))
    group = _shared(values, live, places, n, SAME * tolerance)[f, w]
    group, merged = _common(group, entry, may)
    first = torch.full(
        (int(group.max()) + 1 if len(group) else 0,), len(group), device=group.device
    )
    first.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
    total = k.new_zeros(len(first)).index_add_(0, group, k[f, w])
    kept = merged[first]
    most = int(kept.sum(1).max()) if len(kept) else 0
    order = torch.sort((~kept).long(), dim=1, stable=True).indices[:, :most]
    chosen = torch.where(kept.gather(1, order), places[w[first]].gather(1, order), -1)
    return Winners(
        f[first], values[f, w][first], total, chosen, least[:, :n].contiguous(), tuple(map_shape)
    )


def _shared(values: Tensor, live: Tensor, places: Tensor, n: int, tolerance: float) -> Tensor:
    """``(maps, windows)``: number of the group of overlapping windows with equal maxima."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    maps, count = values.shape
    w, column = (places >= 0).nonzero(as_tuple=True)
    lies = (w.cpu().numpy(), places[w, column].cpu().numpy())
    seen = coo_array((torch.ones(len(w)).numpy(), lies), shape=(count, n)).tocsr()
    meet = (seen @ seen.T).tocoo()
    one, other = (torch.from_numpy(side).long().to(w.device) for side in meet.coords)
    one, other = one[one < other], other[one < other]
    equal = (values[:, one] - values[:, other]).abs() <= tolerance
    f, pair = (equal & live[:, one] & live[:, other]).nonzero(as_tuple=True)
    ends = [(f * count + side[pair]).cpu().numpy() for side in (one, other)]
    graph = coo_array((torch.ones(len(f)).numpy(), tuple(ends)), shape=(maps * count,) * 2)
    _, label = connected_components(graph, directed=False)
    return torch.from_numpy(label).long().to(values.device).reshape(maps, count)


def _common(group: Tensor, entry: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
    """Groups numbered anew and the entries common to each; apart again where none is."""
    alone = torch.unique(group, return_inverse=True)[1]
    for _ in range(2):
        number, size = alone, torch.bincount(alone)
        width = int(entry.max()) + 1 if entry.numel() else 1
        keys, back = torch.unique(number[:, None] * width + entry, return_inverse=True)
        votes = torch.zeros(len(keys), device=entry.device, dtype=torch.long)
        votes.index_add_(0, back.reshape(-1), may.reshape(-1).long())
        common = may & (votes[back] == size[number][:, None])
        empty = torch.zeros(len(size), dtype=torch.bool, device=entry.device)
        empty[number] = True
        empty[number[common.any(1)]] = False
        if not bool(empty.any()):
            break
        fresh = len(size) + torch.arange(len(number), device=entry.device)
        alone = torch.unique(torch.where(empty[number], fresh, number), return_inverse=True)[1]
    return number, common
