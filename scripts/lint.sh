#!/usr/bin/env bash
# Format, clippy (the pure crates carry stricter rules in their own clippy.toml), dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
cargo clippy --workspace --all-targets --locked -- -D warnings
if ! command -v cargo-deny >/dev/null && [ ! -x target/tools/bin/cargo-deny ]; then
    echo "lint: installing cargo-deny into target/tools"
    cargo install --quiet --locked --root target/tools cargo-deny
fi
# Advisories need a database from the network, which CI has not: licences, bans and sources are checked here.
PATH=$PWD/target/tools/bin:$PATH cargo deny --offline check bans licenses sources
