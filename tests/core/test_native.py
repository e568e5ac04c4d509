"""Builds the C++ tests with sanitizers and runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=600)


def can_sanitize(kind: str, folder: Path) -> bool:
    """Whether the C++ compiler makes programs with this sanitizer that run here."""
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("cmake") is None:
        return False
    (folder / "empty.cpp").write_text("int main() { return 0; }\n")
    built = run(compiler, f"-fsanitize={kind}", folder / "empty.cpp", "-o", folder / "empty")
    return built.returncode == 0 and run(folder / "empty").returncode == 0


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_cpp_tests_pass_under_sanitizers(kind: str, tmp_path: Path) -> None:
    if not can_sanitize(kind, tmp_path):
        pytest.skip(f"no cmake, no compiler, or no -fsanitize={kind}")
    configured = run(
        "cmake", "-S", ROOT, "-B", tmp_path / "build",
        "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
        "-DCROSSCODER_BUILD_MODULE=OFF", "-DCROSSCODER_BUILD_TESTS=ON", "-DCROSSCODER_WERROR=ON",
        f"-DCROSSCODER_SANITIZE={kind}",
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = run("cmake", "--build", tmp_path / "build", "--parallel", "2")
    assert built.returncode == 0, built.stdout + built.stderr
    for name in ("core_test", "store_test"):
        tested = run(tmp_path / "build" / name)
        assert tested.returncode == 0, tested.stdout + tested.stderr
