#!/usr/bin/env bash
# Makes .venv-breaching with breaching 0.1.2, next to whose Inverting Gradients ours is timed.
# torch, torchvision and scipy are borrowed from .venv; the other dependencies are installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BREACHING="${BREACHING:-0.1.2}"
OVERLAY=.venv-breaching
STAMP="$OVERLAY/.breaching-$BREACHING"
[ -e "$STAMP" ] && exit 0
echo "Installing breaching==$BREACHING into $OVERLAY (a few MB)" >&2
.venv/bin/python -m venv --clear "$OVERLAY"
# Without --no-deps lpips and breaching would bring another torch.
"$OVERLAY/bin/python" -m pip install --quiet --disable-pip-version-check 'hydra-core>=1.3,<1.4'
"$OVERLAY/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  "breaching==$BREACHING" 'lpips==0.1.4'
SITE="$("$OVERLAY/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
OURS="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
echo "import site; site.addsitedir('$OURS')" > "$SITE/zz-borrowed.pth"
"$OVERLAY/bin/python" -W ignore -c 'import breaching'
touch "$STAMP"
