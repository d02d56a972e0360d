"""Locking any model with a client's key. The public surface of the package."""

from fedkl.locking.api import affines, lock, lock_like, put_key, set_key, unlock
from fedkl.locking.calibration import calibrate, estimate_statistics
from fedkl.locking.holder import is_locked, lock_spec, sources_of, unwrap
from fedkl.locking.meeting import meeting_points
from fedkl.locking.merging import merge
from fedkl.locking.pad import OpenPad, Pad
from fedkl.locking.reuse import (
    draw_layers,
    epoch_of,
    renew,
    replaced_affines,
    restart_lock,
)
from fedkl.locking.scheme import Scheme, Site
from fedkl.locking.schemes import (
    PRESETS,
    SCHEMES,
    Channel,
    PrivateNorm,
    SharedNorm,
    scheme_of,
)
from fedkl.locking.select import Layers
from fedkl.locking.spec import LockSpec, SiteSpec
from fedkl.locking.state import (
    check_optimizer,
    copy_state,
    load_private_state,
    load_shared_state,
    private_names,
    private_state,
    private_views,
    shared_state,
    shared_views,
    state_problems,
)
from fedkl.locking.survey import Lockable, lockable

__all__ = [
    "PRESETS",
    "SCHEMES",
    "Channel",
    "Layers",
    "LockSpec",
    "Lockable",
    "OpenPad",
    "Pad",
    "PrivateNorm",
    "Scheme",
    "SharedNorm",
    "Site",
    "SiteSpec",
    "affines",
    "calibrate",
    "check_optimizer",
    "copy_state",
    "draw_layers",
    "epoch_of",
    "estimate_statistics",
    "is_locked",
    "load_private_state",
    "load_shared_state",
    "lock",
    "lock_like",
    "lock_spec",
    "lockable",
    "meeting_points",
    "merge",
    "private_names",
    "private_state",
    "private_views",
    "put_key",
    "renew",
    "replaced_affines",
    "restart_lock",
    "scheme_of",
    "set_key",
    "shared_state",
    "shared_views",
    "sources_of",
    "state_problems",
    "unlock",
    "unwrap",
]
