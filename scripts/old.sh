#!/usr/bin/env bash
# Builds an older godwit, for tests of upgrades, and prints where the binary is. Usage: scripts/old.sh
# Which: the revision GODWIT_OLD_REV, or the newest tag before the present revision, or what scripts/upgrade-from says.
set -euo pipefail
cd "$(dirname "$0")/.."
revision=${GODWIT_OLD_REV:-$(git describe --tags --abbrev=0 HEAD^ 2>/dev/null || grep -v '^#' scripts/upgrade-from | head -n 1)}
if ! commit=$(git rev-parse --quiet --verify "$revision^{commit}"); then
    echo "old: $revision is not in this repository (a shallow clone?): git fetch --unshallow, or set GODWIT_OLD_REV" >&2
    exit 1
fi
mkdir -p "${CARGO_TARGET_DIR:-target}/old"
folder=$(cd "${CARGO_TARGET_DIR:-target}/old" && pwd)
binary=$folder/godwit-$commit
if [ ! -x "$binary" ]; then
    echo "old: building godwit of ${commit:0:12}, once" >&2
    trap 'git worktree remove --force "$folder/tree" >/dev/null 2>&1 || true' EXIT
    git worktree remove --force "$folder/tree" >/dev/null 2>&1 || true
    git worktree add --quiet --force --detach "$folder/tree" "$commit"
    # In a target of its own: cargo tells the crates of two worktrees apart by what is in them, not by where they are, and would mix them.
    (cd "$folder/tree" && CARGO_TARGET_DIR=$folder/target cargo build --locked -p godwit --bin godwit) >&2
    cp "$folder/target/debug/godwit" "$binary.new"
    mv "$binary.new" "$binary"
fi
echo "$binary"
