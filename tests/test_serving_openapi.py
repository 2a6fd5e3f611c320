"""The search service against its own OpenAPI description."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
pytest.importorskip("schemathesis", reason="requirements-dev.txt is not installed")


@pytest.mark.parametrize("token", [None, "geheim"])
def test_schemathesis_finds_nothing(service, serve, token, tmp_path):
    """What the OpenAPI description allows is answered as it says, what it does not allow is refused: all checks."""
    service = serve(env={"SIMCSE_TOKEN": token}) if token else service
    result = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{service.address}/openapi.json", "--checks", "all",
         "--seed", "1", "--max-examples", "120", *(["--phases", "coverage"] if token else []), "--continue-on-failure",
         "--no-color", *(["--header", f"Authorization: Bearer {token}"] if token else [])],
        cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stdout
    assert "Tested: 8" in result.stdout, result.stdout
    assert int(re.search(r"(\d+) generated", result.stdout)[1]) > (100 if token else 400), result.stdout
    assert "Traceback" not in service.log.read_text(encoding="utf-8")
