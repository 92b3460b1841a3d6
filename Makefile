# SPDX-License-Identifier: GPL-2.0-or-later
#
# A thin front: meson builds, the scripts do the rest. Each target stands
# alone on a clean Debian bookworm, as root; HACKING.md explains them.

BUILD  ?= build
PREFIX ?= /usr/local
ARGS   ?=

export BALE_BUILD := $(abspath $(BUILD))
export BALE_TEST_SUMMARY

.PHONY: all build demo test test-long bench check-style install clean

all: build

build:
	@scripts/install-packages build qemu
	@scripts/build $(BUILD)

demo: build
	@scripts/install-packages demo
	@scripts/demo $(ARGS)

test: build
	@scripts/install-packages
	@scripts/run-tests $(ARGS)

test-long: build
	@scripts/install-packages
	@scripts/run-tests --long $(ARGS)

bench: build
	@scripts/install-packages
	@scripts/bench $(ARGS)

check-style:
	@scripts/check-style
	@scripts/check-layers

install: build
	@scripts/build --prefix=$(PREFIX) $(BUILD)
	meson install -C $(BUILD) --no-rebuild \
		$(if $(DESTDIR),--destdir=$(abspath $(DESTDIR)))

clean:
	rm -rf $(BUILD) build-asan build-tsan
