#!/usr/bin/env bash
# Builds the images, starts the stack, asks it a question, scales it while it runs, asks again, and stops it.
#
# Needs root, Docker's engine and docker-compose (or the compose plugin). Starts dockerd if none runs, and ends that one.
# On a machine that reaches no container registry, BASE_IMAGE_SCRIPT names a program that makes the base images instead:
#   $BASE_IMAGE_SCRIPT TAG [DEBIAN-PACKAGE...]
# WHEELS: a folder of wheels that the images should install, such as torch's CPU build (copied to compose/wheels).
# MODEL: the checkpoint to serve, the built-in one if not given. PORT: the router's (default 8000).
set -euo pipefail
cd "$(dirname "$0")/.."
export PORT=${PORT:-8000} TANDEM_SERVED_MODEL_NAME=smoke
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-tandem-smoke}
work=$(mktemp -d)
engine=""

say() { printf '\n== %s\n' "$*" >&2; }
compose() {
    if docker compose version >/dev/null 2>&1; then
        docker compose -f compose/compose.yaml "$@"
    else
        docker-compose -f compose/compose.yaml "$@"
    fi
}

finish() {
    status=$?
    if [ "$status" != 0 ]; then compose logs --tail=40 >&2 || true; fi
    say "stopping"
    compose down --volumes --timeout 60 || true
    if [ -n "$engine" ]; then kill "$engine" && wait "$engine" || true; fi
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT

wait_for() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$end" ]; then say "no $what in time" && return 1; fi
        sleep 1
    done
}

if ! docker info >/dev/null 2>&1; then
    say "starting dockerd"
    dockerd >"$work/dockerd.log" 2>&1 &
    engine=$!
    wait_for 60 "Docker engine" docker info
fi
if [ -n "${BASE_IMAGE_SCRIPT:-}" ]; then
    say "making base images"
    docker image inspect python:3.11-slim-bookworm >/dev/null 2>&1 || "$BASE_IMAGE_SCRIPT" python:3.11-slim-bookworm
    docker image inspect redis:7-bookworm >/dev/null 2>&1 || "$BASE_IMAGE_SCRIPT" redis:7-bookworm redis-server
fi

if [ -n "${WHEELS:-}" ]; then
    mkdir -p compose/wheels
    cp "$WHEELS"/*.whl compose/wheels/
fi
say "building"
compose build

ask() { # a prompt too long for the decode worker to compute itself, so that blocks travel
    local prompt answer
    prompt=$(printf 'question %s number %s, ' {1..60})
    answer=$(curl --silent --show-error --fail --dump-header "$work/headers" --header 'X-Tandem-Timings: 1' \
        --header 'Content-Type: application/json' "http://127.0.0.1:$PORT/v1/chat/completions" --data "{
            \"model\": \"smoke\", \"max_tokens\": 16, \"ignore_eos\": true,
            \"messages\": [{\"role\": \"user\", \"content\": \"$1 $prompt\"}]}")
    python3 - "$answer" <<'PY'
import json, sys
answer = json.loads(sys.argv[1])
timings = answer["timings"]
assert answer["usage"]["completion_tokens"] == 16, answer
assert timings["prefill_workers"] and timings["decode_workers"], timings
assert timings["kv_bytes_moved"] > 0, timings
print(f"16 tokens in {timings['total_ms']:.0f} ms; {timings['kv_bytes_moved']:,} bytes from "
      f"{timings['prefill_workers'][0]} to {timings['decode_workers'][0]}")
PY
}

workers() { # how many containers of the service report that they are well
    local id healthy=0
    for id in $(compose ps -q "$1"); do
        [ "$(docker inspect --format '{{.State.Health.Status}}' "$id")" = healthy ] && healthy=$((healthy + 1))
    done
    echo "$healthy"
}
has_workers() { [ "$(workers prefill)" = "$1" ] && [ "$(workers decode)" = "$2" ]; }
router_ready() { curl --silent --fail "http://127.0.0.1:$PORT/ready"; }

say "starting"
compose up -d
wait_for 300 "ready router" router_ready
wait_for 60 "healthy workers" has_workers 1 1
ask first

say "scaling to 2 prefill and 3 decode workers"
compose up -d --no-recreate --scale prefill=2 --scale decode=3
wait_for 300 "five healthy workers" has_workers 2 3
for name in second third fourth fifth; do ask "$name"; done

say "scaling back"
compose up -d --no-recreate --scale prefill=1 --scale decode=1
wait_for 120 "two healthy workers" has_workers 1 1
ask last
say "well"
