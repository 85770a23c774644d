"""Keys, and signatures of bundles: what they cover and what they refuse."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pollard.runtime.bundle import MANIFEST, SIGNATURE, Bundle, write_bundle
from pollard.runtime.errors import (
    BundleCorrupt,
    KeyInvalid,
    SignatureInvalid,
    SignatureUntrusted,
)
from pollard.runtime.keys import (
    TrustedKeys,
    create_key_pair,
    is_encrypted,
    private_fingerprint,
    public_fingerprint,
)
from pollard.runtime.signing import listed_files, read_signature, require_signature, sign_bundle


@pytest.fixture
def keys(tmp_path):
    return create_key_pair(tmp_path / "team")


@pytest.fixture
def trusted(keys):
    return TrustedKeys({keys.fingerprint: keys.public})


@pytest.fixture
def signed(make_bundle, keys):
    bundle = make_bundle()
    sign_bundle(bundle.path, keys.private)
    return Bundle.open(bundle.path)


def edit(bundle: Bundle, change) -> None:
    """Change the JSON of a signature."""
    path = bundle.path / SIGNATURE
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_a_private_key_is_for_its_owner_alone_and_never_overwritten(tmp_path):
    before = os.umask(0)
    try:
        pair = create_key_pair(tmp_path / "k")
    finally:
        os.umask(before)
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    content = pair.private.read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        create_key_pair(tmp_path / "k")
    pair.public.unlink()
    with pytest.raises(FileExistsError):
        create_key_pair(tmp_path / "k")
    assert pair.private.read_bytes() == content
    assert not pair.public.exists()


def test_an_orphaned_public_key_is_not_overwritten_either(tmp_path):
    (tmp_path / "k.pub").write_text("someone's")
    with pytest.raises(FileExistsError, match=r"k\.pub"):
        create_key_pair(tmp_path / "k")
    assert not (tmp_path / "k.key").exists()


def test_a_passphrase_protects_the_private_key(tmp_path, make_bundle):
    pair = create_key_pair(tmp_path / "k", b"open sesame")
    assert is_encrypted(pair.private)
    assert private_fingerprint(pair.private, b"open sesame") == pair.fingerprint
    with pytest.raises(KeyInvalid, match="passphrase is wrong"):
        private_fingerprint(pair.private, b"open simsim")
    with pytest.raises(KeyInvalid, match="POLLARD_KEY_PASSPHRASE"):
        private_fingerprint(pair.private)
    bundle = make_bundle()
    sign_bundle(bundle.path, pair.private, b"open sesame")
    found = read_signature(bundle, TrustedKeys({pair.fingerprint: pair.public}))
    assert found is not None
    assert found.trusted


def test_a_passphrase_that_no_key_asks_for_does_no_harm(keys, make_bundle):
    assert sign_bundle(make_bundle().path, keys.private, b"for another key") == keys.fingerprint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no key",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_key_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.pub"
    path.write_bytes(content)
    with pytest.raises(KeyInvalid, match=r"x\.pub"):
        public_fingerprint(path)
    with pytest.raises(KeyInvalid, match=r"x\.pub"):
        private_fingerprint(path)


def test_keys_of_another_kind_are_refused(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for name, key in (
        ("ed", ed25519.Ed25519PrivateKey.generate()),
        ("k1", ec.generate_private_key(ec.SECP256K1())),
    ):
        path = tmp_path / f"{name}.pub"
        path.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        with pytest.raises(KeyInvalid, match=f"{name}.pub"):
            public_fingerprint(path)


def test_trusted_keys_are_the_public_keys_of_a_directory(tmp_path, keys):
    directory = tmp_path / "trusted"
    directory.mkdir()
    with pytest.raises(KeyInvalid, match="holds no public key"):
        TrustedKeys.load(directory)
    with pytest.raises(KeyInvalid, match="cannot be read"):
        TrustedKeys.load(tmp_path / "nowhere")
    shutil.copy(keys.public, directory / "team.pub")
    (directory / "README").write_text("whose these are")
    assert keys.fingerprint in TrustedKeys.load(directory)
    shutil.copy(keys.private, directory / "oops.pem")
    with pytest.raises(KeyInvalid, match=r"oops\.pem is a private key"):
        TrustedKeys.load(directory)


def test_signing_keeps_the_digest_and_is_found_good(signed, trusted, keys):
    unsigned = write_bundle(
        signed.path.with_name("again"),
        signed.manifest,
        {file.path: signed.path / file.path for file in signed.manifest.files},
    )
    assert unsigned.digest == signed.digest
    signed.verify()
    found = read_signature(signed, trusted)
    assert found is not None
    assert (found.fingerprint, found.trusted) == (keys.fingerprint, True)


def test_the_format_s_own_command_checks_a_signed_bundle(signed, keys):
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        str(signed.path),
        "--signature",
        str(signed.path / SIGNATURE),
        "--public_key",
        str(keys.public),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels = signed.path / "labels.txt"
    labels.write_text("other\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "labels.txt" in done.stdout + done.stderr


def test_a_bundle_signed_with_the_format_s_own_command_is_accepted(make_bundle, keys, trusted):
    bundle = make_bundle()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "model_signing",
            "sign",
            "key",
            str(bundle.path),
            "--signature",
            str(bundle.path / SIGNATURE),
            "--private_key",
            str(keys.private),
        ],
        check=True,
        capture_output=True,
    )
    assert require_signature(bundle, trusted).fingerprint == keys.fingerprint


def test_an_unsigned_bundle_has_no_signature_and_fails_where_one_is_required(make_bundle, trusted):
    bundle = make_bundle()
    assert read_signature(bundle, trusted) is None
    with pytest.raises(SignatureUntrusted, match="is not signed"):
        require_signature(bundle, trusted)


def test_a_key_that_nobody_here_knows_is_told_from_a_wrong_signature(signed, keys, tmp_path):
    other = create_key_pair(tmp_path / "other")
    strangers = TrustedKeys({other.fingerprint: other.public})
    for known in (None, strangers):
        found = read_signature(signed, known)
        assert found is not None
        assert (found.fingerprint, found.trusted) == (keys.fingerprint, False)
    with pytest.raises(SignatureUntrusted, match=keys.fingerprint):
        require_signature(signed, strangers)


def test_signing_refuses_a_damaged_bundle(make_bundle, keys):
    bundle = make_bundle()
    (bundle.path / "labels.txt").write_text("other\n")
    with pytest.raises(BundleCorrupt, match=r"labels\.txt"):
        sign_bundle(bundle.path, keys.private)
    assert not (bundle.path / SIGNATURE).exists()


def test_signing_again_replaces_the_signature(signed, tmp_path):
    other = create_key_pair(tmp_path / "other")
    sign_bundle(signed.path, other.private)
    found = read_signature(signed, TrustedKeys({other.fingerprint: other.public}))
    assert found is not None
    assert found.trusted


def test_the_signature_of_another_bundle_names_the_file_that_differs(signed, make_bundle, trusted):
    # All files but one are the same.
    other = make_bundle(files={"labels.txt": b"one\ntwo\nthree\n"})
    shutil.copy(signed.path / SIGNATURE, other.path / SIGNATURE)
    for known in (None, trusted):
        with pytest.raises(SignatureInvalid, match=r"'labels\.txt' is not what was signed"):
            read_signature(other, known)


def test_files_that_were_not_signed_or_are_gone_are_named(signed, make_bundle, trusted):
    more = make_bundle(files={"extra.bin": b"x"})
    shutil.copy(signed.path / SIGNATURE, more.path / SIGNATURE)
    with pytest.raises(SignatureInvalid, match=r"'extra\.bin' is not among the files"):
        read_signature(more, trusted)
    sign = more.path / SIGNATURE
    sign.unlink()


def test_a_forged_list_of_files_is_refused(signed, make_bundle, trusted):
    """The list says what the bundle holds, and the key's mark is of another list."""
    other = make_bundle(files={"labels.txt": b"one\ntwo\nthree\n"})
    shutil.copy(signed.path / SIGNATURE, other.path / SIGNATURE)

    def forge(content):
        envelope = content["dsseEnvelope"]
        payload = json.loads(base64.b64decode(envelope["payload"]))
        for entry in payload["predicate"]["resources"]:
            entry["digest"] = listed_files(other)[entry["name"]]
        envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    edit(other, forge)
    with pytest.raises(SignatureInvalid, match="damaged or forged"):
        read_signature(other, trusted)
    # Nobody here can tell, so nobody here trusts it.
    assert read_signature(other) is not None


