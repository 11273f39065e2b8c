"""The build cache from other places: what it says is not trusted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bulkhead.build import transport
from bulkhead.build.cache import Cache
from bulkhead.oci.image import ContainerConfig, History, ImageConfig

_LAYER = "sha256:" + "a" * 64
_KEY = "b" * 64


def _builder(cache: Cache, warnings: list[str], *comments: str) -> Any:
    config = ImageConfig(
        config=ContainerConfig(labels={"dev.bulkhead.build-cache": "1"}),
        history=[History("", f"{_LAYER} RUN x", comment=comment) for comment in comments],
    )
    image = SimpleNamespace(id="sha256:0", config=SimpleNamespace(
        container=config.config, history=config.history), diff_ids=(_LAYER,))  # fmt: skip
    step = SimpleNamespace(done=lambda: None)
    return SimpleNamespace(
        cache=cache,
        options=SimpleNamespace(auths={}, format="oci"),
        reporter=SimpleNamespace(step=lambda *_, **__: step, warn=warnings.append),
        host=SimpleNamespace(
            images=SimpleNamespace(pull=lambda *_: image),
            store=SimpleNamespace(layer=lambda _: SimpleNamespace(size=7)),
        ),
    )


def test_keys_of_others_name_no_files(tmp_path: Path) -> None:
    warnings: list[str] = []
    cache = Cache(str(tmp_path / "build"))
    hostile = ("../../evil run", f"/{tmp_path}/evil run", f"{_KEY}/../../evil run", " run")
    transport.load(_builder(cache, warnings, *hostile, f"{_KEY} run"), "example.org/cache:1")
    assert [step.key for step in cache.steps()] == [_KEY]
    assert len(warnings) == len(hostile)
    assert {path.name for path in tmp_path.rglob("*.json")} == {f"{_KEY}.json"}
