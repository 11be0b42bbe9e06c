"""The malformed requests that schemathesis makes of the OpenAPI document: no 5xx, no answer to what makes no sense.

CUSPRUN_SCHEMATHESIS_EXAMPLES raises the number of random requests for each address.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.deploy.serving import serving, small_gguf

# positive_data_acceptance is left out: an empty prompt, or options that go together only, a schema cannot say.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,negative_data_rejection,unsupported_method,ignored_auth"
)
EXAMPLES = os.environ.get("CUSPRUN_SCHEMATHESIS_EXAMPLES", "20")
KEY = "a-key-for-schemathesis"


def test_malformed_requests(tmp_path: Path) -> None:
    with serving(small_gguf(tmp_path), "--max-tokens", "4", "--api-key", KEY) as server:
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
        done = subprocess.run(
            [
                *command, "run", f"{server.root}/openapi.json", "--header", f"Authorization: Bearer {KEY}",
                "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", "1",
                "--generation-database", "none", "--no-color", "--checks", CHECKS,
            ],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        generated = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert generated, done.stdout
        assert int(generated[1]) > 200
        assert server.metric("cusprun_generated_tokens_total", KEY) > 0  # some were answered
        assert server.post("completions", prompt="Le").status_code == 401
