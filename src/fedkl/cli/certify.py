"""``fedkl certify``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedkl.cli.audit import base_of
from fedkl.cli.configure import build_config, with_settings
from fedkl.cli.folders import check_apart, named
from fedkl.cli.provenance import command_line, versions
from fedkl.cli.settings import SETTINGS
from fedkl.cli.show import out, plain, say, table_of
from fedkl.errors import ConfigError

if TYPE_CHECKING:
    from fedkl.audit.certified import Certified
    from fedkl.certificate import Cancellation

# Nothing is trained: a handful of images per client will do.
START: Final = {"data": {"samples": 100, "channels": 1}}
WITHOUT_RUN: Final = "Without --run: settings of the client that is made for it"
# One gradient of test images at fresh weights: whatever is about training, and about who has which
# images, does nothing. The method stays: fedkl is short for a pad.
_IDLE: Final = ("federation", "training", "renewal", "evaluation")
IDLE: Final = (
    *(s.path for s in SETTINGS if s.section in _IDLE and s.path != "federation.method"),
    *("data.augment", "data.partition", "data.alpha", "data.shards_per_client", "data.samples"),
    *("workers", "device", "checkpoint_every"),
)


@functools.partial(with_settings, without=IDLE, panel=WITHOUT_RUN, start=START)
def certify(
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out",
            parser=named,
            metavar="PATH",
            help="Folder for certificate.json and spectrum.png.",
        ),
    ],
    run_folder: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of a finished run; its model and keys are used."),
    ] = None,
    presentations: Annotated[
        str, typer.Option(help="Numbers of presentations under one lock, with commas.")
    ] = "1",
    batch_size: Annotated[int, typer.Option(help="Images of one gradient.")] = 1,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Fraction of an update's largest singular value below which one counts as zero: a "
            "direction that the gradients do not give away."
        ),
    ] = 1e-6,
    noise: Annotated[
        float,
        typer.Option(
            help="Standard deviation of the noise that the number of bits assumes on the "
            "gradients, as a fraction of their root mean square."
        ),
    ] = 0.01,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file of the run's settings.")
    ] = None,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Count the directions of the input, and the bits, that gradients give away without the key.

    Near the true images, and whatever the attack. Without --run the model is a fresh one. The
    matrices of a pad grow with the image: for LeNet 8x8 takes seconds an update, 16x16 a minute,
    32x32 many minutes and 7 GB. A pad that is too large for memory is checked by construction.

    Examples:

      fedkl certify --model lenet --defense channel --out runs/certificate

      fedkl certify --defense pad --image-size 8 --presentations 1,2,4 --out runs/pad

      fedkl certify --run runs/kl --out runs/kl-certificate
    """
    from fedkl.audit import AuditConfig
    from fedkl.audit.certified import certify_victims
    from fedkl.audit.victims import Victims, draw_victims
    from fedkl.certificate import Prior
    from fedkl.certificate.certify import check_tolerance
    from fedkl.certificate.prior import PIXEL
    from fedkl.federation.engine import one_thread
    from fedkl.federation.remains import check_remains
    from fedkl.federation.session import load_data
    from fedkl.files import make_folder, write_json

    check_apart(out_folder, "a certificate")
    updates = _updates(presentations, batch_size)
    check_tolerance(tolerance)
    Prior(PIXEL, noise, {})  # refused before a key is made for nothing
    base = START if run_folder is None else base_of(run_folder, settings)
    run = build_config(flags=settings, file=config_file, base=base)
    audit = AuditConfig(
        run=run,
        defenses=(run.defense.name,),
        stage="initial" if run_folder is None else "final",
        images=1,
        batch_size=batch_size,
        observations=updates[-1],
    )
    if run_folder is not None:
        check_remains(run_folder, run)
    bundle = load_data(run)
    rows = draw_victims(bundle, audit)[0]
    make_folder(out_folder)
    with one_thread():
        victims = Victims(run, run_folder or make_folder(out_folder / "client"), bundle, audit)
        found = certify_victims(
            victims,
            rows,
            updates=updates,
            tolerance=tolerance,
            noise=noise,
            progress=lambda done, of: say(f"update {done}/{of}"),
        )
    facts = {"command": command_line(), "versions": versions(), "config": audit.to_dict()}
    write_json(out_folder / "certificate.json", {**found.to_dict(), **facts})
    _conclude(found, out_folder)


def _updates(presentations: str, batch_size: int) -> list[int]:
    try:
        counts = sorted({int(part) for part in presentations.split(",")})
    except ValueError:
        raise ConfigError(
            f"--presentations: expected integers with commas, as in 1,2,4, got {presentations!r}."
        ) from None
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}.")
    if counts == [1] and batch_size > 1:
        counts = [batch_size]  # the default stands for one gradient
    if wrong := [count for count in counts if count < 1 or count % batch_size]:
        raise ConfigError(
            f"--presentations: {wrong[0]} is no positive multiple of the batch size {batch_size}; "
            "every gradient holds that many."
        )
    return [count // batch_size for count in counts]


def _conclude(found: Certified, folder: Path) -> None:
    from fedkl.files import write_bytes
    from fedkl.report import spectrum_plot

    made = ["certificate.json"]
    if found.certificates:
        title = f"{found.defense}, by presentations"
        write_bytes(folder / "spectrum.png", spectrum_plot(found.to_dict(), title=title))
        made.append("spectrum.png")
        show_certificate(found)
    if found.note:
        print(plain(f"Directions and bits were not counted: {found.note}"))
    if found.cancellation is not None:
        print(plain(_by_construction(found.cancellation)))
    print(plain(f"In {folder}: {', '.join(made)}"))


def _by_construction(check: Cancellation) -> str:
    """What the check of one cancellation says, the answer first."""
    left = (
        f"of what {check.directions} random changes and another picture do to the gradient, a "
        f"shift of the first lock leaves {check.remaining:.0e} and {check.swapped:.0e}"
    )
    if not check.cut:
        return f"Of one presentation, by construction, the lock does NOT hide it: {left}."
    return (
        f"Of one presentation, by construction, the lock hides the image: {left}. What may still "
        f"tell is the law of its {check.secrets} private numbers: {check.nats:+.1f} nats against "
        "that picture, for whoever knows stem and scales. Of more presentations this says nothing."
    )


def show_certificate(found: Certified) -> None:
    """Prints the table of a certificate."""
    first = found.certificates[0]
    columns = ["presentations", "directions", "key known", "of pixels", "bits", "key known"]
    out().print(
        table_of(
            f"What gradients give away without the key: {found.defense}, {first.secrets} private "
            f"numbers, tolerance {first.tolerance:g}, noise {first.prior.noise:g}",
            columns,
            list(_lines(found)),
        )
    )


def _lines(found: Certified) -> Iterable[list[str]]:
    for one in found.certificates:
        counts = (one.presentations, one.directions, one.known, one.of)
        yield [*map(str, counts), f"{one.bits:.1f}", f"{one.bits_known:.1f}"]
