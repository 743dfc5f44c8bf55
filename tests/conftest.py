"""What every test shares: reproducible examples, one thread, and the same start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from browser import chromium, site, visit  # noqa: F401
from hypothesis import HealthCheck, settings

settings.register_profile(
    "project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _every_test_starts_alike() -> Iterator[None]:
    """Layers draw their first weights from the global generator: give each test the same."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype, "the global default dtype was changed"
