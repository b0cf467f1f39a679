import dataclasses
import math
from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ArtifactError
from cluster.manifest import (
    ArtifactRef,
    FileEntry,
    Manifest,
    digest_parts,
    fingerprint,
    parse_manifest,
    render_manifest,
)
from cluster.stage import Plan

REF = ArtifactRef("index", "x", "0123456789abcdef")
texts = st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
configs = st.dictionaries(texts, values, max_size=4)


def manifest(**fields) -> Manifest:
    base = {
        **{"format": 1, "kind": "index", "name": "x", "version": REF.version, "attempt": "0123456789ab", "seed": 1},
        **{"created_at": "2026-01-01T00:00:00+00:00", "parents": {}, "config": {}, "inputs": {}, "packages": {}},
        **{"counts": {}, "measured": {}, "files": [{"path": "a", "size": 0, "sha256": ["0" * 64]}]},
    }
    return Manifest.model_validate({**base, **fields})


@given(configs, configs)
def test_a_manifest_survives_its_own_bytes(config, measured):
    written = manifest(config=config, measured=measured)
    assert parse_manifest(render_manifest(written), REF, "m") == written


def test_every_flipped_bit_of_a_manifest_is_refused():
    data = render_manifest(manifest(config={"text": "ä\ud800", "n": 0.1}))
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            parse_manifest(bytes(flipped), REF, "m")
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(ArtifactError):
            parse_manifest(data[:cut], REF, "m")


def test_a_manifest_of_another_artifact_or_a_newer_format_is_refused():
    data = render_manifest(manifest())
    with pytest.raises(ArtifactError, match=r"index/x/0123456789abcdef found where index/y/0123456789abcdef"):
        parse_manifest(data, dataclasses.replace(REF, name="y"), "m")
    with pytest.raises(ArtifactError, match="manifest format 99, this rayft reads 1"):
        parse_manifest(render_manifest(manifest(manifest_format=99)), REF, "m")


@pytest.mark.parametrize(
    "path", ["../a", "/a", "a/../../b", "a/..", "", ".", "./a", "a//b", "a/", "..\\a", "a\0b", "a/./b", "\\\\host\\a"]
)
def test_a_file_name_that_leaves_the_artifact_is_refused(path):
    with pytest.raises(pydantic.ValidationError):
        FileEntry(path=path, size=0, sha256=("0" * 64,))
    # A manifest with a valid digest is no reason to trust its names.
    forged = manifest().model_copy(
        update={"files": (FileEntry.model_construct(path=path, size=0, sha256=("0" * 64,)),)}
    )
    with pytest.raises(ArtifactError, match="file name leaves the artifact"):
        parse_manifest(render_manifest(forged), REF, "m")


@pytest.mark.parametrize(
    "fields",
    [
        {"attempt": "../../etc"},
        {"files": [{"path": "a", "size": 0, "sha256": ["0" * 64]}] * 2},
        {"files": [{"path": p, "size": 0, "sha256": ["0" * 64]} for p in ("a", "a/b")]},
        {"files": [{"path": "a", "size": 9, "sha256": ["0" * 64]}], "part_bytes": 4},
        {"files": [{"path": "a", "size": 0, "sha256": ["x"]}]},
        {"surprise": 1},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(fields):
    with pytest.raises(pydantic.ValidationError):
        manifest(**fields)


@pytest.mark.parametrize(
    "text", ["index/x", "index/x/short", "../x/0123456789abcdef", "a/b/c/0123456789abcdef", "A/x/0" * 3]
)
def test_a_reference_that_is_none_is_refused(text):
    with pytest.raises(ArtifactError):
        ArtifactRef.parse(text)


def test_a_reference_survives_its_text():
    assert ArtifactRef.parse(str(REF)) == REF


@given(st.data(), configs)
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(data, config):
    shuffled = dict(data.draw(st.permutations(list(config.items()))))
    assert fingerprint(shuffled) == fingerprint(config)


@given(values, values)
def test_fingerprints_are_equal_only_for_equal_values(one, other):
    # repr tells 1, 1.0 and True apart, which a recipe does too.
    assert (fingerprint(one) == fingerprint(other)) == (canonical(one) == canonical(other))


def canonical(value):
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{canonical(value[k])}" for k in sorted(value)) + "}"
    return "[" + ",".join(map(canonical, value)) + "]" if isinstance(value, list) else repr(value)


def test_tuples_numpy_values_and_paths_are_as_their_plain_values():
    assert fingerprint({"a": (1, np.int64(2)), "b": Path("x"), "c": np.float32(0.5)}) == fingerprint(
        {"c": 0.5, "a": [1, 2], "b": "x"}
    )
    with pytest.raises(TypeError):
        fingerprint({1: 2})
    with pytest.raises(TypeError):
        fingerprint({"a": {1, 2}})


plans = {
    "kind": "samples",
    "name": "y",
    "config": {"a": {"b": 2}},
    "inputs": {"documents": "other"},
    "parents": {"index": ArtifactRef("index", "x", "f" * 16)},
    "format": 2,
    "seed": 5,
}


@pytest.mark.parametrize("field", plans)
def test_a_change_of_any_field_of_a_plan_is_another_version(field):
    base = Plan("index", "x", {"a": {"b": 1}}, {"documents": "d"}, {"index": REF}, 1, 4)
    changed = dataclasses.replace(base, **{field: plans[field]})
    assert changed.ref.version != base.ref.version
    assert dataclasses.replace(changed, **{field: getattr(base, field)}).ref == base.ref


@given(st.binary(max_size=40), st.integers(1, 12))
def test_a_file_is_digested_in_parts(data, part):
    import hashlib
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        parts = digest_parts(Path(file.name), part)
    assert len(parts) == max(1, math.ceil(len(data) / part))
    assert list(parts) == [hashlib.sha256(data[i : i + part]).hexdigest() for i in range(0, max(1, len(data)), part)]
