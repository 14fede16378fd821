"""The platforms that agents are installed on: which wheels fit there.

Their pins: `constraints/NAME.txt`. `sketchfleet-agent bundle` collects wheels for one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

OLDEST_GLIBC = 17  # manylinux2014


@dataclass(frozen=True)
class Platform:
    """One kind of machine."""

    name: str
    what: str
    machine: str
    """As `uname -m` says it."""
    glibc: int
    """Minor version of the oldest C library that it comes with: 2.N."""
    pythons: tuple[str, ...]
    """Minor versions of Python that its pins are for, the usual one first."""
    built_for_it: tuple[str, ...] = ()
    """Packages whose manylinux wheels run there and yet lack its GPU; only others will do."""
    cpu_builds: tuple[str, ...] = ()
    """Packages to take in the build for CPUs, version 1.2+cpu."""

    def tags(self, package: str) -> tuple[str, ...]:
        """Platform tags of wheels that will do there (PEP 600), the most particular first."""
        if package in self.built_for_it:
            return (f"linux_{self.machine}",)
        found = [f"manylinux_2_{minor}_{self.machine}"
                 for minor in range(self.glibc, OLDEST_GLIBC - 1, -1)]  # fmt: skip
        return (*found, f"manylinux2014_{self.machine}", f"linux_{self.machine}")

    def environment(self, python: str) -> dict[str, str]:
        """What environment markers say there (PEP 508)."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{python}.0",
            "python_version": python,
            "sys_platform": "linux",
        }


PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform(
            "jetpack6",
            "Jetson Orin with JetPack 6",
            "aarch64",
            35,
            ("3.10",),
            built_for_it=("torch", "bitsandbytes"),
        ),
        Platform("jetpack7", "Jetson Orin or Thor with JetPack 7", "aarch64", 39, ("3.12",)),
        Platform("x86-cuda", "x86-64 with an NVIDIA GPU", "x86_64", 35, ("3.12", "3.11", "3.13")),
        Platform(
            "x86-cpu",
            "x86-64 without a GPU",
            "x86_64",
            35,
            ("3.12", "3.11", "3.13"),
            cpu_builds=("torch",),
        ),
    )
}
