#!/usr/bin/env bash
# Makes .venv-bench with Flower's simulation engine, at its own pinned dependencies.
# torch and torchvision are borrowed from .venv: another copy would take 5 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FLWR="${FLWR:-1.41.0}"
BENCH=.venv-bench
STAMP="$BENCH/.flwr-$FLWR"
[ -e "$STAMP" ] && exit 0
echo "Installing flwr[simulation]==$FLWR into $BENCH (about 400 MB)" >&2
.venv/bin/python -m venv --clear "$BENCH"
"$BENCH/bin/python" -m pip install --quiet --disable-pip-version-check "flwr[simulation]==$FLWR"
SITE="$("$BENCH/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
OURS="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
# Added last, so that Flower's own versions of everything else win.
echo "import site; site.addsitedir('$OURS')" > "$SITE/zz-borrowed.pth"
"$BENCH/bin/python" -c 'import flwr, ray, torch'
touch "$STAMP"
