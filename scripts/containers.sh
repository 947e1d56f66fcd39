#!/bin/sh
# containers.sh [PYTEST ARGUMENT...]   runs tests against RabbitMQ and PostgreSQL in containers: those of bus, schema and
# store, or what the arguments say.
#
# Takes the Docker daemon that answers; as root on a machine without one it starts its own, and ends it afterwards.
# Takes the usual images, which TEST_RABBITMQ_IMAGE and TEST_POSTGRES_IMAGE may replace; where they are not to be had
# it builds some from the Debian packages of this machine.
set -eu
cd "$(dirname "$0")/.."

work=$(mktemp -d /tmp/containers.XXXXXX) # a short path: that of a socket may have 107 characters
daemon=

finish() {
  status=$?
  trap - EXIT
  if [ -n "$daemon" ]; then
    kill "$daemon" 2>/dev/null || true # it ends its containers, too
    wait "$daemon" || true
    # It may leave its folder mounted on itself.
    awk -v below="$work/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r umount
  fi
  rm -rf "$work"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM

docker_answers() { docker info >/dev/null 2>&1; }

start_docker() {
  command -v dockerd >/dev/null 2>&1 || scripts/apt-install.sh docker.io
  if [ "$(id -u)" != 0 ]; then
    echo "no Docker daemon answers: start one, or run this as root" >&2
    exit 1
  fi
  echo "starting a Docker daemon" >&2
  unset DOCKER_CONTEXT DOCKER_TLS_VERIFY
  export DOCKER_HOST="unix://$work/docker.sock"
  # All that it writes is in one folder, and it publishes ports for this machine only.
  dockerd --host "$DOCKER_HOST" --data-root "$work/data" --exec-root "$work/run" --pidfile "$work/docker.pid" \
    --ip 127.0.0.1 >"$work/dockerd.log" 2>&1 &
  daemon=$!
  tries=0
  until docker_answers; do
    tries=$((tries + 1))
    if [ "$tries" -gt 120 ] || ! kill -0 "$daemon" 2>/dev/null; then
      tail -n 20 "$work/dockerd.log" >&2
      echo "the Docker daemon did not come up" >&2
      exit 1
    fi
    sleep 0.5
  done
}

# A minute is enough for images of this size, and too long already where no registry is in reach.
available() {
  docker image inspect "$1" >/dev/null 2>&1 || timeout 60 docker pull -q "$1" >/dev/null 2>&1
}

# build NAME VERSION PACKAGE... -> local/NAME:VERSION
build() {
  name=$1 version=$2
  shift 2
  echo "building local/$name:$version from Debian packages" >&2
  cp -R "tests/images/$name" "$work/$name"
  scripts/image-root.sh "$@" >"$work/$name/root.tar"
  # The classic builder: it is part of every daemon, where the newer one is a package of its own.
  DOCKER_BUILDKIT=0 docker build -q --build-arg "MAJOR=$version" -t "local/$name:$version" -t "local/$name:latest" \
    "$work/$name" >/dev/null 2>"$work/build.log" || { cat "$work/build.log" >&2; exit 1; }
  rm -rf "${work:?}/$name"
}

installed() { dpkg-query -Wf '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q '^ii'; }

docker_answers || start_docker

rabbitmq=${TEST_RABBITMQ_IMAGE:-rabbitmq:4-management}
if ! available "$rabbitmq"; then
  installed rabbitmq-server || scripts/apt-install.sh rabbitmq-server
  version=$(dpkg-query -Wf '${Version}' rabbitmq-server | sed -E 's/^([0-9]+:)?([0-9]+\.[0-9]+).*/\2/')
  build rabbitmq "$version" rabbitmq-server passwd
  rabbitmq=local/rabbitmq:$version
fi

postgres=${TEST_POSTGRES_IMAGE:-postgres:17}
if ! available "$postgres"; then
  installed postgresql || scripts/apt-install.sh postgresql
  version=$(dpkg-query -Wf '${Version}' postgresql | sed -E 's/^([0-9]+:)?([0-9]+).*/\2/')
  build postgres "$version" "postgresql-$version" passwd
  postgres=local/postgres:$version
fi

if [ -n "$daemon" ]; then
  # testcontainers' cleaner is an image as well, and a daemon of our own is cleaned anyway. Inside a container
  # testcontainers would look for the daemon outside of it.
  export TESTCONTAINERS_RYUK_DISABLED=true TESTCONTAINERS_CONNECTION_MODE=docker_host TESTCONTAINERS_HOST_OVERRIDE=127.0.0.1
fi

export TEST_SERVERS=containers TEST_RABBITMQ_IMAGE="$rabbitmq" TEST_POSTGRES_IMAGE="$postgres"
# The others see a server, not where it runs: `make test` is enough for them.
[ $# -gt 0 ] || set -- -m "rabbitmq or postgres" tests/integration/test_servers.py \
  tests/integration/test_bus_conformance.py tests/integration/test_rabbitmq.py tests/integration/test_schema.py \
  tests/integration/test_store.py
scripts/dev.sh pytest "$@"
