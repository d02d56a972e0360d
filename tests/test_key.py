"""The key: derivations against a naive RFC implementation, key files, and nothing leaks."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import math
import os
import pickle
import stat
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedkl.errors import ConfigError, KeyFileError, OutputError, SecretError
from fedkl.key import LAWS, Key, KeyStream
from fedkl.key.document import Hidden, _cipher

SECRET = bytes(range(100, 132))
SPELLINGS = [SECRET.hex(), base64.b64encode(SECRET).decode(), repr(SECRET)[2:-1], str(list(SECRET))]
PASSWORD = "correct horse"
VECTOR = [0.125, -3.5, 0.7071, 1e-30]

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def key() -> Key:
    return Key._of("seed", SECRET)


# ---- the RFCs, naively


def hkdf(material: bytes, info: bytes, length: int, salt: bytes = b"") -> bytes:
    prk = hmac.new(salt or bytes(32), material, hashlib.sha256).digest()
    out = block = b""
    counter = 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        out += block
        counter += 1
    return out[:length]


def chacha20(secret: bytes, n: int) -> bytes:
    def rotate(x: int, by: int) -> int:
        return ((x << by) | (x >> (32 - by))) & 0xFFFFFFFF

    def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for x, y, z, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] = rotate(s[z] ^ s[x], by)

    out = b""
    while len(out) < n:
        start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", secret)]
        start += [len(out) // 64, 0, 0, 0]
        s = list(start)
        for _ in range(10):
            for i in range(4):
                quarter(s, i, 4 + i, 8 + i, 12 + i)
            for i in range(4):
                quarter(s, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
        out += struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(s, start, strict=True)))
    return out[:n]


def naive(law: str, stream: bytes, n: int) -> list[float]:
    if law == "sign":
        return [1.0 if stream[i // 8] >> (i % 8) & 1 else -1.0 for i in range(n)]
    if law == "uniform":
        return [(struct.unpack_from("<I", stream, 4 * i)[0] >> 8) / 2**24 for i in range(n)]
    out = []
    for i in range((n + 1) // 2):
        a, b = struct.unpack_from("<2Q", stream, 16 * i)
        radius = math.sqrt(-2 * math.log(((a >> 11) + 1) / 2**53))
        angle = 2 * math.pi * (b >> 11) / 2**53
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out[:n]


def stream_info(layer: str, epoch: int) -> bytes:
    name = layer.encode()
    return b"fedkl/v1/stream" + struct.pack(">Q", len(name)) + name + struct.pack(">Q", epoch)


def test_the_naive_implementation_knows_the_vectors_of_the_rfcs() -> None:
    okm = hkdf(b"\x0b" * 22, bytes(range(0xF0, 0xFA)), 42, salt=bytes(range(13)))  # RFC 5869 A.1
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert chacha20(bytes(32), 64).hex() == (  # RFC 8439 A.1, vector 1
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


def test_known_answers_of_a_seed() -> None:
    assert key().fingerprint == hkdf(SECRET, b"fedkl/v1/fingerprint", 8).hex()
    for layer, epoch in (("conv1", 0), ("norm.β", 2**40), ("", 1)):
        expected = chacha20(hkdf(SECRET, stream_info(layer, epoch), 32), 200)
        assert key().stream(layer, epoch).bytes(200) == expected


def test_known_answers_of_an_imported_vector() -> None:
    raw = struct.pack("<4f", *VECTOR)
    material = hashlib.sha256(b"fedkl/v1/imported" + raw).digest()
    imported = Key.from_vector(VECTOR)
    assert imported.fingerprint == hkdf(material, b"fedkl/v1/fingerprint", 8).hex()
    expected = chacha20(hkdf(material, stream_info("conv1", 3), 32), 80)
    assert imported.stream("conv1", 3).bytes(80) == expected


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("length", [1, 2, 9, 101])
def test_known_answers_of_a_vector(law: str, length: int) -> None:
    stream = chacha20(hkdf(SECRET, f"fedkl/v1/vector/{law}".encode(), 32), 16 * length + 16)
    got = key().vector(length, law)
    assert got.dtype == torch.float32
    assert got.shape == (length,)
    exact = 1e-6 if law == "normal" else 0.0  # math.cos and numpy's may differ in the last bit
    torch.testing.assert_close(
        got, torch.tensor(naive(law, stream, length)), rtol=exact, atol=exact
    )


# ---- laws and streams


@pytest.mark.parametrize("seed", range(3))
def test_the_laws_are_the_laws(seed: int) -> None:
    some = Key._of("seed", bytes([seed]) * 32)
    n = 40_000
    signs, uniform, normal = (some.vector(n, law).numpy() for law in ("sign", "uniform", "normal"))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / math.sqrt(n)
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0
    assert abs(normal.var() - 1) < 4 * math.sqrt(2 / n)
    # p below 1e-4 for one of these fixed keys would be a bug, not bad luck.
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert stats.kstest(normal, "norm").pvalue > 1e-4
    for values in (signs, uniform, normal):
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(n)


def test_extreme_bits_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    for octet in (b"\x00", b"\xff"):
        monkeypatch.setattr(KeyStream, "bytes", lambda self, n, octet=octet: octet * n)
        stream = KeyStream(bytes(32))
        assert 0 <= stream.uniform((4,)).min() <= stream.uniform((4,)).max() < 1
        assert torch.isfinite(stream.normal((4,))).all()


@given(length=st.integers(1, 300), more=st.integers(0, 50), law=st.sampled_from(sorted(LAWS)))
def test_a_shorter_vector_begins_a_longer_one(length: int, more: int, law: str) -> None:
    assert torch.equal(key().vector(length, law), key().vector(length + more, law)[:length])


@given(cuts=st.lists(st.integers(0, 150), max_size=5))
def test_calls_continue_the_stream(cuts: list[int]) -> None:
    stream = key().stream("a")
    assert b"".join(stream.bytes(n) for n in cuts) == key().stream("a").bytes(sum(cuts))
    stream, whole = key().stream("a"), key().stream("a").bytes(10_000)
    stream.uniform((3, 5)), stream.signs((2, 5)), stream.normal((3,))
    used = 4 * 15 + 2 + 32
    assert stream.bytes(40) == whole[used : used + 40]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5), torch.Size([4, 1])])
@pytest.mark.parametrize("draw", [KeyStream.uniform, KeyStream.signs, KeyStream.normal])
def test_shapes(draw: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> None:
    got = draw(key().stream("a"), shape)
    assert got.shape == tuple(shape)
    assert got.dtype == torch.float32
    got += 1  # writable


def test_layers_epochs_and_keys_are_independent() -> None:
    other = Key._of("seed", bytes(32))
    imported = Key.from_vector(torch.frombuffer(bytearray(SECRET), dtype=torch.float32))
    labels = [(layer, epoch) for layer in ("a", "ab", "b", "", "a0") for epoch in (0, 1, 2**32)]
    bits = [k.stream(*label).signs((4096,)) for k in (key(), other, imported) for label in labels]
    table = torch.stack([*bits, key().vector(4096), other.vector(4096)])
    correlation = table @ table.T / 4096 - torch.eye(len(table))
    assert correlation.abs().max() < 6 / math.sqrt(4096)


@given(
    a=st.tuples(st.text(max_size=6), st.integers(0, 2**64 - 1)),
    b=st.tuples(st.text(max_size=6), st.integers(0, 2**64 - 1)),
)
def test_two_labels_give_one_stream_only_if_they_are_the_same(
    a: tuple[str, int], b: tuple[str, int]
) -> None:
    assert (key().stream(*a).bytes(16) == key().stream(*b).bytes(16)) == (a == b)


def test_the_same_in_another_process(tmp_path: Path) -> None:
    key().save(tmp_path / "key")
    code = """if True:
        import hashlib, sys
        from fedkl.key import LAWS, Key
        k = Key.load(sys.argv[1])
        d = hashlib.sha256(k.stream("conv1", 7).bytes(1000))
        for law in sorted(LAWS):
            d.update(k.vector(1001, law).numpy().tobytes())
        sys.stdout.write(k.fingerprint + d.hexdigest())
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "17"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "key")],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    digest = hashlib.sha256(key().stream("conv1", 7).bytes(1000))
    for law in sorted(LAWS):
        digest.update(key().vector(1001, law).numpy().tobytes())
    assert done.stdout == key().fingerprint + digest.hexdigest()


