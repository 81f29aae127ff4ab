# Two commands do it all on a fresh Debian 12: `make demo` and `make test`. See README.md.
SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
GODWIT := $(TARGET)/release/godwit
GUEST := $(TARGET)/demo-guest
# make deps QEMU=backports takes QEMU 10.0 from Debian 12's backports instead of 7.2.
QEMU ?= stable

.PHONY: help demo build guest test test-unit test-e2e test-cluster test-upgrade lint deps clean

help:
	@sed -n 's/^## //p' Makefile

## make demo            build, start three nodes, boot a guest, move it, report. ARGS=--keep leaves the cluster up
demo: deps build guest
	$(GODWIT) demo --guest $(GUEST) $(ARGS)

## make build           the release binary, target/release/godwit
build: deps
	cargo build --release --locked -p godwit

## make guest           the demo guest's kernel and initramfs
guest: deps
	guests/build.sh $(GUEST)

## make test            everything that can fail: unit, property and end-to-end tests on real guests, 2,000 simulated clusters
test: deps
	scripts/test.sh all

## make test-unit       the tests that start no cluster
test-unit: deps
	scripts/test.sh unit

## make test-e2e        the tests that start clusters with real guests
test-e2e: deps
	scripts/test.sh e2e

## make test-cluster    end-to-end tests against the etcd and kube-apiserver in the folder KUBEBUILDER_ASSETS
test-cluster: deps
	scripts/test.sh cluster

## make test-upgrade    an older godwit, replaced by this one process by process under guests that move. GODWIT_OLD_REV: which
test-upgrade: deps
	scripts/test.sh upgrade

## make lint            format, clippy with warnings denied, purity of the pure crates, dependencies
lint: deps
	scripts/lint.sh

## make deps            install what is missing (QEMU=backports for QEMU 10.0)
deps:
	@scripts/deps.sh $(QEMU)

## make clean           remove what was built
clean:
	cargo clean
