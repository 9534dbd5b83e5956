"""Invariant: the wheel holds this package, its license and entry points, no more, and works without the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT

SOURCES = ("vllm_dwdp", "kernels", "entrypoints", "pyproject.toml", "README.md", "LICENSE")
SKIP = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without the network, from a copy with more beside it, as in a checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy, out = folder / "copy", folder / "out"
    copy.mkdir()
    for name in (*SOURCES, "tests", "examples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=SKIP)
        else:
            shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    built = subprocess.run([*pip, "-w", str(out), str(copy)], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    (found,) = out.iterdir()
    return found


def test_contents(wheel: Path) -> None:
    """One top-level package, every module of the checkout in it, py.typed and the license."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = [top for top in tops if top.endswith(".dist-info")]
    assert tops - {info} == {"vllm_dwdp"}
    places = {"vllm_dwdp": "vllm_dwdp", "kernels": "vllm_dwdp/kernels", "entrypoints": "vllm_dwdp/entrypoints"}
    expected = {f"{to}/{path.relative_to(ROOT / folder)}" for folder, to in places.items() for path in (ROOT / folder).rglob("*.py")}
    data = {"vllm_dwdp/py.typed", "vllm_dwdp/entrypoints/plan/rates.json"}
    assert {name for name in names if name.startswith("vllm_dwdp/")} == expected | data
    assert f"{info}/licenses/LICENSE" in names
    assert zipfile.ZipFile(wheel).read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.engine
def test_installed(wheel: Path, tmp_path: Path) -> None:
    """Unpacked in another folder, the package and both entry points come from there, with the version of the wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """if True:
        import sys
        sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
        sys.path.insert(0, sys.argv[1])
        import importlib.metadata as metadata
        (found,) = metadata.distributions(name="vllm-dwdp", path=[sys.argv[1]])
        points = {(point.group, point.name): point.load() for point in found.entry_points}
        assert set(points) == {("vllm.general_plugins", "dwdp"), ("console_scripts", "vllm-dwdp")}, points
        assert all(callable(point) for point in points.values())
        points["vllm.general_plugins", "dwdp"]()
        import vllm_dwdp, vllm_dwdp.kernels.device, vllm_dwdp.integration.worker, vllm_dwdp.entrypoints.plugin
        assert vllm_dwdp.__version__ == found.version == sys.argv[2], (vllm_dwdp.__version__, found.version)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "vllm_dwdp":
                assert module.__file__.startswith(sys.argv[1]), module
    """
    version = wheel.name.split("-")[1]
    command = [sys.executable, "-c", code, str(tmp_path / "site"), version]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert ended.returncode == 0, ended.stderr[-3000:]
