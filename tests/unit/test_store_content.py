"""Blobs, leases, collection, resumption and eviction."""

import bz2
import gzip
import hashlib
import lzma
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Conflict, Corrupt, Invalid, NotFound, Unavailable
from bulkhead.store import codecs
from bulkhead.store.content import ContentStore
from bulkhead.store.limits import Limits
from tests.helpers import archives as a


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    """An empty store."""
    return ContentStore(str(tmp_path / "store"))


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_layout_and_small_blobs(store: ContentStore) -> None:
    """put, has, size, read, open; the directory is an OCI image layout."""
    digest = store.put(b"hello")
    assert digest == _digest(b"hello")
    assert store.put(b"hello") == digest
    assert store.has(digest)
    assert store.size(digest) == 5
    assert store.read(digest) == b"hello"
    with store.open(digest) as stream:
        assert stream.read() == b"hello"
    assert (Path(store.root) / "blobs/sha256" / digest[7:]).read_bytes() == b"hello"
    assert b"imageLayoutVersion" in (Path(store.root) / "oci-layout").read_bytes()
    assert store.blobs() == [digest]


def test_missing_and_wrong(store: ContentStore) -> None:
    """NotFound for what is not there, Invalid for what is no digest or too large."""
    missing = "sha256:" + "0" * 64
    assert not store.has(missing)
    for ask in (store.size, store.read, store.open):
        with pytest.raises(NotFound):
            ask(missing)
    with pytest.raises(Invalid):
        store.has("sha256:../../../etc/passwd")
    digest = store.put(b"x" * 100)
    with pytest.raises(Invalid):
        store.read(digest, limit=99)


def test_damage_is_noticed_by_read(store: ContentStore) -> None:
    """`read` verifies again."""
    digest = store.put(b"hello")
    path = Path(store.blob_path(digest))
    path.chmod(0o600)
    path.write_bytes(b"jello")
    with pytest.raises(Corrupt):
        store.read(digest)


def test_writer_is_hidden_until_commit(store: ContentStore) -> None:
    """Nothing of a blob is seen before commit; wrong digest or size is Corrupt and removed."""
    digest = _digest(b"abcdef")
    with store.writer(digest, 6) as writer:
        writer.write(b"abc")
        assert not store.has(digest)
        writer.write(b"def")
        assert not store.has(digest)
        assert writer.commit() == digest
        with pytest.raises(Conflict):
            writer.publish()
    assert store.has(digest)
    before = a.snapshot(store)
    with pytest.raises(Corrupt), store.writer(_digest(b"other")) as writer:
        writer.write(b"abc")
        writer.commit()
    with pytest.raises(Corrupt), store.writer(size=2) as writer:
        writer.write(b"abc")
    with pytest.raises(RuntimeError), store.writer() as writer:
        writer.write(b"abc")
        raise RuntimeError
    assert a.snapshot(store) == before


def test_resume(store: ContentStore) -> None:
    """An interrupted blob goes on where it stopped; abort and damage start anew."""
    data = os.urandom(100_000)
    digest = _digest(data)
    with store.writer(digest, len(data), resume=True) as writer:
        assert writer.offset == 0
        writer.write(data[:40_000])
    with store.writer(digest, len(data), resume=True) as writer:
        assert writer.offset == 40_000
        with store.writer(digest, len(data), resume=True) as second:  # taken: begins anew
            assert second.offset == 0
        writer.write(data[40_000:])
        writer.commit()
    assert store.read(digest) == data
    store.evict(digest)
    with store.writer(digest, len(data), resume=True) as writer:
        writer.write(data[:40_000])
        writer.abort()
    with store.writer(digest, len(data), resume=True) as writer:
        assert writer.offset == 0
        writer.write(b"x" * 10)
    with store.writer(digest, len(data), resume=True) as writer:
        writer.write(data[10:])
        with pytest.raises(Corrupt):
            writer.commit()
    assert os.listdir(f"{store.root}/partial") == []


def _archive(seed: int = 1, size: int = 300_000) -> bytes:
    return a.file(b"f", random.Random(seed).randbytes(size)) + a.file(b"g", b"z" * 9000) + a.END


