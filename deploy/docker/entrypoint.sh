#!/bin/sh
# What only the container knows of itself: the address that others are told, and its own name.
# Whatever is set from outside stays.
set -eu

address=$(hostname -i)
address=${address%% *}
case $address in *:*) address="[$address]" ;; esac

export HEADRACE_PREFILL_BIND="${HEADRACE_PREFILL_BIND:-tcp://$address:8300}"
export HEADRACE_PREFILL_WORKER_ID="${HEADRACE_PREFILL_WORKER_ID:-prefill-$(hostname)}"
export HEADRACE_DECODE_BIND="${HEADRACE_DECODE_BIND:-tcp://$address:8300}"

exec headrace "$@"
