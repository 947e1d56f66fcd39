#!/bin/sh
# dev.sh [COMMAND...]   runs a command in the project's own .venv, which is made from requirements.lock when needed.
#
# Needs nothing but Python 3.11 or newer; as root on Debian it installs even that. PYTHON=... picks the interpreter.
set -eu
cd "$(dirname "$0")/.."

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }  # Debian ships Python without these two

find_python() {
  for python in ${PYTHON:-python3.11 python3.12 python3.13 python3 /usr/bin/python3}; do
    if fits "$python" && has_venv "$python"; then
      return
    fi
  done
  if [ -n "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON is not Python 3.11 or newer with the modules venv and ensurepip" >&2
    exit 1
  fi
  scripts/apt-install.sh python3 python3-venv
  python=/usr/bin/python3
  fits "$python" || { echo "Python 3.11 or newer is needed; this machine has $("$python" -V)" >&2; exit 1; }
}

hash_of() { if command -v sha256sum >/dev/null 2>&1; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

# The folder is part of the stamp: programs in a .venv carry its path, so that a copied tree needs one of its own.
wanted() { printf '%s\n' "$PWD" && hash_of requirements.lock pyproject.toml; }

up_to_date() {
  [ "$(cat .venv/.stamp 2>/dev/null)" = "$(wanted)" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$(cat .venv/.python)" = "$PYTHON" ]
}

# uv is the quicker installer by far, and comes from the lock as everything does. pip is there where uv cannot run, or
# where only pip's configuration knows the way to a package index.
install_locked() {
  sed -n '/^uv==/,/[^\\]$/p' requirements.lock >.venv/uv.lock
  sed '/^uv==/,/[^\\]$/d' requirements.lock >.venv/others.lock
  if .venv/bin/python -m pip install -q --require-hashes --only-binary :all: -r .venv/uv.lock &&
    .venv/bin/uv pip install -q --compile-bytecode --require-hashes -r .venv/others.lock; then
    return
  fi >.venv/uv.log 2>&1
  .venv/bin/python -m pip install -q --require-hashes -r .venv/others.lock
}

set_up() {
  echo "setting up .venv (once)" >&2
  find_python
  rm -rf .venv
  "$python" -m venv .venv
  install_locked
  .venv/bin/python -m pip install -q --no-deps --no-build-isolation -e .
  printf '%s\n' "${PYTHON:-$python}" >.venv/.python
  wanted >.venv/.stamp
}

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV="$PWD/.venv"

if ! up_to_date; then
  # Whoever comes second waits, then finds the work done. The lock is on the folder, so no lock file is left behind.
  exec 9<.
  if command -v flock >/dev/null 2>&1; then flock 9; fi
  up_to_date || set_up
  exec 9<&-
fi

[ $# -gt 0 ] || exit 0
PATH="$VIRTUAL_ENV/bin:$PATH" exec "$@"
