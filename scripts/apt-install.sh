#!/bin/sh
# apt-install.sh PACKAGE...   installs Debian packages, without starting the services they bring.
#
# Exits 1 and says what to install where this is not a Debian machine or not root: nobody is asked for a password here.
set -eu

if ! command -v apt-get >/dev/null 2>&1; then
  echo "please install: $*" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "please run: sudo apt-get install $*" >&2
  exit 1
fi

# One installation at a time: two would fight over dpkg's lock and over the policy file below.
if [ -z "${APT_INSTALL_LOCKED:-}" ] && command -v flock >/dev/null 2>&1; then
  APT_INSTALL_LOCKED=1 exec flock "$(dirname "$0")" "$0" "$@"
fi

# A package's own broker or database would take the well-known ports. Where the machine has a policy already, it is kept.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  trap 'exit 1' HUP INT TERM
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi

echo "installing with apt: $*" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >"$log" 2>&1; then
  cat "$log" >&2
  rm -f "$log"
  exit 1
fi
rm -f "$log"
