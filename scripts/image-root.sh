#!/bin/sh
# image-root.sh PACKAGE...   writes the root folder of an image to standard output, as tar.
#
# It holds the packages as they are installed on this Debian machine, what they depend on, and what every Debian has.
# Nothing is downloaded: this is for machines that reach no registry of images. Accounts are left out: an image makes
# its own.
set -eu

closure() {
  apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances "$@" | grep '^[a-z0-9]'
}

installed() {
  dpkg-query -Wf '${db:Status-Abbrev} ${binary:Package}\n' "$@" 2>/dev/null | awk '$1 == "ii" { print $2 }'
}

# shellcheck disable=SC2046  # package names hold no blanks
packages=$(installed $(closure "$@" $(dpkg-query -Wf '${Essential} ${Package}\n' | awk '$1 == "yes" { print $2 }')))

files=$(mktemp)
trap 'rm -f "$files"' EXIT
{
  # shellcheck disable=SC2086  # as above
  dpkg -L $packages
  # Commands that several packages could provide are links, which belong to no package.
  find /etc/alternatives /usr/bin /usr/sbin -type l \( -path '/etc/*' -o -lname '/etc/alternatives/*' \)
} | grep '^/.' | sort -u |
  # Packages still say /bin, where all files are in /usr/bin: tar would make a second folder of it and lose the link.
  sed -E 's,^/(bin|sbin|lib|lib32|lib64|libx32)/,/usr/\1/,; s,^,.,' >"$files"

# Documentation and PostgreSQL's compiler are a good half of the size. Files that a machine's owner has removed are no
# reason to stop.
tar --create --directory=/ --no-recursion --numeric-owner --ignore-failed-read --warning=no-failed-read \
  --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' \
  --exclude='./etc/hostname' --exclude='./etc/hosts' --exclude='./etc/resolv.conf' --exclude='*/libLLVM*' \
  --exclude='*/postgresql/*/lib/bitcode/*' --exclude='*/postgresql/*/lib/llvmjit*' --files-from="$files"
