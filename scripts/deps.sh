#!/usr/bin/env bash
# Installs what Godwit needs and is not there, and says what and why. Usage: scripts/deps.sh [stable|backports]
set -euo pipefail
qemu=${1:-stable}
missing=()

# need PROGRAM PACKAGE WHY
need() {
    if ! PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; then
        echo "deps: $2, because $3"
        missing+=("$2")
    fi
}
need qemu-system-x86_64 qemu-system-x86 "it runs the guests"
need qemu-img qemu-utils "it makes the guests' disks"
need ip iproute2 "you will want to look into the cluster's network namespaces"
need nft nftables "it sets the address translation of masqueraded guests"
need busybox busybox-static "it is the demo guest's user land"
need cc gcc "crates build C and assembler, and the tests' guest is written in assembler"
need make make "it runs these targets"
need xz xz-utils "it unpacks kernel modules"

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

if [ "${#missing[@]}" -gt 0 ] || { [ "$qemu" = backports ] && ! qemu-system-x86_64 --version | grep -qE 'version (1[0-9])\.'; }; then
    if [ "$qemu" = backports ]; then
        list=/etc/apt/sources.list.d/godwit-backports.list
        echo "deps: QEMU 10.0 from Debian 12's backports (adds $list)"
        echo "deb http://deb.debian.org/debian bookworm-backports main" | as_root tee "$list" >/dev/null
    fi
    as_root apt-get -qq update
    export DEBIAN_FRONTEND=noninteractive
    # --no-install-recommends: QEMU recommends a desktop's worth of libraries.
    [ "${#missing[@]}" -eq 0 ] || as_root apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
    if [ "$qemu" = backports ]; then
        as_root apt-get -qq install -y --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils >/dev/null
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "deps: no cargo. Godwit needs Rust 1.95 (Debian 12's is too old): install it with rustup, https://rustup.rs" >&2
    exit 1
fi
