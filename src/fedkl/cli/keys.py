"""``fedkl keygen``, and where passphrases come from (never from an argument)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkl.cli.folders import named
from fedkl.errors import ConfigError, KeyFileError

if TYPE_CHECKING:
    from fedkl.key import Key

VARIABLE = "FEDKL_PASSPHRASE"

AskPassphrase = Annotated[
    bool, typer.Option("--passphrase", help="Ask for a passphrase on the terminal.")
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"File whose first line is the passphrase; else ${VARIABLE} if it is set."),
]


def passphrase_from(ask: bool, file: Path | None, *, confirm: bool = False) -> str | None:
    """A passphrase asked for on the terminal, or a file's first line; None if neither is wanted.

    Raises:
        ConfigError: Both are wanted, or there is no terminal to ask on.
        KeyFileError: The file cannot be read, or its first line is empty.
    """
    if ask and file is not None:
        raise ConfigError("give --passphrase or --passphrase-file, not both.")
    if file is not None:
        return _first_line(file)
    if not ask:
        return None
    if not sys.stdin.isatty():
        raise ConfigError(
            "--passphrase asks on a terminal and there is none; "
            f"use --passphrase-file or the variable {VARIABLE}."
        )
    answer: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


def _first_line(file: Path) -> str:
    try:
        line, _, _ = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise KeyFileError(f"passphrase file {file} cannot be read: {reason}.") from None
    line = line.removesuffix("\r")
    if not line:
        raise KeyFileError(f"the first line of {file} is empty; write the passphrase there.")
    return line


def keygen(
    path: Annotated[
        Path, typer.Argument(parser=named, help="Key file to write (mode 0600); must not exist.")
    ],
    passphrase: AskPassphrase = False,
    passphrase_file: PassphraseFile = None,
    from_vector: Annotated[
        Path | None,
        typer.Option(
            "--from-vector",
            help="Import a one-dimensional .npy vector as the key, as the paper's code has it.",
        ),
    ] = None,
) -> None:
    """Make a client's private key and print its fingerprint, which is no secret.

    The key is 32 bytes from the operating system. With a passphrase the file is encrypted
    (scrypt and AES-GCM). A run uses an unencrypted key that lies in its folder as
    keys/client-00000.key, and makes those that are missing.

    Examples:

      fedkl keygen alice.key

      fedkl keygen alice.key --passphrase

      FEDKL_PASSPHRASE=... fedkl keygen alice.key
    """
    if os.path.lexists(path):
        raise KeyFileError(
            f"{path} exists already, and a key that is overwritten is lost; choose another path, "
            "or move that file away first."
        )
    secret = passphrase_from(passphrase, passphrase_file, confirm=True)
    if secret is None:
        secret = os.environ.get(VARIABLE)
    from fedkl.key import Key

    key = Key.generate() if from_vector is None else _imported(Key, from_vector)
    key.save(path, passphrase=secret)
    print(key.fingerprint)


def _imported(kind: type[Key], file: Path) -> Key:
    import numpy as np

    try:
        values: Any = np.load(file, allow_pickle=False)
    except OSError as error:
        reason = error.strerror or "not a .npy file"
        raise ConfigError(f"--from-vector: {file} cannot be read: {reason}.") from None
    except (ValueError, EOFError):
        raise ConfigError(
            f"--from-vector: {file} is not a .npy file of numbers; write it with numpy.save."
        ) from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise ConfigError(f"--from-vector: {file} holds no plain array of real numbers.")
    import torch

    return kind.from_vector(torch.from_numpy(values.astype(np.float64)))
