"""The wheel is all that a user needs: in an empty environment it answers the demo question, offline.

`make dist` makes the distributions; without them the test makes the wheel itself.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from keye.version import __version__

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KEYE_"))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    if importlib.util.find_spec("build.env") is None:
        pytest.skip("needs the extra: pip install keye[dev]")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


def test_distributions_hold_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name == f"keye-{__version__}-py3-none-any.whl" and sdist.name == f"keye-{__version__}.tar.gz"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"keye", f"keye-{__version__}.dist-info"}
    package = ROOT / "src/keye"
    sources = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    assert set(names) >= {name for name in sources if "__pycache__" not in name}
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert top >= {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "src", "tests", "tools"}
    assert not top & {".venv", "build", "dist", ".git"}


def test_the_wheel_answers_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    find = "import pathlib, keye; print(pathlib.Path(keye.__file__).parent)"
    package = Path(run(python, "-c", find, cwd=tmp_path).strip())
    assert package.is_relative_to(folder)
    question = "when is the cyan triangle visible?"
    assert "[[2.0, 14.0]]" in run(folder / "bin/keye", "ask", package / "assets/demo.mp4", question, cwd=tmp_path)
    assert run(folder / "bin/keye", "--version", cwd=tmp_path).split()[-1] == __version__
