#!/bin/sh
# The environment by its own name: a daemon that runs during an upgrade goes on with the old one. -I: only that one.
exec "$(readlink -f /usr/lib/rkcached/venv)/bin/python" -Im rkcached "$@"
