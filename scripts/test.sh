#!/usr/bin/env bash
# Runs the tests. Usage: scripts/test.sh [all|unit|e2e|cluster|upgrade]
# Unit tests run in parallel; end-to-end tests start whole clusters and run few at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-all}
if [ "$(id -u)" -ne 0 ]; then
    echo "test: needs root (network namespaces, QEMU with taps): try sudo make test" >&2
    exit 1
fi
# Where only the end of a failed test's output is kept, a backtrace through the async runtime leaves nothing of what was said.
export RUST_BACKTRACE=${GODWIT_BACKTRACE:-0}
# Always the whole workspace, so that its crates are built once, with one set of features; WHICH tests is a filter.
runner() {
    if command -v cargo-nextest >/dev/null; then
        cargo nextest run --workspace --locked --no-fail-fast -E "$1"
    else
        echo "test: no cargo-nextest, using cargo test (which runs all tests, whatever was asked for)"
        make_guest
        cargo test --workspace --locked --no-fail-fast
    fi
}
make_guest() {
    guests/build.sh target/demo-guest
    export GODWIT_GUEST=$PWD/target/demo-guest
}
# The controllers in virtual time, with everything going wrong. Only crates without IO: a minute of building, optimised.
simulator() {
    cargo run --release --locked -p godwit-simulator --example seeds -- "${GODWIT_SEEDS:-2000}"
}
# Test files whose clusters can have a real API server.
either='package(godwit) & (binary(certificates) | binary(cluster) | binary(console) | binary(contract) | binary(cpu) | binary(drain) | binary(drain_kubectl)
    | binary(evacuation) | binary(fencing) | binary(guests) | binary(images) | binary(kubectl) | binary(lost_node) | binary(maintenance)
    | binary(maintenance_fields) | binary(metrics) | binary(migration) | binary(migration_network) | binary(pods) | binary(refusals)
    | binary(uninstall) | binary(virtctl))'
# Those that run an older godwit beside this one.
upgrades='package(godwit) & binary(upgrade)'
# Those that start `godwit up` themselves: they are about it, or measure with it.
ours='package(godwit) & (binary(bench) | binary(faults) | binary(lifecycle))'
# Whether KUBEBUILDER_ASSETS names a folder with etcd and kube-apiserver.
real() {
    [ -x "${KUBEBUILDER_ASSETS:-}/etcd" ] && [ -x "${KUBEBUILDER_ASSETS:-}/kube-apiserver" ]
}
count() {
    if ! command -v cargo-nextest >/dev/null; then
        echo "uncounted"
        return
    fi
    local names
    # A line a test, whatever the output goes to.
    names=$(cargo nextest list --workspace --locked --message-format oneline -E "$1" 2>/dev/null)
    if [ -z "$names" ]; then
        echo "test: cargo-nextest lists no test for: $1" >&2
        return 1
    fi
    wc -l <<<"$names"
}
# Says what was not run against etcd and kube-apiserver, or at all.
skipped() {
    local some all none
    if [ -z "${GODWIT_OLD:-}" ]; then
        some=$(count "$upgrades")
        echo "test: SKIPPED: $some tests run an older godwit beside this one and were not run: GODWIT_OLD names none (make test-upgrade builds one)"
    fi
    if real; then
        some=$(count "$ours")
        echo "test: SKIPPED: $some tests start \`godwit up\` themselves (bench, faults, lifecycle) and were not run against etcd and kube-apiserver"
        return
    fi
    all=$(count "$either")
    none=$(count 'package(godwit) & (binary(certificates) | binary(cluster) | binary(metrics) | binary(uninstall))')
    echo "test: SKIPPED: $all tests were not run against etcd and kube-apiserver, but against the embedded server" \
        "($none of them not at all): set KUBEBUILDER_ASSETS to a folder with both"
}
kubectls=$(ls /usr/lib/google-cloud-sdk/bin/kubectl.1.* 2>/dev/null || true)
if [ -z "$kubectls" ] && ! command -v kubectl >/dev/null; then
    echo "test: no kubectl found; the tests that drive a real kubectl will say that they were skipped"
fi
case "$which" in
    unit) runner 'not package(godwit)'; simulator ;;
    e2e) make_guest; runner 'package(godwit)'; skipped ;;
    cluster)
        if ! command -v cargo-nextest >/dev/null; then
            echo "test: cargo-nextest chooses these tests; install it" >&2
            exit 1
        fi
        make_guest
        runner "$either"
        skipped
        ;;
    upgrade)
        GODWIT_OLD=${GODWIT_OLD:-$(scripts/old.sh)}
        export GODWIT_OLD
        runner "$upgrades"
        real || echo "test: SKIPPED: of $(count "$upgrades") tests those on etcd and kube-apiserver:" \
            "set KUBEBUILDER_ASSETS to a folder with both"
        ;;
    all) make_guest; runner 'all()'; simulator; skipped ;;
    *)
        echo "usage: scripts/test.sh [all|unit|e2e|cluster|upgrade]" >&2
        exit 2
        ;;
esac