def test_ingest_resumes_after_a_lost_connection(store: ContentStore) -> None:
    """What came before the chunks failed is kept, asked for from its offset, and used."""
    data = _archive(size=3_000_000)
    packed = gzip.compress(data, 1)
    digest = _digest(packed)
    asked: list[int] = []

    def failing(offset: int) -> Iterator[bytes]:
        asked.append(offset)
        for at in range(offset, len(packed), 100_000):
            if at >= offset + 1_200_000:
                raise ConnectionError("lost")
            yield packed[at : at + 100_000]

    for _ in range(2):
        with pytest.raises(ConnectionError):
            store.ingest(failing, digest=digest, size=len(packed), resume=True)
        assert store.layers() == []
        assert not store.has(digest)
    told: list[int] = []
    layer = store.ingest(
        failing, digest=digest, size=len(packed), resume=True, progress=told.append
    )
    assert asked[0] == 0
    assert asked[1] > 0
    assert asked[2] > asked[1]
    assert told[-1] == len(packed)
    assert layer.diff_id == _digest(data)
    assert b"".join(store.blob_for(digest, layer.diff_id)) == packed
    assert os.listdir(f"{store.root}/partial") == []


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "zstd": zstd.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("compression", PACK)
def test_ingest_compressions(store: ContentStore, compression: str) -> None:
    """Every compression is told by its first bytes or by name; the blob is kept exactly."""
    data = _archive()
    packed = PACK[compression](data)
    assert codecs.detect(packed[:6]) == compression
    layer = a.ingest(store, packed)
    assert a.ingest(store, packed, compression=compression) == layer
    assert layer.diff_id == _digest(data)
    assert layer.digest == _digest(packed)
    assert layer.blob_size == len(packed)
    assert layer.size == len(data)
    assert layer.form == "erofs"
    assert b"".join(store.tar(layer.diff_id)) == data
    assert b"".join(store.blob_for(layer.digest, layer.diff_id)) == packed
    assert store.has(layer.digest)
    assert store.size(layer.diff_id) == len(data)
    with store.open(layer.diff_id) as stream:
        assert stream.read() == data
    assert os.listdir(f"{store.root}/work") == []


def test_uncompressed_layers_are_stored_once(store: ContentStore) -> None:
    """The tar is not kept beside the image; it reads as a blob all the same."""
    data = _archive()
    layer = a.ingest(store, data, digest=_digest(data))
    assert store.blobs() == []
    assert store.has(layer.diff_id)
    assert store.read(layer.diff_id) == data
    assert store.disk_usage() < 1.2 * len(data) + 100_000


def test_eviction(store: ContentStore) -> None:
    """A blob of ours is made again exactly; another program's names its remedy."""
    data = _archive()
    layer = a.ingest(store, gzip.compress(data, 9))
    for compression in ("gzip", "zstd"):
        digest, size = store.compress(layer.diff_id, compression)
        blob = store.read(digest)
        assert len(blob) == size
        assert store.compress(layer.diff_id, compression) == (digest, size)
        assert store.evict(digest) > 0
        assert not store.has(digest)
        assert b"".join(store.blob_for(digest, layer.diff_id)) == blob
    assert store.evict(layer.digest) > 0
    assert store.evict(layer.digest) == 0
    with pytest.raises(NotFound, match=r"evicted.*Pull its image again"):
        b"".join(store.blob_for(layer.digest, layer.diff_id))
    assert b"".join(store.tar(layer.diff_id)) == data


@given(st.lists(st.binary(max_size=2000), max_size=20), st.sampled_from(sorted(codecs.COMPRESSORS)))
def test_compression_depends_on_bytes_alone(chunks: list[bytes], compressor: str) -> None:
    """However the input is cut, the output is the same, so digests are reproducible."""
    whole = b"".join(chunks) * 50
    once = b"".join(codecs.compress([whole], compressor))
    assert b"".join(codecs.compress(a.chunked(whole, 777), compressor)) == once
    name = compressor.split("-")[0].replace("isal", "gzip")
    assert b"".join(codecs.decompress([once], name)) == whole


def test_gc_by_reference(store: ContentStore) -> None:
    """Only what the roots name stays; the report tells the truth about the disk."""
    kept, dropped = store.put(b"kept" * 3000), store.put(b"dropped" * 3000)
    one, two = (
        a.ingest(store, gzip.compress(_archive(1))),
        a.ingest(store, gzip.compress(_archive(2))),
    )
    usage = store.disk_usage()
    report = store.gc(lambda: [kept, one.diff_id, one.digest])
    assert set(report.digests) == {dropped, two.diff_id, two.digest}
    assert store.blobs() == sorted([kept, one.digest])
    assert store.layers() == [one.diff_id]
    assert abs(usage - store.disk_usage() - report.freed) <= 8192
    assert b"".join(store.tar(one.diff_id))
    with pytest.raises(NotFound):
        b"".join(store.tar(two.diff_id))