def test_every_part_of_a_signature_matters(signed, trusted):
    whole = (signed.path / SIGNATURE).read_bytes()
    mark = json.loads(whole)["dsseEnvelope"]["signatures"][0]["sig"].encode()
    payload = json.loads(whole)["dsseEnvelope"]["payload"].encode()
    for part in (mark, payload):
        position = whole.index(part) + len(part) // 2
        damaged = bytearray(whole)
        damaged[position] = ord("A") if damaged[position] != ord("A") else ord("B")
        (signed.path / SIGNATURE).write_bytes(damaged)
        with pytest.raises(SignatureInvalid):
            read_signature(signed, trusted)
    (signed.path / SIGNATURE).write_bytes(whole)
    assert read_signature(signed, trusted) is not None


def nothing_inside(content):
    content["dsseEnvelope"]["payload"] = base64.b64encode(b"[]").decode()


def no_marks(content):
    content["dsseEnvelope"]["signatures"] = []


@pytest.mark.parametrize(
    "change",
    [
        nothing_inside,
        no_marks,
        lambda content: content.clear(),
        lambda content: content.update(mediaType="text/plain"),
        lambda content: content.update(verificationMaterial={}),
        lambda content: content["verificationMaterial"]["publicKey"].update(hint=None),
        lambda content: content["dsseEnvelope"].update(payload="§§§"),
        lambda content: content["dsseEnvelope"].update(payload=7),
    ],
)
def test_a_malformed_signature_is_refused_whoever_looks(signed, trusted, change):
    edit(signed, change)
    with pytest.raises(SignatureInvalid, match=SIGNATURE):
        read_signature(signed, trusted)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 200_000, b"null", b"\xff\xfe", b"1" * 10_000]
)
def test_what_is_no_signature_at_all_is_refused(signed, trusted, content):
    (signed.path / SIGNATURE).write_bytes(content)
    with pytest.raises(SignatureInvalid, match=SIGNATURE):
        read_signature(signed, trusted)


