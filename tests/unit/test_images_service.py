"""Names, lists, removal, pruning, history, inspection, commit and import on a real store."""

import fcntl
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import BulkheadError, Conflict, Corrupt, Invalid, NotFound
from bulkhead.images import changes, filters
from bulkhead.images.names import Entry, Names
from bulkhead.images.service import ImageService
from bulkhead.oci.image import ContainerConfig, Descriptor
from bulkhead.oci.reference import parse
from tests.helpers.fake_registry import nothing_left, service
from tests.helpers.images import Blobs, BuiltImage, build, oci_archive, tar_of


@pytest.fixture
def images(tmp_path: Path) -> ImageService:
    return service(tmp_path / "home")


def loaded(images: ImageService, tmp_path: Path, *names: str, **options: Any) -> BuiltImage:
    """Load an image whose content depends on its first name."""
    blobs = Blobs()
    image = build(blobs, [tar_of({"base": b"b"}), tar_of({names[0]: b"x" * 100})], **options)
    path = oci_archive(tmp_path / "a.tar", blobs, [(name, image.descriptor) for name in names])
    with path.open("rb") as file:
        images.load(file)
    return image


# --- names


def test_images_are_found_by_name_id_and_prefix(images: ImageService, tmp_path: Path) -> None:
    image = loaded(images, tmp_path, "one:1")
    digest = image.id.removeprefix("sha256:")
    for text in ("one:1", "docker.io/library/one:1", image.id, digest, digest[:12], image.id[:15]):
        assert images.resolve(text).id == image.id
    for text in ("one", "two:1", "0" * 64, "sha256:" + "0" * 64):
        with pytest.raises(NotFound, match=f"No such image: {text}"):
            images.resolve(text)


def test_an_ambiguous_prefix_is_refused(images: ImageService, tmp_path: Path) -> None:
    ids: dict[str, list[str]] = {}
    for number in range(17):  # more images than first digits
        image = loaded(images, tmp_path, f"n{number}:1")
        ids.setdefault(image.id[7], []).append(image.id)
    first = next(digit for digit, found in ids.items() if len(found) > 1)
    if first.isdigit() or first in "abcdef":
        with pytest.raises((Invalid, NotFound), match="ambiguous"):
            images.resolve(f"sha256:{first}")


def test_a_tag_moves_and_its_former_image_dangles(images: ImageService, tmp_path: Path) -> None:
    one = loaded(images, tmp_path, "one:1")
    two = loaded(images, tmp_path, "two:1")
    images.tag("one:1", "app:latest")
    images.tag("two:1", "app")
    assert images.resolve("app").id == two.id
    images.remove("one:1")
    with pytest.raises(NotFound):
        images.resolve(one.id)
    images.tag(two.id, "only:1")
    loaded(images, tmp_path, "three:1")
    images.tag("three:1", "only:1")
    images.remove("two:1")
    images.remove("app")
    assert [row["Id"] for row in images.list({"dangling": ["true"]})] == []


def test_the_last_name_taken_leaves_a_dangling_image(images: ImageService, tmp_path: Path) -> None:
    one = loaded(images, tmp_path, "app:1")
    images.tag("app:1", "keep:1")
    loaded(images, tmp_path, "other:1")
    images.remove("keep:1")
    images.tag("other:1", "app:1")
    (row,) = images.list({"dangling": ["true"]})
    assert row["Id"] == one.id
    assert row["RepoTags"] == []
    assert images.resolve(one.id).names == ()
    images.tag(one.id, "back:1")
    assert images.list({"dangling": ["true"]}) == []


def test_a_tag_cannot_be_a_digest_or_an_id(images: ImageService, tmp_path: Path) -> None:
    loaded(images, tmp_path, "one:1")
    with pytest.raises(Invalid, match="digest reference"):
        images.tag("one:1", "x@sha256:" + "a" * 64)
    with pytest.raises(Invalid, match="hexadecimal"):
        images.tag("one:1", "a" * 64)
    with pytest.raises(NotFound):
        images.tag("nothing", "x")


