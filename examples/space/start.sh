#!/bin/sh
# Starts keye on the port of a Space, with the key that is a secret of the Space.
set -eu

if [ -z "${KEYE_API_KEY:-}" ]; then
    echo "KEYE_API_KEY is not set: store a key as a secret of the Space (Settings, Variables and secrets)" >&2
    exit 1
fi

# The hub names the address under which the Space is reached.
if [ -n "${SPACE_HOST:-}" ]; then
    set -- --allow-host "$SPACE_HOST" "$@"
fi

exec keye serve "${KEYE_MODEL:-nano}" --host 0.0.0.0 --port 7860 "$@"
