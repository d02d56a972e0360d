"""Everything that can be known to go wrong before a run writes its first byte."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fedkl.data import DataBundle
from fedkl.errors import KeyFileError
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.config import RunConfig, config_from
from fedkl.federation.engine import check_same
from fedkl.federation.folder import check_folder
from fedkl.federation.session import Session, check_device, load_data
from fedkl.files import read_json
from fedkl.key import Key


def preflight(
    config: RunConfig, folder: Path, *, resume: bool = False, bundle: DataBundle | None = None
) -> DataBundle:
    """Checks ``config`` against this machine and ``folder``, and loads the data.

    Nothing is written: a run that fails here leaves the folder as it was.

    Args:
        config: The run.
        folder: Its folder, which need not exist.
        resume: Whether the run goes on from what is in ``folder``.
        bundle: Data loaded already.

    Returns:
        The data, to be handed to :func:`fedkl.federation.run`.

    Raises:
        FedKLError: As :func:`fedkl.federation.run` would, or a key in ``keys/`` cannot be used.
    """
    check_device(config.device)
    check_folder(folder, resume=resume)
    if resume:
        path = folder / "config.json"
        check_same(config_from(read_json(path), source=str(path)), config)
        if (folder / "checkpoints").is_dir():
            Checkpoints(folder / "checkpoints").latest()
    data = load_data(config) if bundle is None else bundle
    with TemporaryDirectory() as scratch:
        session = Session(config, Path(scratch), data)
        if session.store.keyed:
            _check_keys(session, folder)
    return data


def check_lost_keys(folder: Path) -> None:
    """Raises when a client has a private state but its key is gone.

    A new key would be made in its place, and with it the lock's weights are worth nothing.

    Raises:
        KeyFileError: Names the first client without a key.
    """
    for state in sorted((folder / "clients").glob("[0-9]*")):
        path = folder / "keys" / f"client-{state.name}.key"
        if any(state.iterdir()) and not path.exists():
            raise KeyFileError(
                f"{path} is missing, but client {int(state.name)} has a lock that was trained "
                "with it. Restore the key from a copy, or start again in another folder."
            )


def _check_keys(session: Session, folder: Path) -> None:
    check_lost_keys(folder)
    shared = session.initial()
    for path in sorted((folder / "keys").glob("client-*.key")):
        key = Key.load(path)
        if key.kind == "vector":  # only an imported key can be of the wrong length
            session.workspace.enter(shared, key, None)
