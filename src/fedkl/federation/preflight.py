"""Everything that can be known to go wrong before a run writes its first byte."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fedkl.data import DataBundle
from fedkl.federation.config import RunConfig
from fedkl.federation.folder import check_folder
from fedkl.federation.remains import check_resumable
from fedkl.federation.session import Session, check_device, load_data
from fedkl.federation.store import open_key
from fedkl.files import read_json


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
        check_resumable(read_json(folder / "config.json"), config, folder)
    data = load_data(config) if bundle is None else bundle
    with TemporaryDirectory() as scratch:
        session = Session(config, Path(scratch), data)
        if not resume:  # a run that goes on has spent a part, which only its clients know
            session.check_budget()
        if session.store.keyed:
            _check_keys(session, folder)
    return data


def _check_keys(session: Session, folder: Path) -> None:
    shared = session.initial()
    for path in sorted((folder / "keys").glob("client-*.key")):
        key = open_key(path)
        if key.kind == "vector":  # only an imported key can be of the wrong length
            session.workspace.enter(shared, key, None)