def test_gc_may_read_the_store_for_its_roots(store: ContentStore) -> None:
    """The roots are often in manifests that are blobs themselves."""
    leaf = store.put(b"leaf")
    manifest = store.put(leaf.encode())
    store.gc(lambda: [manifest, store.read(manifest).decode()])
    assert store.blobs() == sorted([leaf, manifest])


def test_lease(store: ContentStore) -> None:
    """What is stored, or found present, under a lease outlives a collection; also by others."""
    found = store.put(b"found")
    with store.lease() as lease:
        assert store.has(found)
        put = store.put(b"put")
        layer = a.ingest(store, gzip.compress(_archive()))
        other = ContentStore(store.root)
        assert other.gc(lambda: ()).digests == []
        named = "sha256:" + "1" * 64
        lease.add(named)
        assert store.gc(lambda: ()).digests == []
    assert set(store.gc(lambda: ()).digests) == {found, put, layer.digest, layer.diff_id}
    assert os.listdir(f"{store.root}/leases") == []


def test_dead_leases_and_scratch_are_swept(store: ContentStore) -> None:
    """Files of a crashed process, which nobody locks, protect nothing and go."""
    digest = store.put(b"x")
    Path(f"{store.root}/leases/dead").write_text(digest + "\n")
    os.makedirs(f"{store.root}/work/dead/layer")
    Path(f"{store.root}/work/dead/layer/image.erofs").write_bytes(b"half")
    Path(f"{store.root}/work/deadfile").write_bytes(b"half")
    Path(f"{store.root}/partial/{'0' * 64}").write_bytes(b"half")
    ContentStore(store.root)
    assert os.listdir(f"{store.root}/work") == []
    assert store.gc(lambda: ()).digests == [digest]
    assert os.listdir(f"{store.root}/leases") == []
    assert os.listdir(f"{store.root}/partial") == ["0" * 64]
    store.gc(lambda: (), partial_age_s=0)
    assert os.listdir(f"{store.root}/partial") == []


def test_live_scratch_is_not_swept(store: ContentStore) -> None:
    """A second store object and a collection leave a running writer alone."""
    with store.writer() as writer:
        writer.write(b"abc")
        ContentStore(store.root).gc(lambda: (), partial_age_s=0)
        writer.write(b"def")
        digest = writer.commit()
    assert store.read(digest) == b"abcdef"


def test_concurrent_use(store: ContentStore) -> None:
    """Threads storing the same and different content while others collect: all of it is whole."""
    archives = [gzip.compress(_archive(n, 50_000), 1) for n in range(4)]
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        mine = ContentStore(store.root) if seed % 2 else store
        try:
            for _ in range(12):
                packed = chance.choice(archives)
                with mine.lease():
                    layer = a.ingest(mine, packed)
                    blob = mine.put(b"%d" % chance.randrange(5))
                    assert mine.read(blob)
                    assert b"".join(mine.blob_for(layer.digest, layer.diff_id)) == packed
                    assert _digest(b"".join(mine.tar(layer.diff_id))) == layer.diff_id
        except BaseException as error:
            errors.append(error)

    def collect() -> None:
        try:
            while not stop.is_set():
                store.gc(lambda: ())
        except BaseException as error:
            errors.append(error)

    collector = threading.Thread(target=collect)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in (collector, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    collector.join()
    assert not errors, errors
    store.gc(lambda: (), partial_age_s=0)
    assert store.blobs() == store.layers() == []
    for name in ("work", "partial", "leases", "provenance"):
        assert os.listdir(f"{store.root}/{name}") == []


def test_failing_chunks_leave_nothing(store: ContentStore) -> None:
    """Without `resume`, an error of the caller's chunks comes back and nothing stays."""
    before = a.snapshot(store)

    def failing() -> Iterator[bytes]:
        yield _archive()[:200_000]
        raise KeyError("mine")

    with pytest.raises(KeyError):
        store.ingest(failing())
    assert a.snapshot(store) == before
    assert threading.active_count() < 20


def test_ingest_twice_gives_one_layer(store: ContentStore) -> None:
    """The second time the first result stays."""
    packed = gzip.compress(_archive())
    first = a.ingest(store, packed)
    inode = os.stat(first.path).st_ino
    assert a.ingest(store, packed) == first
    assert os.stat(first.path).st_ino == inode


def test_no_space_is_told_plainly(tmp_path: Path) -> None:
    """A store that would fill its file system stops before it does."""
    store = ContentStore(str(tmp_path / "s"), Limits(free_bytes=1 << 62))
    before = a.snapshot(store)
    with pytest.raises(Unavailable, match="no space"):
        a.ingest(store, a.file(b"f", bytes(70 << 20)) + a.END)
    assert a.snapshot(store) == before
