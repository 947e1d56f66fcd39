#!/bin/sh
# lock.sh [UV OPTION...]   writes requirements.lock anew from pyproject.toml: every version, every hash, no host.
#
# For an upgrade of all: lock.sh --upgrade; of one: lock.sh --upgrade-package NAME.
set -eu
cd "$(dirname "$0")/.."

uv=$(command -v uv || true)
if [ -z "$uv" ] && [ -x .venv/bin/uv ]; then uv=.venv/bin/uv; fi
if [ -z "$uv" ]; then
  # Not through dev.sh: that needs the file which is written here.
  tools=$(mktemp -d)
  trap 'rm -rf "$tools"' EXIT
  "${PYTHON:-python3}" -m venv "$tools"
  "$tools/bin/pip" install -q uv
  uv=$tools/bin/uv
fi

"$uv" pip compile pyproject.toml --group dev --extra otlp --extra fast --extra demo --universal --generate-hashes \
  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --python-version 3.11 -q -o requirements.lock "$@"

if grep -nE '://|^saga-coordinator|^-' requirements.lock; then
  echo "requirements.lock names a host or the project itself, see above" >&2
  exit 1
fi
