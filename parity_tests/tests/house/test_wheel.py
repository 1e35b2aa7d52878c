"""What is installed: the wheel holds the program and the proof, no pytest file, and runs where torch is not
installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qtx
import qtx_ref

ROOT = Path(qtx_ref.__file__).parent.parent
WITHOUT_TORCH = """
import sys
sys.path.insert(0, {wheel!r})
class Missing:
    def find_spec(self, name, *where):
        if name.partition(".")[0] in ("torch", "pytest"):
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Missing())
import qtx, parity_tests
assert qtx.__file__.startswith({wheel!r}) and parity_tests.__file__.startswith({wheel!r})
from qtx.__main__ import main
sys.argv = ["qtx", *{arguments!r}]
main()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "docs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    for package in ("qtx", "qtx_ref", "qtx_torch", "parity_tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("qtx-*.whl")
    assert wheel.name.startswith(f"qtx-{qtx.__version__}-")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def run_installed(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the unpacked wheel, in an interpreter that finds neither torch nor pytest."""
    code = WITHOUT_TORCH.format(wheel=str(installed), arguments=arguments)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=installed.parent, capture_output=True, text=True, timeout=120
    )


def test_every_module_and_data_file_is_installed(installed: Path) -> None:
    for package in ("qtx", "qtx_ref", "qtx_torch", "parity_tests"):
        here = {
            p.relative_to(ROOT) for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts
        }
        there = {p.relative_to(installed) for p in (installed / package).rglob("*") if p.is_file()}
        tests = {p for p in here if p.parts[:2] in (("parity_tests", "tests"), ("parity_tests", "fixtures"))}
        assert there == here - tests, package


def test_no_installed_file_imports_pytest(installed: Path) -> None:
    assert [p.name for p in installed.rglob("*.py") if "import pytest" in p.read_text(encoding="utf-8")] == []


def test_the_reference_works_without_torch(installed: Path) -> None:
    done = run_installed(installed, "parity", "--backend", "ref", "--only", "quant*")
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout + done.stderr
    done = run_installed(installed, "recipes", "w8a8")
    assert done.returncode == 0 and '"recipe"' in done.stdout, done.stderr


def test_a_backend_that_is_not_installed_says_how_to_get_it(installed: Path) -> None:
    done = run_installed(installed, "parity", "--backend", "torch", "--only", "quant*")
    assert done.returncode != 0 and 'pip install "qtx[torch]"' in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