def test_a_damaged_index_is_an_error_and_nothing_is_dropped(
    images: ImageService, tmp_path: Path
) -> None:
    loaded(images, tmp_path, "one:1")
    path = Path(images.names.path)
    whole = path.read_bytes()
    before = sorted(images.store.blobs())
    for damage in (
        b"",
        b"{",
        whole[: len(whole) // 2],
        whole.replace(b"dev.bulkhead.config", b"x"),
    ):
        path.write_bytes(damage)
        for act in (images.list, lambda: images.resolve("one:1"), images.gc, images.prune):
            with pytest.raises(Corrupt, match=r"index\.json.*is damaged"):
                act()
        with pytest.raises(Corrupt):
            images.tag("one:1", "two:1")
    assert sorted(images.store.blobs()) == before
    path.write_bytes(whole)
    assert images.resolve("one:1").names == ("one:1",)


def test_a_name_that_is_lost_in_the_middle_is_not_half_written(tmp_path: Path) -> None:
    names = Names(str(tmp_path))
    entry = Entry(
        parse("a:1"), Descriptor(digest="sha256:" + "1" * 64, size=1), "sha256:" + "2" * 64
    )
    with names.update() as draft:
        draft.give(entry)
    with pytest.raises(RuntimeError), names.update() as draft:
        draft.forget(entry.image)
        raise RuntimeError
    assert names.read().entries == (entry,)


def test_names_are_given_by_many_at_once(tmp_path: Path) -> None:
    def give(worker: int) -> None:
        names = Names(str(tmp_path))
        for number in range(10):
            with names.update() as draft:
                digest = f"sha256:{worker:032d}{number:032d}"
                reference = parse(f"w{worker}:{number}")
                draft.give(Entry(reference, Descriptor(digest=digest, size=1), digest))

    threads = [threading.Thread(target=give, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Names(str(tmp_path)).read().entries) == 40


def test_readers_do_not_wait_for_the_lock(tmp_path: Path) -> None:
    names = Names(str(tmp_path))
    with names.update():
        pass
    with open(tmp_path / "index.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert names.read().entries == ()


# --- removal


def test_rmi_by_name_untags_until_the_last(images: ImageService, tmp_path: Path) -> None:
    image = loaded(images, tmp_path, "one:1", "two:1")
    assert images.remove("one:1") == [{"Untagged": "one:1"}]
    rows = images.remove("two:1")
    assert rows[0] == {"Untagged": "two:1"}
    assert rows[1] == {"Deleted": image.id}
    assert {"Deleted": images_diff(image)[0]} in rows
    nothing_left(images)


def images_diff(image: BuiltImage) -> list[str]:
    found: list[str] = json.loads(image.config)["rootfs"]["diff_ids"]
    return found


def test_rmi_by_id_of_several_repositories_needs_force(
    images: ImageService, tmp_path: Path
) -> None:
    image = loaded(images, tmp_path, "one:1", "one:2", "two:1")
    short = image.id[7:19]
    words = rf"conflict: unable to delete {short} \(must be forced\) - image is referenced"
    with pytest.raises(Conflict, match=words):
        images.remove(image.id)
    assert len(images.remove(image.id, force=True)) >= 4
    nothing_left(images)


def test_rmi_of_an_image_in_use(images: ImageService, tmp_path: Path) -> None:
    image = loaded(images, tmp_path, "one:1")
    users = {image.id: ["0123456789ab"]}
    words = (
        r'conflict: unable to remove repository reference "one:1" \(must force\) - '
        rf"container 0123456789ab is using its referenced image {image.id[7:19]}"
    )
    with pytest.raises(Conflict, match=words):
        images.remove("one:1", users=users)
    with pytest.raises(Conflict, match=r"must be forced.*stopped container 0123456789ab"):
        images.remove(image.id, users=users)
    with pytest.raises(Conflict, match=r"cannot be forced.*running container 0123456789ab"):
        images.remove(image.id, force=True, users=users, running=["0123456789ab"])
    images.tag("one:1", "two:1")
    assert images.remove("two:1", users=users) == [{"Untagged": "two:1"}]
    assert images.remove("one:1", force=True, users=users) == [{"Untagged": "one:1"}]
    assert images.resolve(image.id).names == ()  # kept for its user
    images.prune(users=users)
    assert images.resolve(image.id).id == image.id
    assert images.prune()["SpaceReclaimed"] > 0
    nothing_left(images)


def test_removal_keeps_layers_that_others_share(images: ImageService, tmp_path: Path) -> None:
    one = loaded(images, tmp_path, "one:1")
    two = loaded(images, tmp_path, "two:1")
    assert images_diff(one)[0] == images_diff(two)[0]
    rows = images.remove("one:1")
    assert {"Deleted": images_diff(one)[0]} not in rows
    assert {"Deleted": images_diff(one)[1]} in rows
    assert images.store.layer(images_diff(two)[0]) is not None


def test_prune_takes_dangling_images_or_all_unused(images: ImageService, tmp_path: Path) -> None:
    used = loaded(images, tmp_path, "used:1")
    loaded(images, tmp_path, "labelled:1", config={"Labels": {"keep": "yes"}})
    loaded(images, tmp_path, "old:1")
    assert images.prune() == {"ImagesDeleted": None, "SpaceReclaimed": 0}
    report = images.prune({"dangling": ["false"], "label!": ["keep=yes"]}, users={used.id: ["box"]})
    assert {"Untagged": "old:1"} in report["ImagesDeleted"]
    assert report["SpaceReclaimed"] > 0
    assert {row["RepoTags"][0] for row in images.list()} == {"used:1", "labelled:1"}
    assert (
        images.prune({"dangling": {"false": True}, "until": ["2000-01-01"]})["ImagesDeleted"]
        is None
    )


# --- lists


def names_of(images: ImageService, **wanted: Any) -> list[str]:
    return sorted(row["RepoTags"][0] for row in images.list(wanted))


def test_list_filters(images: ImageService, tmp_path: Path) -> None:
    loaded(images, tmp_path, "old:1", created="2020-01-01T00:00:00Z")
    loaded(images, tmp_path, "new:1", created="2024-01-01T00:00:00Z", config={"Labels": {"a": "b"}})
    loaded(images, tmp_path, "r.lan:5000/x/new:2", created="2022-01-01T00:00:00Z")
    assert names_of(images) == ["new:1", "old:1", "r.lan:5000/x/new:2"]
    assert names_of(images, reference=["new"]) == ["new:1"]
    assert names_of(images, reference=["*:1"]) == ["new:1", "old:1"]
    assert names_of(images, reference=["r.lan:5000/*/new:2"]) == ["r.lan:5000/x/new:2"]
    assert names_of(images, reference=["n[a-f]w"]) == ["new:1"]
    assert names_of(images, before=["new:1"]) == ["old:1", "r.lan:5000/x/new:2"]
    assert names_of(images, since=["old:1"]) == ["new:1", "r.lan:5000/x/new:2"]
    assert names_of(images, until=["2021-01-01"]) == ["old:1"]
    assert names_of(images, label=["a"]) == ["new:1"]
    assert names_of(images, label=["a=b"]) == ["new:1"]
    assert names_of(images, label=["a=c"]) == []
    assert names_of(images, dangling={"false": True}) == ["new:1", "old:1", "r.lan:5000/x/new:2"]
    for bad in ({"nope": ["x"]}, {"dangling": ["maybe"]}, {"until": ["yesterday"]}, {"label": 5}):
        with pytest.raises(Invalid):
            images.list(bad)
    assert [row["Created"] for row in images.list()] == sorted(
        (row["Created"] for row in images.list()), reverse=True
    )


def test_durations_and_timestamps() -> None:
    assert filters.moment("10m", 1000.0) == 400.0
    assert filters.moment("1h30m", 10_000.0) == 4600.0
    assert filters.moment("1700000000", 0) == 1_700_000_000
    assert filters.moment("1970-01-02", 0) == 86400.0
    assert filters.moment("1970-01-01T00:00:01", 0) == 1.0
    assert filters.moment("1970-01-01T01:00:00+01:00", 0) == 0.0


def test_sizes_are_true_and_shared_layers_counted_once(
    images: ImageService, tmp_path: Path
) -> None:
    one = loaded(images, tmp_path, "one:1")
    loaded(images, tmp_path, "two:1")
    usage = images.disk_usage({one.id: ["box"]})
    layers = images.store.layers()
    assert len(layers) == 3
    on_disk = sum(images.store.layer_bytes(layer) for layer in layers)
    assert usage["LayersSize"] >= on_disk
    assert 0 < usage["Reclaimable"] < usage["LayersSize"]
    assert all(row["SharedSize"] > 0 for row in usage["Images"])
    total = usage["LayersSize"]
    freed = images.prune({"dangling": ["false"]}, users={one.id: ["box"]})["SpaceReclaimed"]
    assert freed == usage["Reclaimable"]
    assert images.disk_usage()["LayersSize"] == total - freed


# --- one image


def test_history_and_inspection_are_dockers(images: ImageService, tmp_path: Path) -> None:
    image = loaded(images, tmp_path, "one:1", config={"User": "u", "ExposedPorts": {"80/tcp": {}}})
    rows = images.history("one:1")
    assert [row["CreatedBy"] for row in rows] == ["layer 1", "layer 0"]
    assert rows[0]["Id"] == image.id
    assert rows[0]["Tags"] == ["one:1"]
    assert rows[1]["Id"] == "<missing>"
    shown = images.inspect("one:1")
    assert shown["Id"] == image.id
    assert shown["RepoTags"] == ["one:1"]
    assert shown["Config"]["User"] == "u"
    assert shown["Config"]["ExposedPorts"] == {"80/tcp": {}}
    assert shown["RootFS"] == {"Type": "layers", "Layers": images_diff(image)}
    assert shown["Created"] == "2024-05-06T07:08:09Z"
    assert shown["Size"] == sum(row["Size"] for row in rows)


def test_commit_adds_a_layer_and_changes(images: ImageService, tmp_path: Path) -> None:
    parent = loaded(images, tmp_path, "one:1")
    made = images.commit(
        images.resolve("one:1"),
        [tar_of({"added": b"new"})],
        config={"Cmd": ["run"], "Env": ["A=1"], "Hostname": "box", "Tty": True, "Labels": None},
        changes=["ENV B=2", 'CMD ["go"]', "EXPOSE 80"],
        ref="made",
        author="me",
        comment="why",
    )
    assert made.names == ("made:latest",)
    assert made.diff_ids[:2] == tuple(images_diff(parent))
    assert made.config.container.env == ["A=1", "B=2"]
    assert made.config.container.cmd == ["go"]
    assert made.config.container.hostname == ""
    shown = images.inspect("made")
    assert (shown["Author"], shown["Comment"]) == ("me", "why")
    images.remove("one:1")
    assert len(images.history("made")) == 3
    empty = images.commit(images.resolve("made"), [bytes(1024)], ref="empty")
    assert empty.diff_ids == made.diff_ids
    assert images.history("empty")[0]["Size"] == 0


def test_a_refused_layer_leaves_no_image(images: ImageService, tmp_path: Path) -> None:
    loaded(images, tmp_path, "one:1")
    with pytest.raises(BulkheadError):
        images.commit(images.resolve("one:1"), [b"no tar" * 500], ref="made")
    with pytest.raises(Invalid, match="not a valid change command"):
        images.commit(images.resolve("one:1"), [bytes(1024)], changes=["RUN x"], ref="made")
    with pytest.raises(NotFound):
        images.resolve("made")
    assert images.list({"dangling": ["true"]}) == []


def test_import_makes_an_image_of_one_layer(images: ImageService) -> None:
    made = images.import_(
        [tar_of({"bin/sh": b"x"})], "rootfs:1", ["CMD sh"], "from a file", "linux/arm64"
    )
    assert made.config.architecture == "arm64"
    assert made.config.container.cmd == ["/bin/sh", "-c", "sh"]
    assert images.history("rootfs:1")[0]["Comment"] == "from a file"


# --- change instructions


@pytest.mark.parametrize(
    ("line", "member", "value"),
    [
        ('CMD ["a", "b c"]', "cmd", ["a", "b c"]),
        ("CMD a b", "cmd", ["/bin/sh", "-c", "a b"]),
        ('entrypoint ["/x"]', "entrypoint", ["/x"]),
        ("ENV A=1 B='two words' C=\"x y\"", "env", ["P=q", "A=1", "B=two words", "C=x y"]),
        ("ENV A the rest", "env", ["P=q", "A=the rest"]),
        ("ENV P=r", "env", ["P=r"]),
        ("EXPOSE 80 443/udp 8000-8001", "exposed_ports",
         {"80/tcp": {}, "443/udp": {}, "8000/tcp": {}, "8001/tcp": {}}),
        ("LABEL a=b c=", "labels", {"a": "b", "c": ""}),
        ('VOLUME ["/a b"]', "volumes", {"/a b": {}}),
        ("VOLUME /a /b", "volumes", {"/a": {}, "/b": {}}),
        ("WORKDIR sub", "working_dir", "/base/sub"),
        ("WORKDIR /x/../y", "working_dir", "/y"),
        ("USER 1:2", "user", "1:2"),
        ("STOPSIGNAL SIGINT", "stop_signal", "SIGINT"),
        ("STOPSIGNAL 9", "stop_signal", "9"),
        ("ONBUILD RUN make", "on_build", ["RUN make"]),
    ],
)  # fmt: skip
def test_a_change(line: str, member: str, value: object) -> None:
    base = ContainerConfig(env=["P=q"], working_dir="/base")
    assert getattr(changes.apply(base, [line]), member) == value
    assert base == ContainerConfig(env=["P=q"], working_dir="/base")


def test_a_health_check_change() -> None:
    line = "HEALTHCHECK --interval=1m30s --timeout=500ms --retries=3 CMD curl -f localhost"
    check = changes.apply(ContainerConfig(), [line]).healthcheck
    assert check is not None
    assert check.test == ["CMD-SHELL", "curl -f localhost"]
    assert (check.interval, check.timeout, check.retries) == (90 * 10**9, 5 * 10**8, 3)
    none = changes.apply(ContainerConfig(), ["HEALTHCHECK NONE"]).healthcheck
    assert none is not None
    assert none.test == ["NONE"]


@pytest.mark.parametrize(
    "line",
    [
        "RUN x", "FROM y", "ENV", "ENV A", "LABEL =x", "EXPOSE", "EXPOSE 0", "EXPOSE 70000",
        "EXPOSE 9-8", "EXPOSE x", "USER", "USER a b", "WORKDIR", "VOLUME", "STOPSIGNAL nope",
        "STOPSIGNAL 99", "ONBUILD FROM x", "ONBUILD", "HEALTHCHECK", "HEALTHCHECK CMD",
        "HEALTHCHECK --x=1 CMD y", "HEALTHCHECK --retries=x CMD y", "ENV A='",
    ],
)  # fmt: skip
def test_a_bad_change_is_invalid(line: str) -> None:
    with pytest.raises(Invalid):
        changes.apply(ContainerConfig(), [line])


@given(st.text(max_size=60))
def test_any_change_is_applied_or_invalid(text: str) -> None:
    for word in ("", "ENV ", "EXPOSE ", "HEALTHCHECK ", "CMD ", "VOLUME "):
        try:
            changes.apply(ContainerConfig(), [word + text])
        except Invalid:
            continue
