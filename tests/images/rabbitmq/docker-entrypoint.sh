#!/bin/sh
set -eu

# The volume comes with root's ownership where Docker did not fill it from the image.
if [ "$(id -u)" = 0 ]; then
  chown -R rabbitmq: "$HOME"
  exec setpriv --reuid rabbitmq --regid rabbitmq --init-groups "$0" "$@"
fi
exec "$@"