# ---- generated and imported keys


def test_generated_keys_differ_and_have_32_bytes() -> None:
    keys = [Key.generate() for _ in range(20)]
    assert len({k._secret for k in keys}) == len({k.fingerprint for k in keys}) == 20
    assert {len(k._secret) for k in keys} == {32}
    assert {k.kind for k in keys} == {"seed"}


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_an_imported_vector_is_kept_whatever_the_law(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    for source in (values, tensor, tensor.double(), tensor.clone().requires_grad_()):
        imported = Key.from_vector(source)
        assert imported.kind == "vector"
        for law in ("sign", "uniform", "the paper's"):
            assert torch.equal(imported.vector(len(values), law), tensor)


def test_a_low_default_dtype_costs_no_digits() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        imported = Key.from_vector(VECTOR)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(imported.vector(4), torch.tensor(VECTOR))


def test_an_imported_vector_is_a_copy_on_both_sides() -> None:
    source = torch.ones(4)
    imported = Key.from_vector(source)
    source += 1
    imported.vector(4).add_(1)
    assert torch.equal(imported.vector(4), torch.ones(4))


@pytest.mark.parametrize(
    "act, text",
    [
        (lambda: Key.from_vector([]), "(0,)"),
        (lambda: Key.from_vector([[1.0, 2.0]]), "(1, 2)"),  # type: ignore[list-item]
        (lambda: Key.from_vector(torch.tensor(1.0)), "()"),
        (lambda: Key.from_vector([1.0, math.nan]), "NaN"),
        (lambda: Key.from_vector([1.0, math.inf]), "NaN or values beyond float32"),
        (lambda: Key.from_vector([1e300]), "beyond float32"),
        (lambda: Key.from_vector([10**400]), "list"),
        (lambda: Key.from_vector([PASSWORD]), "list"),  # type: ignore[list-item]
        (lambda: Key.from_vector(None), "NoneType"),  # type: ignore[arg-type]
        (lambda: Key.from_vector(torch.ones(3, dtype=torch.complex64)), "Tensor"),
        (lambda: Key.from_vector(torch.ones(2**20 + 1)), "1048577"),
        (lambda: Key.from_vector(VECTOR).vector(5), "has 4 entries, but 5 are asked for"),
        (lambda: key().vector(0), "at least 1, got 0"),
        (lambda: key().vector(8, "signs"), "Did you mean 'sign'?"),
        (lambda: key().stream("a", -1), "got -1"),
        (lambda: key().stream("a", 2**64), "[0, 2**64)"),
        (lambda: key().stream("a").bytes(-1), "-1 bytes"),
        (lambda: key().stream("a").uniform((-2,)), "(-2,)"),
        (lambda: key().stream("a").normal((10**9, 10**9)), "268435456 values at most"),
        (lambda: key().stream("a").signs((1.5,)), "(1.5,)"),  # type: ignore[arg-type]
        (lambda: key().stream("a").bytes(2**40), "from 0 to"),
        (lambda: key().stream(3), "got int and int"),  # type: ignore[arg-type]
        (lambda: key().stream("a", 1.5), "got str and float"),  # type: ignore[arg-type]
        (lambda: key().vector("8"), "integer, got str"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(act: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        act()
    assert text in str(caught.value)
    assert PASSWORD not in everything(caught.value)


# ---- key files


@one_folder
@given(secret=st.binary(min_size=32, max_size=32))
def test_seed_round_trip(tmp_path: Path, secret: bytes) -> None:
    one = Key._of("seed", secret)
    one.save(tmp_path / "key", overwrite=True)
    assert Key.load(str(tmp_path / "key")) == one


@settings(one_folder, max_examples=5)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    passphrase=st.text(min_size=1),
)
def test_encrypted_vector_round_trip(tmp_path: Path, values: list[float], passphrase: str) -> None:
    one = Key.from_vector(values)
    one.save(tmp_path / "key", passphrase=passphrase, overwrite=True)
    got = Key.load(tmp_path / "key", passphrase=passphrase)
    assert got == one
    assert got.kind == "vector"
    assert torch.equal(got.vector(len(values)), one.vector(len(values)))


def test_a_composed_and_a_decomposed_passphrase_are_the_same(tmp_path: Path) -> None:
    key().save(tmp_path / "key", passphrase="Schlüssel")
    assert Key.load(tmp_path / "key", passphrase="Schlu\u0308ssel") == key()


@posix
@pytest.mark.parametrize("passphrase", [None, "hunter2"])
def test_the_file(tmp_path: Path, passphrase: str | None) -> None:
    before = os.umask(0)
    try:
        key().save(tmp_path / "key", passphrase=passphrase)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["key"]
    document = json.loads((tmp_path / "key").read_text())
    secret = base64.b64decode(document.pop("secret"))
    encryption = document.pop("encryption")
    assert document == {
        "format": "fedkl-key",
        "version": 1,
        "kind": "seed",
        "fingerprint": key().fingerprint,
    }
    if passphrase is None:
        assert encryption is None
        assert secret == SECRET
    else:
        assert {name: encryption[name] for name in ("n", "r", "p")} == {"n": 2**15, "r": 8, "p": 1}
        assert len(secret) == 32 + 16  # and the tag
        assert SECRET not in secret
        assert not any(text in (tmp_path / "key").read_text() for text in SPELLINGS)


def test_two_encryptions_share_neither_salt_nor_nonce(tmp_path: Path) -> None:
    headers = []
    for name in ("a", "b"):
        key().save(tmp_path / name, passphrase="x")
        headers.append(json.loads((tmp_path / name).read_text())["encryption"])
    assert headers[0]["salt"] != headers[1]["salt"]
    assert headers[0]["nonce"] != headers[1]["nonce"]


def test_a_key_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key().save(path)
    with pytest.raises(KeyFileError, match=r"exists already.*overwrite=True"):
        Key.generate().save(path)
    assert Key.load(path) == key()
    other = Key.generate()
    other.save(path, overwrite=True)
    assert Key.load(path) == other


def test_saving_where_one_cannot(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Create the folder first"):
        key().save(tmp_path / "no" / "key")
    with pytest.raises(KeyFileError, match="passphrase is empty"):
        key().save(tmp_path / "key", passphrase="")
    assert not (tmp_path / "key").exists()


Edit = Callable[[dict[str, Any]], object]


def header(**changes: object) -> Edit:
    return lambda document: document["encryption"].update(changes)


def top(**changes: object) -> Edit:
    return lambda document: document.update(changes)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PLAIN: list[tuple[str, Edit, str]] = [
    ("format", top(format="ssh-key"), "not a whole FedKL key file"),
    ("future", top(version=2), "version 2, expected 1. Upgrade"),
    ("true", top(version=True), "version True"),
    ("kind", top(kind="rsa"), "unknown kind"),
    ("wrong kind", top(kind="vector"), "fingerprint"),
    ("missing", lambda d: d.pop("kind"), "not the fields"),
    ("extra", top(note=1), "not the fields"),
    ("short", top(secret=b64(SECRET[:31])), "31 bytes that is no seed"),
    ("long", top(secret=b64(SECRET + b"\0")), "33 bytes that is no seed"),
    ("ragged vector", top(kind="vector", secret=b64(b"12345")), "5 bytes that is no vector"),
    ("empty vector", top(kind="vector", secret=""), "0 bytes that is no vector"),
    ("nan vector", top(kind="vector", secret=b64(struct.pack("<f", math.nan))), "no vector"),
    ("no base64", top(secret="?"), "secret that is not base64"),
    ("sloppy base64", lambda d: d.update(secret=d["secret"] + "\n"), "not base64"),
    ("number", top(secret=17), "not base64"),
    ("null", top(secret=None), "not base64"),
    ("another secret", top(secret=b64(bytes(32))), "fingerprint that is not"),
    ("another fingerprint", top(fingerprint="0" * 16), "fingerprint that is not"),
    ("encryption", top(encryption=True), "encryption header"),
]

ENCRYPTED: list[tuple[str, Edit, str]] = [
    ("cipher", header(cipher="ROT13"), "unknown cipher"),
    ("kdf", header(kdf="md5"), "unknown cipher"),
    ("huge n", header(n=2**40), "scrypt n"),
    ("odd n", header(n=2**15 + 1), "scrypt n"),
    ("n = 1", header(n=1), "scrypt n"),
    ("huge r", header(r=2**20), "scrypt r"),
    ("huge p", header(p=2**20), "scrypt p"),
    ("p = 0", header(p=0), "scrypt p"),
    ("p = true", header(p=True), "scrypt p"),
    ("text n", header(n="32768"), "scrypt n"),
    ("short salt", header(salt=b64(b"x")), "salt of the wrong length"),
    ("short nonce", header(nonce=b64(b"x")), "wrong length"),
    ("salt", header(salt=b64(bytes(16))), "does not open"),
    ("nonce", header(nonce=b64(bytes(12))), "does not open"),
    ("other n", header(n=2**14), "does not open"),
    ("extra", header(pepper=1), "not the fields"),
    ("dropped", top(encryption=None), "is not encrypted"),
    ("kind", top(kind="vector"), "does not open"),
    ("fingerprint", top(fingerprint="0" * 16), "does not open"),
    ("secret", top(secret=b64(bytes(48))), "does not open"),
    ("no secret", top(secret=""), "does not open"),
]

CASES = [
    *((f"plain: {name}", None, edit, text) for name, edit, text in PLAIN),
    *((f"encrypted: {name}", "hunter2", edit, text) for name, edit, text in ENCRYPTED),
]


@pytest.mark.parametrize(
    "passphrase, edit, text", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_an_edited_file_does_not_load(
    tmp_path: Path, encrypted: str, passphrase: str | None, edit: Edit, text: str
) -> None:
    path = tmp_path / "key"
    if passphrase is None:
        key().save(path)
    else:
        path.write_text(encrypted)
        path.chmod(0o600)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError) as caught:
        Key.load(path, passphrase=passphrase)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)
    assert not any(spelling in everything(caught.value) for spelling in SPELLINGS)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("encrypted") / "key"
    key().save(path, passphrase="hunter2")
    return path.read_text()


def replace(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    "change, passphrase, text",
    [
        (lambda path: path.unlink(), None, "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), None, "Is a directory"),
        (replace(b""), None, "not a whole FedKL key file"),
        (replace(b"\x89PNG\r\n"), None, "not a whole FedKL key file"),
        (replace(b"[1]"), None, "not a whole FedKL key file"),
        (replace(b"[" * 200_000), None, "not a whole FedKL key file"),
        (replace(b" " * (8 * 2**20 + 1)), None, "not a whole FedKL key file"),
        (lambda path: path.chmod(0o644), None, "has mode 0644"),
        (lambda path: path.chmod(0o620), None, "chmod 600"),
        (lambda path: path.chmod(0o601), None, "chmod 600"),
        (lambda path: None, "hunter2", "is not encrypted, but a passphrase was given"),
    ],
)
@posix
def test_a_file_that_is_no_key_does_not_load(
    tmp_path: Path, change: Callable[[Path], object], passphrase: str | None, text: str
) -> None:
    key().save(tmp_path / "key")
    change(tmp_path / "key")
    with pytest.raises(KeyFileError) as caught:
        Key.load(tmp_path / "key", passphrase=passphrase)
    assert text in str(caught.value)
    assert str(tmp_path / "key") in str(caught.value)
    assert not any(spelling in everything(caught.value) for spelling in SPELLINGS)


@pytest.mark.parametrize(
    "passphrase, text",
    [
        (None, "is encrypted. Give its passphrase"),
        ("Hunter2", "passphrase is wrong"),
        ("", "empty"),
    ],
)
def test_a_wrong_passphrase(
    tmp_path: Path, encrypted: str, passphrase: str | None, text: str
) -> None:
    path = tmp_path / "key"
    path.write_text(encrypted)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=text) as caught:
        Key.load(path, passphrase=passphrase)
    assert "Hunter2" not in everything(caught.value)
    assert Key.load(path, passphrase="hunter2") == key()


def test_no_truncated_file_loads_and_no_error_shows_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key().save(path)
    data = path.read_bytes()
    for size in range(len(data) - 2):  # without the last newline and bracket
        path.write_bytes(data[:size])
        with pytest.raises(KeyFileError) as caught:
            Key.load(path)
        assert SPELLINGS[1][:20] not in everything(caught.value)


# ---- nothing leaks


def frames(error: BaseException) -> str:
    """What a crash reporter tells of an error: its chain, with the variables of every frame.

    Of the frames of the library, that is; what a caller holds is the caller's.
    """
    parts, chain = [], [error]
    for link in chain:
        chain += [e for e in (link.__cause__, link.__context__) if e is not None]
        told = traceback.TracebackException.from_exception(link, capture_locals=True)
        parts += [str(told), *(str(f.locals) for f in told.stack if "tests" not in f.filename)]
    return "\n".join(parts)


def saved(folder: Path, **edit: Any) -> Path:
    path = folder / "saved"
    key().save(path, overwrite=True, passphrase=edit.pop("passphrase", None))
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    return path


def no_memory(*_: object, **__: object) -> None:
    raise MemoryError


NUMBER = 0.70703125  # in a repr of float32 too
FAILURES: dict[str, Callable[[Path], object]] = {
    "missing folder": lambda p: key().save(p / "no" / "key", passphrase=PASSWORD),
    "missing folder, open": lambda p: key().save(p / "no" / "key"),
    "existing": lambda p: key().save(saved(p), passphrase=PASSWORD),
    "existing, open": lambda p: key().save(saved(p)),
    "empty passphrase": lambda p: key().save(p / "key", passphrase=""),
    "bytes passphrase": lambda p: key().save(
        p / "key",
        passphrase=PASSWORD.encode(),  # type: ignore[arg-type]
    ),
    "bytes passphrase, load": lambda p: Key.load(
        saved(p, passphrase=PASSWORD),
        passphrase=PASSWORD.encode(),  # type: ignore[arg-type]
    ),
    "NUL in a path, save": lambda p: key().save("a\0b"),
    "NUL in a path, load": lambda p: Key.load("a\0b", passphrase=PASSWORD),
    "no path": lambda p: key().save(3),  # type: ignore[arg-type]
    "no path, load": lambda p: Key.load(None),  # type: ignore[arg-type]
    "fingerprint": lambda p: Key.load(saved(p, fingerprint="0" * 16)),
    "kind": lambda p: Key.load(saved(p, kind="scroll")),
    "vector": lambda p: Key.load(saved(p, secret=base64.b64encode(SECRET + b"abc").decode())),
    "base64": lambda p: Key.load(saved(p, secret=SPELLINGS[1] + "!")),
    "version": lambda p: Key.load(saved(p, version=2)),
    "not encrypted": lambda p: Key.load(saved(p), passphrase=PASSWORD),
    "wrong passphrase": lambda p: Key.load(
        saved(p, passphrase=PASSWORD), passphrase=PASSWORD + "!"
    ),
    "no passphrase": lambda p: Key.load(saved(p, passphrase=PASSWORD)),
    "cipher": lambda p: Key.load(saved(p, encryption={"cipher": "rot13"}), passphrase=PASSWORD),
    "length of a vector": lambda p: Key.from_vector([NUMBER, 1.0]).vector(3),
    "no vector": lambda p: Key.from_vector([[NUMBER]]),  # type: ignore[list-item]
    "NaN in a vector": lambda p: Key.from_vector(torch.tensor([NUMBER, math.nan])),
    "text in a vector": lambda p: Key.from_vector([NUMBER, PASSWORD]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("how", FAILURES)
def test_no_frame_of_an_error_holds_a_secret(tmp_path: Path, how: str) -> None:
    with pytest.raises((KeyFileError, OutputError, ConfigError)) as caught:
        FAILURES[how](tmp_path)
    told = frames(caught.value)
    shown = [s for s in (*SPELLINGS, PASSWORD, "0.7070") if s[:16] in told]
    assert shown == []


def test_running_out_of_memory_shows_no_secret_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, passphrase=PASSWORD)
    monkeypatch.setattr("fedkl.key.document.Scrypt", no_memory)
    for act in (
        lambda: key().save(tmp_path / "key", passphrase=PASSWORD),
        lambda: Key.load(path, passphrase=PASSWORD),
    ):
        with pytest.raises(KeyFileError, match="MemoryError") as caught:
            act()
        assert not any(s[:16] in frames(caught.value) for s in (*SPELLINGS, PASSWORD))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_and_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    path = saved(tmp_path, passphrase=PASSWORD)

    def interrupted(*_: object, **__: object) -> None:
        raise kind from ValueError(PASSWORD)

    monkeypatch.setattr("fedkl.key.document.Scrypt", interrupted)
    for act in (
        lambda: key().save(tmp_path / "key", passphrase=PASSWORD),
        lambda: Key.load(path, passphrase=PASSWORD),
    ):
        with pytest.raises(kind) as caught:
            act()
        assert not any(s[:16] in frames(caught.value) for s in (*SPELLINGS, PASSWORD))


def test_the_passphrase_in_bytes_is_in_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedkl.key.document.Scrypt", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        _cipher(Hidden(PASSWORD), bytes(16), 2, 1, 1)
    assert PASSWORD[:16] not in frames(caught.value)


def everything(error: BaseException | None) -> str:
    """All that a logger or crash reporter may take from an exception and its chain."""
    parts = []
    while error is not None:
        parts += traceback.format_exception(error)
        parts += [repr(error.args), repr(vars(error)), repr(getattr(error, "doc", ""))]
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


@pytest.mark.parametrize(
    "show", [repr, str, format, lambda k: f"{k!s:>60}", lambda k: f"{k:>60}", lambda k: f"{[k]}"]
)
def test_text_shows_the_fingerprint_only(show: Callable[[Key], str]) -> None:
    assert show(key()).strip(" []") == f"Key(fingerprint={key().fingerprint})"
    assert key().fingerprint not in SECRET.hex()


def test_a_stream_shows_nothing() -> None:
    assert repr(key().stream("a")) == str(key().stream("a")) == "KeyStream(secret)"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "secret", [Key.from_vector(VECTOR), Key._of("seed", SECRET), KeyStream(bytes(32))]
)
def test_pickling_raises_with_the_remedy(secret: object, protocol: int) -> None:
    with pytest.raises(SecretError, match=r"key\.save\(path\)") as caught:
        pickle.dumps({"deep": [secret]}, protocol)
    assert not any(spelling in everything(caught.value) for spelling in SPELLINGS)
    for method in ("__reduce__", "__getstate__"):
        with pytest.raises(SecretError):
            getattr(secret, method)()


def test_torch_and_json_cannot_save_it_either(tmp_path: Path) -> None:
    with pytest.raises(SecretError):
        torch.save({"key": key()}, tmp_path / "x")
    with pytest.raises(TypeError):
        json.dumps({"key": key()})


def test_copies_are_the_same_object_and_streams_do_not_copy() -> None:
    one = key()
    assert copy.copy(one) is one
    assert copy.deepcopy({"a": [one]})["a"][0] is one
    with pytest.raises(SecretError):
        copy.deepcopy(one.stream("a"))
    with pytest.raises(SecretError):
        copy.copy(one.stream("a"))


@pytest.mark.parametrize("secret", [Key._of("seed", SECRET), KeyStream(bytes(32))])
def test_no_public_attribute_holds_the_secret(secret: object) -> None:
    with pytest.raises(TypeError):
        vars(secret)
    for name in dir(secret):
        if not name.startswith("_"):
            assert not isinstance(getattr(secret, name), bytes | bytearray | torch.Tensor)


def test_a_key_is_not_built_by_hand() -> None:
    with pytest.raises(SecretError, match=r"Key\.generate\(\)"):
        Key()


def test_equality_and_hash() -> None:
    same, other = key(), Key.generate()
    assert key() == same
    assert key() != other
    assert len({key(), same, other}) == 2
    assert key() != SECRET
    vector = Key.from_vector(torch.frombuffer(bytearray(SECRET), dtype=torch.float32))
    assert vector._secret == key()._secret
    assert vector != key()  # the same bytes, another kind
    assert vector.fingerprint != key().fingerprint
