"""Private layers on their way to the clients that hold the same key: sealed.

Clients with one key need not keep their private layers apart: each sends them encrypted beside its
update, the server hands them on unread, and every client goes on from their mean. So all train one
and the same network, of which the server has the layers in the middle.

Encrypted with AES-SIV (RFC 5297), bound to client and round: the server can neither read nor alter
them, nor hand on those of another round. It is deterministic, so a round that is asked for again
gives the same bytes and nothing more. It can leave some of them out, as if clients were absent.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedkl.errors import FederationError
from fedkl.federation.aggregate import aggregate
from fedkl.federation.client import Update
from fedkl.key import Key
from fedkl.locking import state_problems

_LAYER: Final = "sealed private layers"  # names the key stream
_KEY_BYTES: Final = 64  # AES-256-SIV takes two keys
_COUNT_BYTES: Final = 8
_TAG_BYTES: Final = 16


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
    opened = [_opened(text, key, int(c), round_, like) for c, text in sorted(sealed.items())]
    return aggregate(sorted(opened, key=lambda update: update.client), weighted=weighted)


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
    if problems := state_problems(like, tensors):
        raise FederationError(
            f"the private layers that client {client} sealed in round {round_} do not fit: "
            f"{'; '.join(problems)}. Run the same model and the same fedkl on all clients."
        )
    return Update(client, round_, "state", tensors, examples)


def _packed(private: Mapping[str, Tensor]) -> bytes:
    return save({name: t.detach().cpu().contiguous() for name, t in private.items()})


def _cipher(key: Key) -> AESSIV:
    return AESSIV(key.stream(_LAYER).bytes(_KEY_BYTES))


def _bound(client: int, round_: int) -> list[bytes]:
    return [b"fedkl/v1/sealed", client.to_bytes(8, "big"), round_.to_bytes(8, "big")]
