#!/usr/bin/env bash
# Installs what Godwit needs and is not there, and says what and why. Usage: scripts/deps.sh [stable|backports]
set -euo pipefail
qemu=${1:-stable}
case $qemu in
stable | backports) ;;
*)
    echo "deps: QEMU=$qemu is unknown: 'stable' is what the system has, 'backports' is QEMU 10.0 for Debian 12" >&2
    exit 2
    ;;
esac
missing=()
newer=()

# need PROGRAM PACKAGE WHY
need() {
    if ! PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; then
        echo "deps: $2, because $3"
        missing+=("$2")
    fi
}
# need_file FILE PACKAGE WHY
need_file() {
    if [ ! -e "$1" ]; then
        echo "deps: $2, because $3"
        missing+=("$2")
    fi
}
as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}
# --no-install-recommends: QEMU recommends a desktop's worth of libraries.
install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}
# The installed QEMU's major version; 0 when there is none.
qemu_major() {
    local version
    version=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/.* version \([0-9]*\)\..*/\1/p') || true
    echo "${version:-0}"
}

if [ "$qemu" = backports ] && [ "$(qemu_major)" -lt 10 ]; then
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    if [ "$codename" = bookworm ]; then
        newer=(qemu-system-x86 qemu-utils)
        echo "deps: QEMU 10.0 from Debian 12's backports, because its translator (TCG) keeps track of what a guest writes" \
            "while it is sent; 7.2's does not, and its guests are sent in one pass"
    else
        echo "deps: QEMU=backports is for Debian 12 (bookworm), this is '${codename:-unknown}': taking the system's own QEMU"
    fi
fi
# Fills `missing` with the packages of what is not there.
look() {
    missing=()
    hash -r
    if [ "${#newer[@]}" -eq 0 ]; then
        need qemu-system-x86_64 qemu-system-x86 "it runs the guests"
        need qemu-img qemu-utils "it makes the guests' disks"
    fi
    need swtpm swtpm "it is the trusted platform module of guests that have one"
    need_file /usr/share/OVMF/OVMF_CODE_4M.fd ovmf "it is the firmware of guests that boot by EFI"
    need ip iproute2 "you will want to look into the cluster's network namespaces"
    need nft nftables "it sets the address translation of masqueraded guests"
    need busybox busybox-static "it is the demo guest's user land"
    need cc gcc "crates build C and assembler, and the tests' guest is written in assembler"
    need make make "it runs these targets"
    need xz xz-utils "it unpacks kernel modules"
}
look

if [ "${#newer[@]}" -gt 0 ] && ! apt-cache policy | grep 'n=bookworm-backports' >/dev/null; then
    list=/etc/apt/sources.list.d/godwit-backports.list
    echo "deps: adding $list, because the system does not know Debian's backports yet"
    echo "deb http://deb.debian.org/debian bookworm-backports main" | as_root tee "$list" >/dev/null
fi
if [ $((${#missing[@]} + ${#newer[@]})) -gt 0 ]; then
    as_root apt-get -qq update
fi
if [ "${#missing[@]}" -gt 0 ]; then
    install "${missing[@]}"
    # What was there may have gone for it: Debian's qemu-system-x86 removes a qemu-utils of another version.
    look
    if [ "${#missing[@]}" -gt 0 ]; then
        install "${missing[@]}"
        look
    fi
    if [ "${#missing[@]}" -gt 0 ]; then
        echo "deps: still missing after installing: ${missing[*]}" >&2
        exit 1
    fi
fi
if [ "${#newer[@]}" -gt 0 ]; then
    install -t bookworm-backports "${newer[@]}"
    hash -r
    if [ "$(qemu_major)" -lt 10 ]; then
        echo "deps: $(command -v qemu-system-x86_64) is still $(qemu-system-x86_64 --version | head -1)" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "deps: no cargo. Godwit needs Rust 1.95 (Debian 12's is too old): install it with rustup, https://rustup.rs" >&2
    exit 1
fi
