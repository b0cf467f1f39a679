from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from cluster.cache import cache_directory
from cluster.errors import ArtifactError
from cluster.store import Store
from retrieval import faiss_guard
from retrieval.faiss_guard import ExpectedIndex, check_files, read_guarded, read_limited
from retrieval.vector_search import INDEX_FILE, VectorIndex
from tests.cluster.stores import plan
from tests.retrieval.vector_data import Vectors, build, unit_vectors

ROWS, DIMENSION = 300, 16
INDEXED = ("hnsw", "ivf_flat", "ivf_pq")
WORDS = (0, -1, 1, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))
OTHER_KINDS = ("IVF4,SQ8", "IVF4_HNSW8,Flat", "PCA8,Flat", "IVF4,Flat,RFlat", "PQ4", "Flat")


def damaged_bytes(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Truncated, with header words at the ends of their range, with words anywhere overwritten, of another type."""
    for cut in (0, 3, 4, 20, len(content) // 2, len(content) - 1):
        yield content[:cut]
    yield b"IxFI" + content[4:]
    yield content[:4][::-1] + content[4:]
    yield content + content
    places = [*rng.integers(4, 120, 30), *rng.integers(len(content) - 400, len(content) - 8, 12)]
    places += list(rng.integers(4, len(content) - 8, 20))
    for place in places:
        word = int(rng.choice(np.array(WORDS, dtype=np.int64)))
        size = 8 if place % 2 else 4
        value = word.to_bytes(8, "little", signed=True)[:size]
        yield content[:place] + value + content[place + size :]
    nan = np.full(4, np.nan, dtype=np.float32).tobytes()
    for place in rng.integers(100, len(content) - 16, 4):
        yield content[:place] + nan + content[place + 16 :]


def damaged_graphs(file: Path) -> Iterator[bytes]:
    """Graphs that FAISS writes and reads without complaint, and that would lead a search astray."""

    def changed(name: str, place: int, value: int) -> bytes:
        index = faiss.read_index(str(file))
        array = faiss.vector_to_array(getattr(index.hnsw, name))
        array[place] = value
        faiss.copy_array_to_vector(array, getattr(index.hnsw, name))
        return faiss.serialize_index(index).tobytes()

    for value in (ROWS, 2**31 - 1, -2):
        yield changed("neighbors", 3, value)
    for value in (0, 7, 2**31 - 1, -1):
        yield changed("levels", 5, value)
    for value in (0, 10**9):
        yield changed("offsets", 7, value)
        yield changed("cum_nneighbor_per_level", 1, value)
    for name, value in (("entry_point", ROWS), ("entry_point", -2), ("max_level", 40), ("max_level", -1)):
        index = faiss.read_index(str(file))
        setattr(index.hnsw, name, value)
        yield faiss.serialize_index(index).tobytes()


def damaged_lists(file: Path) -> Iterator[bytes]:
    """Lists that name rows twice, or rows that do not exist; parameters out of range."""
    for value in (-1, -5, ROWS, 2**40, 0):
        index = faiss.read_index(str(file))
        stored = index.invlists
        number = next(number for number in range(index.nlist) if stored.list_size(number) > 1)
        faiss.rev_swig_ptr(stored.get_ids(number), 2)[:] = value
        yield faiss.serialize_index(index).tobytes()
    for value in (0, 2**31):
        index = faiss.read_index(str(file))
        index.nprobe = value
        yield faiss.serialize_index(index).tobytes()


def malformed_files(directory: Path) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(11)
    for kind in INDEXED:
        file = directory / kind / INDEX_FILE
        yield from ((kind, content) for content in damaged_bytes(file.read_bytes(), rng))
        yield from ((kind, content) for content in (damaged_graphs if kind == "hnsw" else damaged_lists)(file))
    vectors = unit_vectors(ROWS)
    for factory in OTHER_KINDS:
        index = faiss.index_factory(DIMENSION, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        yield "ivf_flat", faiss.serialize_index(index).tobytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vectors, dict]:
    directory, vectors = tmp_path_factory.mktemp("built"), unit_vectors(ROWS)
    return directory, vectors, {kind: build(vectors, kind, directory / kind) for kind in INDEXED}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_hundred_malformed_files_are_refused_or_search_well_and_none_ends_the_process(
    built: tuple[Path, Vectors, dict], tmp_path: Path
) -> None:
    directory, vectors, measured = built
    expected = []
    for number, (kind, content) in enumerate(malformed_files(directory)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / INDEX_FILE).write_bytes(content)
        expected.append(ExpectedIndex(folder / INDEX_FILE, kind, ROWS, DIMENSION))
    assert len(expected) >= 200
    reasons = check_files(expected)
    accepted = 0
    for one, reason in zip(expected, reasons, strict=True):
        if reason:
            continue
        accepted += 1
        index = VectorIndex.open(one.file.parent, vectors, measured[one.kind] | {"exhaustive_below": 0})
        for allowed in (None, np.arange(0, ROWS, 4)):
            rows = index.search(vectors[:20], 5, allowed)[1]
            assert (rows >= 0).all() and (rows < ROWS).all()
            assert allowed is None or np.isin(rows, allowed).all()
    print(
        f"{len(expected)} files, {accepted} accepted, {sum('ends the process' in reason for reason in reasons)} crashes"
    )
    assert accepted < len(expected) / 2, "the damage was to parts that a search does not follow"


@pytest.mark.parametrize("kind", INDEXED)
def test_read_guarded_good_file_is_checked_once_per_content(
    kind: str, built: tuple[Path, Vectors, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = built[0] / kind / INDEX_FILE
    assert read_guarded(file, kind, ROWS, DIMENSION).ntotal == ROWS
    assert len(list((cache_directory() / "faiss").iterdir())) >= 1
    monkeypatch.setattr(faiss_guard, "check_files", lambda _: pytest.fail("checked twice"))
    read_guarded(file, kind, ROWS, DIMENSION)


def test_read_guarded_refused_file_is_named_and_not_remembered(
    built: tuple[Path, Vectors, dict], tmp_path: Path
) -> None:
    file = tmp_path / INDEX_FILE
    file.write_bytes(list(damaged_lists(built[0] / "ivf_flat" / INDEX_FILE))[4])
    for _ in range(2):
        with pytest.raises(
            ArtifactError, match=r"index\.faiss is not .*\(its lists do not hold each row once\): rebuild the index"
        ):
            read_guarded(file, "ivf_flat", ROWS, DIMENSION)


def test_read_guarded_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"index\.faiss is missing: rebuild the index"):
        read_guarded(tmp_path / INDEX_FILE, "hnsw", 3, 4)


@pytest.mark.parametrize(("kind", "rows", "dimension"), [("ivf_pq", ROWS, 16), ("hnsw", 299, 16), ("hnsw", ROWS, 8)])
def test_read_limited_other_kind_or_shape_is_refused(
    kind: str, rows: int, dimension: int, built: tuple[Path, Vectors, dict]
) -> None:
    with pytest.raises(ArtifactError, match=r"is an IndexHNSWFlat of 300 vectors of 16 dimensions, index\.json says"):
        read_limited(ExpectedIndex(built[0] / "hnsw" / INDEX_FILE, kind, rows, dimension))


def test_check_files_child_that_dies_or_hangs_costs_its_file_only(
    built: tuple[Path, Vectors, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [ExpectedIndex(built[0] / kind / INDEX_FILE, kind, ROWS, DIMENSION) for kind in INDEXED]
    (tmp_path / "sitecustomize.py").write_text(
        "import faiss, os, time\n"
        "read = faiss.read_index\n"
        "def deadly(name, *rest):\n"
        "    os.abort() if 'ivf_flat' in name else None\n"
        "    time.sleep(600) if 'ivf_pq' in name else None\n"
        "    return read(name, *rest)\n"
        "faiss.read_index = deadly\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(faiss_guard, "BASE_TIMEOUT_S", 12.0)
    reasons = check_files(good)
    assert reasons[0] == ""
    assert reasons[1] == "reading it ends the process with status -6"
    assert reasons[2] == "reading it takes too long"


@pytest.mark.parametrize("kind", INDEXED)
def test_index_with_one_flipped_bit_does_not_load(kind: str, built: tuple[Path, Vectors, dict], tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    content = (built[0] / kind / INDEX_FILE).read_bytes()
    with store.attempt(plan().ref) as attempt:
        (attempt.directory / INDEX_FILE).write_bytes(content)
        published = attempt.publish(plan())
    file = published.path(INDEX_FILE)
    rng = np.random.default_rng(3)
    for place in rng.choice(len(content) * 8, 70, replace=False):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << int(place % 8)
        file.write_bytes(bytes(flipped))
        with pytest.raises(ArtifactError, match=r"index\.faiss: damaged"):
            store.open_ref(published.ref).directory()
    file.write_bytes(content)
    assert store.open_ref(published.ref).path(INDEX_FILE).read_bytes() == content
