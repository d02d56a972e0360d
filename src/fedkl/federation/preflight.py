"""Everything that can be known to go wrong before a run writes its first byte."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fedkl.data import DataBundle
from fedkl.errors import ConfigError
from fedkl.federation.config import RunConfig
from fedkl.federation.engine import sample
from fedkl.federation.folder import check_folder
from fedkl.federation.remains import check_resumable
from fedkl.federation.session import Session, check_device, load_data
from fedkl.federation.store import check_one, open_key
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
        check_dropouts(config, len(session.parts))
        if not resume:  # a run that goes on has spent a part, which only its clients know
            session.check_budget()
        if session.store.keyed:
            _check_keys(session, folder)
    return data


def check_dropouts(config: RunConfig, clients: int) -> None:
    """Raises if in some round too few of the clients will answer.

    Who drops out follows from the seed, and a run that stops there could not go on: resuming takes
    the same settings.

    Raises:
        ConfigError: Names the first such round.
    """
    federation = config.federation
    if not federation.dropout:
        return
    for number in range(1, federation.rounds + 1):
        answering, dropped = sample(config, clients, number)
        if len(answering) < federation.min_clients:
            raise ConfigError(
                f"with dropout {federation.dropout:g} and seed {config.seed} {len(dropped)} of "
                f"{len(answering) + len(dropped)} clients that are asked drop out of round "
                f"{number}, and fewer than min_clients ({federation.min_clients}) answer. Lower "
                "dropout, ask more clients a round or for fewer rounds, or take another seed."
            )


def _check_keys(session: Session, folder: Path) -> None:
    shared = session.initial()
    paths = sorted((folder / "keys").glob("client-*.key"))
    if session.store.one:
        check_one(folder / "keys")
        paths = [path for path in [folder / "keys" / "group.key"] if path.exists()]
    for path in paths:
        key = open_key(path)
        if key.kind == "vector":  # only an imported key can be of the wrong length
            session.workspace.enter(shared, key, None)
