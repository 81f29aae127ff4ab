#!/usr/bin/env bash
# Builds the demo guest: the kernel of Debian's linux-image-cloud (unpacked, never installed) and an initramfs with our
# init, busybox and the virtio drivers, and the same with QEMU's guest agent on board.
# Usage: guests/build.sh OUT_DIR   -> OUT_DIR/vmlinuz, OUT_DIR/initrd, OUT_DIR/initrd-agent
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

# 1. The init: static, so that the initramfs needs no libc. --target keeps the flag away from build scripts.
RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" cargo build --quiet --release --locked \
    --target x86_64-unknown-linux-gnu --target-dir "${CARGO_TARGET_DIR:-target}/guest" -p godwit-guest-init
init=${CARGO_TARGET_DIR:-target}/guest/x86_64-unknown-linux-gnu/release/godwit-guest-init

# 2. The kernel, downloaded once.
if [ ! -s "$out/vmlinuz" ] || [ ! -d "$out/kernel" ]; then
    newest() {
        apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1 || true
    }
    package=$(newest)
    if [ -z "$package" ]; then
        echo "guest: fetching apt's package lists"
        if [ "$(id -u)" -eq 0 ]; then apt-get -qq update; else sudo apt-get -qq update; fi
        package=$(newest)
    fi
    [ -n "$package" ] || { echo "guests/build.sh: apt knows no linux-image-cloud-amd64: is this Debian?" >&2; exit 1; }
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    echo "guest: unpacking $package (not installing it)"
    (cd "$scratch" && apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg-deb -x ./*.deb .)
    rm -rf "$out/kernel"
    mkdir -p "$out/kernel"
    mv "$scratch"/lib/modules/* "$out/kernel/modules"
    mv "$scratch"/boot/vmlinuz-* "$out/vmlinuz"
fi

# 3. The initramfs. The order is the order of loading: virtio needs virtio_ring, virtio_net needs net_failover, and so on.
modules="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover virtio_net
         virtio_console virtio_balloon rng-core virtio-rng virtio_blk button evdev scsi_common scsi_mod cdrom sd_mod
         sr_mod virtio_scsi efivarfs isofs"
tree=$(mktemp -d)
trap 'rm -rf "$tree" ${scratch:+"$scratch"}' EXIT
mkdir -p "$tree"/{bin,sbin,dev,proc,sys,tmp,modules,etc}
install -m 0755 "$init" "$tree/init"
install -m 0755 /bin/busybox "$tree/bin/busybox"
ln -s busybox "$tree/bin/sh"
# qemu-ga sets the clock of the hardware with it.
ln -s ../bin/busybox "$tree/sbin/hwclock"
for name in $modules; do
    file=$(find "$out/kernel/modules" -name "$name.ko" -o -name "$name.ko.xz" | head -n 1)
    case "$file" in
        '') continue ;;
        *.xz) xz -dc "$file" >"$tree/modules/$name.ko" ;;
        *) cp "$file" "$tree/modules/$name.ko" ;;
    esac
    echo "$name.ko" >>"$tree/modules/order"
done
cat >"$tree/dhcp.sh" <<'DHCP'
#!/bin/sh
# udhcpc's hook: take the lease that was offered.
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
busybox ip addr flush dev "$interface"
busybox ip addr add "$ip/${mask:-24}" dev "$interface"
[ -z "$router" ] || busybox ip route replace default via "${router%% *}"
DHCP
chmod 0755 "$tree/dhcp.sh"
pack() {
    (cd "$1" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1)
}
pack "$tree" >"$out/initrd.new"
mv "$out/initrd.new" "$out/initrd"

# 4. QEMU's guest agent with its libraries, as a second archive behind the first: Linux unpacks both.
if [ ! -s "$out/agent.cpio.gz" ] || [ guests/build.sh -nt "$out/agent.cpio.gz" ]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$tree" "$unpacked" ${scratch:+"$scratch"}' EXIT
    echo "guest: unpacking qemu-guest-agent (not installing it)"
    fetch() { (cd "$unpacked" && apt-get -qq -o APT::Sandbox::User=root download qemu-guest-agent); }
    fetch || { apt-get -qq update && fetch; }
    dpkg-deb -x "$unpacked"/qemu-guest-agent*.deb "$unpacked/package"
    mkdir -p "$unpacked/tree/bin"
    install -m 0755 "$unpacked/package/usr/sbin/qemu-ga" "$unpacked/tree/bin/qemu-ga"
    libraries=$(ldd "$unpacked/tree/bin/qemu-ga")
    if grep 'not found' <<<"$libraries"; then
        echo "guests/build.sh: libraries of qemu-guest-agent are missing here; QEMU's package has them: make deps" >&2
        exit 1
    fi
    for library in $(grep -o '/[^ ]*' <<<"$libraries"); do
        install -D -m 0755 "$(readlink -f "$library")" "$unpacked/tree$library"
    done
    # What it calls when it is told to power off or to reboot, and who it says is logged in: /var/run/utmp with one entry
    # (utmp(5): a user process, its line, id, name and host, an exit status, a session, a time, an address, room).
    mkdir -p "$unpacked/tree/sbin" "$unpacked/tree/var/run"
    cat >"$unpacked/tree/sbin/shutdown" <<'SHUTDOWN'
#!/bin/sh
case " $* " in
    *" -r "*) exec busybox reboot -f ;;
    *) exec busybox poweroff -f ;;
esac
SHUTDOWN
    chmod 0755 "$unpacked/tree/sbin/shutdown"
    mkdir -p "$unpacked/tree/etc"
    printf 'ID=godwit\nNAME="Godwit demo guest"\nPRETTY_NAME="Godwit demo guest with an agent"\nVERSION_ID="1"\n' \
        >"$unpacked/tree/etc/os-release"
    field() { printf '%s' "$1" && head -c "$(($2 - ${#1}))" /dev/zero; }
    {
        printf '\007\0\0\0\001\0\0\0'
        field ttyS0 32 && field S0 4 && field pilot 32 && field '' 256
        field '' 8 && printf '\0\0\0\140' && field '' 40
    } >"$unpacked/tree/var/run/utmp"
    pack "$unpacked/tree" >"$out/agent.cpio.gz.new"
    mv "$out/agent.cpio.gz.new" "$out/agent.cpio.gz"
fi
cat "$out/initrd" "$out/agent.cpio.gz" >"$out/initrd-agent.new"
mv "$out/initrd-agent.new" "$out/initrd-agent"
echo "guest: $out/vmlinuz $(du -h "$out/vmlinuz" | cut -f1), $out/initrd $(du -h "$out/initrd" | cut -f1)," \
    "$out/initrd-agent $(du -h "$out/initrd-agent" | cut -f1)"
