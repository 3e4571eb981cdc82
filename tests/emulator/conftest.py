"""The `emulator` fixture and the markers of its slow groups."""

import pytest

from .plugin import emulator, pytest_runtest_makereport  # noqa: F401


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "upstream: kernels of the published flash-attn-4 package")
    config.addinivalue_line("markers", "faults_full: every generated fault under every seed (minutes)")


def pytest_collection_modifyitems(config, items) -> None:
    """The marked groups run only when asked for with `-m`."""
    for item in items:
        for name in ("upstream", "faults_full"):
            if item.get_closest_marker(name) and name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"slow group: run with -m {name}"))
