"""Check the list of what to carry to a machine with a GPU and no network against what the packages declare.

    python tools/gpu_carry.py                                # is anything missing in tools/gpu_carry.txt?
    python tools/gpu_carry.py --download FOLDER --cuda 130   # fetch the wheels, where there is a network
    python tools/gpu_carry.py --slim WHEEL --cuda 130        # bitsandbytes with one build for CUDA only

`--download` keeps only the build of bitsandbytes for that CUDA. It fails where the wheels and the files of the
repository are more than 64 MiB together.

On the other machine: `pip install --no-index --no-deps --target SITE FOLDER/*.whl`, then `make gpu` with SITE on
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tools" / "gpu_carry.txt"
ENVIRONMENT = {
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "sys_platform": "linux",
    "os_name": "posix",
    "extra": "",
}
"""The machine that the packages are carried to."""


LIMIT_BYTES = 64 * 2**20
"""Of the wheels and the repository's files together."""


class Carried(NamedTuple):
    """Return the content of the list.

    Attributes:
        versions: Of each package that is carried.
        brought: Packages that are there already.
    """

    versions: dict[str, str]
    brought: frozenset[str]


def read(text: str) -> Carried:
    """Return what a list says.

    Raises:
        ValueError: A line is neither a comment nor NAME==VERSION.
    """
    versions: dict[str, str] = {}
    brought: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# brought:"):
            brought |= {canonicalize_name(item) for item in line.removeprefix("# brought:").split()}
        elif line.strip() and not line.startswith("#"):
            name, sign, wanted = line.strip().partition("==")
            if not sign or not wanted:
                raise ValueError(f"{LIST.name}:{number}: line={line!r} - expected NAME==VERSION. Give the version.")
            versions[canonicalize_name(name)] = wanted
    return Carried(versions, frozenset(brought))


def declared(name: str) -> Sequence[str] | None:
    """Return what an installed package declares, or None where it is not installed."""
    try:
        version(name)
    except PackageNotFoundError:
        return None
    return requires(name) or ()


def own_dependencies() -> list[str]:
    """Return what philora itself declares; it runs from its sources."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["gpu"]]


def faults(
    carried: Carried,
    dependencies: Sequence[str],
    declared: Callable[[str], Sequence[str] | None] = declared,
    installed: Callable[[str], str] = version,
) -> Iterator[str]:
    """Say what a run there would miss.

    Args:
        carried: The list.
        dependencies: What philora declares.
        declared: What an installed package declares, or None.
        installed: The version of an installed package.
    """
    for name, wanted in carried.versions.items():
        given = declared(name)
        if given is not None and installed(name) != wanted:
            yield f"{name}=={wanted} - expected {installed(name)}, the version that the tests here run with."
    by = {"philora": dependencies} | {name: declared(name) or () for name in carried.versions}
    for name, requirements in by.items():
        for text in requirements:
            needed = Requirement(text)
            if needed.marker is not None and not needed.marker.evaluate(ENVIRONMENT):
                continue
            found = canonicalize_name(needed.name)
            if found not in carried.versions and found not in carried.brought:
                yield f"{found} is missing - {name} declares {text}. Add it, or say that the image brings it."
            elif found in carried.versions and not needed.specifier.contains(carried.versions[found]):
                yield f"{found}=={carried.versions[found]} - expected {needed.specifier}, as {name} declares."


def slim(wheel: Path, cuda: str) -> Path:
    """Write a wheel of bitsandbytes beside another, with its library for one CUDA, and none for a CPU or other GPUs.

    Args:
        wheel: As the registry has it.
        cuda: Such as 130.

    Raises:
        ValueError: It has no library for that CUDA.
    """
    library = re.compile(r".*/libbitsandbytes_(\w+?)\.so$")
    folder = wheel.parent / "slim"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as source:
        kinds = {found[1]: name for name in source.namelist() if (found := library.match(name))}
        kept = f"cuda{cuda}"
        if kept not in kinds:
            raise ValueError(f"{wheel.name}: --cuda={cuda} - expected one of {', '.join(sorted(kinds))}.")
        dropped = {name for kind, name in kinds.items() if kind != kept}
        with zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_DEFLATED) as target:
            for item in source.infolist():
                content = source.read(item)
                if item.filename.endswith(".dist-info/RECORD"):
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
                if item.filename not in dropped:
                    target.writestr(item, content)
    return folder / wheel.name


def download(carried: Carried, folder: Path) -> None:
    """Fetch the wheels of the list for the other machine."""
    tags = [f"manylinux_2_{item}_x86_64" for item in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    command += ["--implementation", "cp", *platforms, "-d", str(folder)]
    subprocess.run([*command, *(f"{name}=={item}" for name, item in carried.versions.items())], check=True)


def keep_one_build(folder: Path, cuda: str) -> None:
    """Replace the wheel of bitsandbytes in a folder by the one that `slim` makes of it."""
    for wheel in folder.glob("bitsandbytes-*.whl"):
        small = slim(wheel, cuda)
        small.replace(wheel)
        small.parent.rmdir()


def tracked(repository: Path = ROOT) -> list[Path]:
    """Return the files of the repository that git knows."""
    command = ["git", "-C", str(repository), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [repository / name for name in names if name]


def too_large(wheels: Sequence[Path], files: Sequence[Path], limit_bytes: int = LIMIT_BYTES) -> str | None:
    """Say that wheels and files are too large together, with the largest wheels, or return None.

    Args:
        wheels: That are carried.
        files: Of the repository.
        limit_bytes: For all of them.
    """
    sizes = {wheel.name: wheel.stat().st_size for wheel in wheels}
    own = sum(path.stat().st_size for path in files if path.is_file())
    total = sum(sizes.values()) + own
    if total <= limit_bytes:
        return None
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{name} {sizes[name] / 2**20:.1f}" for name in largest)
    return (
        f"wheels {(total - own) / 2**20:.1f} MiB and files {own / 2**20:.1f} MiB - expected at most "
        f"{limit_bytes / 2**20:.0f} together. The largest wheels: {named}."
    )


def main() -> int:
    """Return 1 where something is missing, or too much is carried."""
    parser = argparse.ArgumentParser(prog="python tools/gpu_carry.py", description=__doc__.splitlines()[0])
    parser.add_argument("--download", type=Path, metavar="FOLDER")
    parser.add_argument("--slim", type=Path, metavar="WHEEL")
    parser.add_argument("--cuda", default="130")
    given = parser.parse_args()
    if given.slim is not None:
        print(slim(given.slim, given.cuda))
        return 0
    carried = read(LIST.read_text(encoding="utf-8"))
    found = list(faults(carried, own_dependencies()))
    for item in found:
        print(item)
    if found:
        return 1
    unknown = [item for item in carried.versions if declared(item) is None]
    print(f"{len(carried.versions)} packages, nothing missing.")
    if unknown:
        print(f"Not installed here, so what they declare is not known: {', '.join(unknown)}.")
    if given.download is not None:
        download(carried, given.download)
        keep_one_build(given.download, given.cuda)
        wheels = sorted(given.download.glob("*.whl"))
        fault = too_large(wheels, tracked())
        total = sum(path.stat().st_size for path in wheels) / 2**20
        print(fault or f"{len(wheels)} wheels, {total:.1f} MiB.")
        return int(fault is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
