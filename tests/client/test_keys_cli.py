"""`pollard keys`: what people see when they make keys, sign and check."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pollard.client.cli import _main
from pollard.client.cli.signing import PASSPHRASE_VARIABLE
from pollard.runtime.bundle import Bundle

BundleMaker = Callable[..., Bundle]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = _main.run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_create_sign_verify(run: Any, make_bundle: BundleMaker) -> None:
    bundle = str(make_bundle().path)
    code, out, _ = run("keys", "create", "team")
    assert code == 0
    fingerprint = out.split()[-1]
    assert run("keys", "show", "team.pub")[1].startswith(fingerprint)
    assert run("keys", "show", "team.key")[1].startswith(fingerprint)

    code, _, error = run("keys", "verify", bundle, "--key", "team.pub")
    assert code == 1
    assert "is not signed" in error
    assert run("keys", "sign", bundle, "--key", "team.key")[0] == 0
    code, out, _ = run("keys", "verify", bundle, "--key", "team.pub")
    assert code == 0
    assert fingerprint in out
    code, out, _ = run("keys", "verify", bundle, "--key", "team.pub", "--json")
    assert json.loads(out)["key_sha256"] == fingerprint


def test_verify_names_the_file_that_was_changed(run: Any, make_bundle: BundleMaker) -> None:
    bundle = make_bundle()
    run("keys", "create", "team")
    run("keys", "sign", str(bundle.path), "--key", "team.key")
    (bundle.path / "labels.txt").write_text("other\n")
    code, _, error = run("keys", "verify", str(bundle.path), "--key", "team.pub")
    assert code == 1
    assert "labels.txt" in error


def test_verify_takes_a_directory_of_keys(
    run: Any, make_bundle: BundleMaker, tmp_path: Path
) -> None:
    bundle = str(make_bundle().path)
    for name in ("one", "two"):
        run("keys", "create", name)
    run("keys", "sign", bundle, "--key", "two.key")
    (tmp_path / "trusted").mkdir()
    shutil.copy("one.pub", "trusted")
    code, _, error = run("keys", "verify", bundle, "--key", "trusted")
    assert code == 1
    assert "not among the trusted keys" in error
    shutil.copy("two.pub", "trusted")
    assert run("keys", "verify", bundle, "--key", "trusted")[0] == 0
    assert len(run("keys", "show", "trusted")[1].splitlines()) == 2


def test_a_key_is_not_overwritten(run: Any) -> None:
    run("keys", "create", "team")
    before = Path("team.key").read_bytes()
    code, _, error = run("keys", "create", "team")
    assert code == 1
    assert "never overwritten" in error
    assert Path("team.key").read_bytes() == before


def test_the_passphrase_comes_from_the_environment(
    run: Any, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(make_bundle().path)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "open sesame")
    assert run("keys", "create", "team", "--passphrase")[0] == 0
    assert run("keys", "sign", bundle, "--key", "team.key")[0] == 0
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "something else")
    code, _, error = run("keys", "sign", bundle, "--key", "team.key")
    assert code == 1
    assert "passphrase is wrong" in error
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    code, _, error = run("keys", "sign", bundle, "--key", "team.key")
    assert code == 1
    assert PASSPHRASE_VARIABLE in error


def test_a_key_that_cannot_be_used_is_told_before_anything_is_sent(
    run: Any, make_bundle: BundleMaker
) -> None:
    bundle = str(make_bundle().path)
    for key, words in (("missing.key", "missing.key"), ("wrong.key", "not a private key")):
        Path("wrong.key").write_text("nothing")
        code, _, error = run(
            "models", "push", bundle, "--model", "m", "--sign", key, "--server", "127.0.0.1:1"
        )
        assert code == 1
        assert words in error
        assert "cannot be reached" not in error


def test_without_the_extra_the_words_say_what_to_install(
    run: Any, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "cryptography":
            raise ImportError("No module named 'cryptography'")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, error = run("keys", "create", "team")
    assert code == 1
    assert "pip install 'pollard-runtime[signing]'" in error
    assert not Path("team.key").exists()
