"""schemathesis asks what Docker's description of the API allows, and what it does not."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import api_fuzz
from tests.helpers.api_relay import relay
from tests.helpers.api_rig import Api, api
from tests.helpers.images import has_busybox
from tests.helpers.residue import residue
from tests.helpers.scale import SCALE
from tests.helpers.waiting import until

EXAMPLES = max(2, int(2 * SCALE))
SEED = "5"
PATIENCE_S = 120
TIMEOUT_S = 1500 * max(1, SCALE)
SETTINGS = """
[checks.not_a_server_error]
expected-statuses = ["1xx", "2xx", "3xx", "4xx", 501, 503]
"""
"""501 and 503 tell in words what there is not."""
ABSENT = ("/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs", "/plugins")
REGISTRIES = frozenset({
    "/auth", "/distribution/{name}/json", "/images/create", "/images/search",
    "/images/{name}/push",
})  # fmt: skip
ENDLESS = frozenset({
    "/events", "/session", "/containers/{id}/attach", "/containers/{id}/attach/ws",
    "/containers/{id}/wait", "/exec/{id}/start",
})  # fmt: skip
ARCHIVES = frozenset({"/images/load"})
"""schemathesis makes no tar."""
FIXED: dict[tuple[str, str, str], Any] = {
    ("/containers/{id}/logs", "get", "follow"): False,
    ("/containers/{id}/stats", "get", "stream"): False,
    ("/build", "post", "version"): "1",
    ("/build", "post", "remote"): "",
}
"""What would not end, would ask for BuildKit, or for other machines."""


def described() -> dict[str, Any]:
    """The description without what is not asked for here."""
    document: dict[str, Any] = yaml.load(api_fuzz.SWAGGER.read_text(), Loader=yaml.CSafeLoader)
    left_out = REGISTRIES | ENDLESS | ARCHIVES
    document["paths"] = {
        path: copy.deepcopy(item)
        for path, item in document["paths"].items()
        if path not in left_out and not path.startswith(ABSENT)
    }
    for (path, method, name), value in FIXED.items():
        for parameter in document["paths"][path][method]["parameters"]:
            if parameter["name"] == name:
                parameter |= {"enum": [value], "default": value}
    for item in document["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    # Something that there is, else everything is a 404.
                    chosen = "fuzzed" if parameter["name"] == "id" else "busybox:latest"
                    parameter |= {"enum": [chosen, "nope"]}
    _adapt(document)
    return document


def _adapt(value: Any) -> None:
    """No examples, which name interfaces and folders; null is fine where nothing is, as in Go."""
    if isinstance(value, dict):
        for name in [name for name in ("example", "examples", "x-example") if name in value]:
            del value[name]
        properties = value.get("properties")
        if isinstance(properties, dict):
            for one in properties.values():
                one["x-nullable"] = True
        for inner in value.values():
            _adapt(inner)
    elif isinstance(value, list):
        for inner in value:
            _adapt(inner)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Api]:
    if os.geteuid() != 0:
        pytest.skip("engines want root")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    if not api_fuzz.SWAGGER.exists():
        pytest.skip(f"{api_fuzz.SWAGGER} is not here")
    if find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    with residue(str(tmp_path)), api(tmp_path) as made:
        yield made


def test_whatever_schemathesis_asks_is_answered(here: Api, tmp_path: Path) -> None:
    with here.client() as client:
        client.containers.create("busybox", ["true"], name="fuzzed")
    before = here.descriptors()
    document = tmp_path / "swagger.json"
    document.write_text(json.dumps(described()))
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    with relay(here.path) as port:
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", str(document),
             "--url", f"http://127.0.0.1:{port}/v1.50", "--checks",
             "not_a_server_error,response_schema_conformance",
             "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", SEED,
             "--no-shrink", "--generation-database", "none", "--continue-on-failure",
             "--request-timeout", str(PATIENCE_S), "--warnings", "off"],
            capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    log = here.rig.log.read_text()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:] + log[-3000:]
    assert "unexpected" not in log, log[-3000:]
    until(lambda: here.descriptors() <= before, "descriptors are closed")