def test_a_huge_signature_is_refused_before_parsing(signed, trusted):
    with (signed.path / SIGNATURE).open("wb") as file:
        file.truncate(9 << 20)
    with pytest.raises(SignatureInvalid, match="longer than"):
        read_signature(signed, trusted)


def test_a_link_is_no_signature(signed, trusted, tmp_path):
    moved = tmp_path / "elsewhere"
    (signed.path / SIGNATURE).rename(moved)
    (signed.path / SIGNATURE).symlink_to(moved)
    with pytest.raises(SignatureInvalid, match="regular file"):
        read_signature(signed, trusted)


def test_checking_without_keys_does_not_load_the_library(signed):
    code = (
        "import sys; from pollard.runtime.bundle import Bundle; "
        "from pollard.runtime.signing import read_signature; "
        f"assert read_signature(Bundle.open({str(signed.path)!r})) is not None; "
        "assert 'model_signing' not in sys.modules and 'cryptography' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_manifest_is_among_the_signed_files(signed):
    content = json.loads((signed.path / SIGNATURE).read_bytes())
    payload = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
    names = {entry["name"] for entry in payload["predicate"]["resources"]}
    assert MANIFEST in names
    assert names == set(listed_files(signed))
    assert SIGNATURE not in names
    assert Path(signed.path / SIGNATURE).is_file()
