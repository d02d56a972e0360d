"""Private layers on their way to the clients that hold the same key: sealed.

Clients with one key need not keep their private layers apart: each sends them encrypted beside its
update, the server hands them on unread, and every client goes on from their mean. So all train one
and the same network, of which the server has the layers in the middle.

Encrypted with AES-SIV (RFC 5297), bound to client and round: the server can neither read nor alter
them, nor hand on those of another round. It is deterministic, so a round that is asked for again
gives the same bytes and nothing more.

What it can do: leave some of them out, as if clients were absent, and for each client others; and
choose, where a client has answered a round twice (which no pad does), between its answers. Nothing
names the run: of two runs with one key each opens what was sealed in the other.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedkl.errors import FederationError, KeyFileError
from fedkl.federation.aggregate import aggregate
from fedkl.federation.client import Update, without_lock
from fedkl.federation.store import ClientState
from fedkl.key import Key
from fedkl.locking import state_problems

_LAYER: Final = "sealed private layers"  # names the key stream
_KEY_BYTES: Final = 64  # AES-256-SIV takes two keys
_COUNT_BYTES: Final = 8
_TAG_BYTES: Final = 16
_MOST: Final = 2**40  # examples; more of them nobody has


def check_random(key: Key, path: Path) -> None:
    """Raises unless ``key``, of the file ``path``, is a random one, which nobody can guess.

    Raises:
        KeyFileError: It is an imported vector.
    """
    if key.kind == "vector":
        raise KeyFileError(
            f"{path} is an imported vector, and with --seal-private checkpoints and the server "
            "have what is encrypted under it, on which whoever can list the candidates can try "
            "them; put a random key there, made with 'fedkl keygen', or leave --seal-private out."
        )


def seal(
    private: Mapping[str, Tensor], key: Key, *, client: int, round_: int, examples: int
) -> str:
    """Private layers after a round of training, for those who hold ``key``.

    Args:
        private: The client's private state.
        key: That all clients have.
        client: Number of the client.
        round_: The round.
        examples: That it was trained on; its weight in the mean.

    Returns:
        Base64 text of :func:`sealed_length` characters.
    """
    body = examples.to_bytes(_COUNT_BYTES, "big") + _packed(private)
    return base64.b64encode(_cipher(key).encrypt(body, _bound(client, round_))).decode("ascii")


def sealed_length(private: Mapping[str, Tensor]) -> int:
    """Characters of what :func:`seal` returns; they follow from names, shapes and dtypes."""
    size = _TAG_BYTES + _COUNT_BYTES + len(_packed(private))
    return 4 * -(-size // 3)


class Opener:
    """Opens what clients sealed in a round, once for all who go on from it.

    Args:
        like: Names, shapes and dtypes that private layers have.
        weighted: As of :func:`unsealed`.
        keep_learned: Whether what was learned on top of a pad outlives it.
    """

    def __init__(self, like: Mapping[str, Tensor], *, weighted: bool, keep_learned: bool) -> None:
        self._like = like
        self._weighted = weighted
        self._keep_learned = keep_learned
        self._last: tuple[object, dict[str, Tensor]] | None = None

    def going_on(
        self, client: int, own: ClientState, key: Key, *, after: int, sealed: Mapping[str, str]
    ) -> ClientState:
        """What a client has after round ``after``: the mean, and what else is its own.

        Args:
            client: Its number.
            own: Its own state, of that round or of one before.
            key: That all clients have.
            after: The round.
            sealed: What clients sealed in it.

        Raises:
            FederationError: There is nothing, or as of :func:`unsealed`.
        """
        if not sealed:
            raise FederationError(
                f"client {client} got none of the private layers that clients sealed in round "
                f"{after}, without which it would go on alone; the server has lost them, or keeps "
                "them back. Go on from the server's last checkpoint."
            )
        found = dataclasses.replace(own, round=after, private=self._mean(key, after, sealed))
        if found.epoch == own.epoch:
            return found
        # The others renewed the pad while it was away: what it counted was of the one before.
        moments = own.moments if self._keep_learned else without_lock(own.moments)
        return dataclasses.replace(found, spent=0, moments=moments)

    def _mean(self, key: Key, after: int, sealed: Mapping[str, str]) -> dict[str, Tensor]:
        asked = (key, after, dict(sealed))
        if self._last is None or self._last[0] != asked:
            like, weighted = self._like, self._weighted
            self._last = asked, unsealed(sealed, key, round_=after, like=like, weighted=weighted)
        return self._last[1]


def unsealed(
    sealed: Mapping[str, str],
    key: Key,
    *,
    round_: int,
    like: Mapping[str, Tensor],
    weighted: bool = True,
) -> dict[str, Tensor]:
    """The mean of the private layers that clients sealed after round ``round_``.

    Args:
        sealed: Client number (as text) → what it sealed; at least one.
        key: That all clients have.
        round_: The round.
        like: Names, shapes and dtypes that they must have.
        weighted: Weight by number of examples, else equally, as the shared layers are.

    Raises:
        FederationError: Something is not what a client with this key sealed in that round, or is
            of another model.
    """
    texts = sorted((int(client), text) for client, text in sealed.items())
    opened = (_opened(text, key, client, round_, like) for client, text in texts)
    return aggregate(opened, weighted=weighted)


def _opened(text: str, key: Key, client: int, round_: int, like: Mapping[str, Tensor]) -> Update:
    try:
        data = base64.b64decode(text, validate=True)
        body = _cipher(key).decrypt(data, _bound(client, round_))
        examples = int.from_bytes(body[:_COUNT_BYTES], "big")
        tensors = load(body[_COUNT_BYTES:])
    except (InvalidTag, ValueError, OverflowError, SafetensorError) as error:
        raise FederationError(
            f"the private layers that client {client} is said to have sealed in round {round_} "
            "cannot be opened: they were sealed with another key or in another round, or altered "
            "on the way. Give all clients the same group key; if they have it, distrust the server."
        ) from error
    problems = state_problems(like, tensors)
    if not 0 < examples < _MOST:
        problems.append(f"it claims {examples} examples")
    if not problems and not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        problems.append("they hold NaN or infinity")
    if problems:
        raise FederationError(
            f"the private layers that client {client} sealed in round {round_} do not fit: "
            f"{'; '.join(problems)}. Run the same model and the same fedkl on all clients."
        )
    return Update(client, round_, "state", tensors, examples)


def _packed(private: Mapping[str, Tensor]) -> bytes:
    # Copies: tied layers are one tensor under two names, which safetensors does not store.
    whole = torch.contiguous_format
    return save({n: t.detach().cpu().clone(memory_format=whole) for n, t in private.items()})


def _cipher(key: Key) -> AESSIV:
    return AESSIV(key.stream(_LAYER).bytes(_KEY_BYTES))


def _bound(client: int, round_: int) -> list[bytes]:
    return [b"fedkl/v1/sealed", client.to_bytes(8, "big"), round_.to_bytes(8, "big")]
