"""Eight or more kinds of code that every installation of `sketchfleet[trial]` holds.

Each device of a study owns one: another language, project or purpose each, so that what one device
has is rare for the others. None was in the training data of the shipped nano model, or only in part
(its card names what was).
"""

from __future__ import annotations

import sysconfig

from edge_agent.training.connectors import DataSelection
from profiles.errors import SketchfleetError
from trials.simulated_types import SimulatedDevice

FILES = 48  # of a domain, at most: reading more takes longer than training on them

# name -> (folders or globs below the installed packages, language)
DOMAINS: dict[str, tuple[tuple[str, ...], str]] = {
    "polynomials": (("sympy/polys/*.py",), "python"),
    "graph-tests": (("networkx/algorithms/tests/*.py",), "python"),
    "tensor-headers": (("torch/include/ATen/core", "torch/include/c10/core"), "c-header"),
    "array-stubs": (("numpy/_typing", "numpy/lib", "numpy/ma", "numpy/linalg", "numpy/random"),
                    "python-stub"),
    "columnar-headers": (("pyarrow/include/arrow",), "c-header"),
    "object-mapper": (("sqlalchemy/orm", "sqlalchemy/sql"), "python"),
    "statistics-tests": (("scipy/stats/tests/*.py",), "python"),
    "kernels": (("torch/include/ATen/native",), "c-header"),
    "graphs": (("networkx/algorithms/*.py",), "python"),
    "plot-tests": (("matplotlib/tests/*.py",), "python"),
}  # fmt: skip


class DomainError(SketchfleetError):
    """A domain that is not there."""


def domain_devices(names: tuple[str, ...]) -> tuple[SimulatedDevice, ...]:
    """One device for each domain, by name. Raises `DomainError`."""
    site = sysconfig.get_paths()["purelib"]
    if unknown := [name for name in names if name not in DOMAINS]:
        raise DomainError(f"no domain is called {unknown[0]!r}; choose of {', '.join(DOMAINS)}")
    return tuple(
        SimulatedDevice(
            name,
            DataSelection(
                tuple(f"{site}/{place}" for place in DOMAINS[name][0]),
                languages=(DOMAINS[name][1],), max_files=FILES,
            ),
        )
        for name in names
    )  # fmt: skip
