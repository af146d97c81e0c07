# Every target does its own set-up; `make demo` and `make test` are all that a newcomer needs.
.PHONY: help setup demo lab test bench matrix docs deb clean

help:
	@echo "make demo    watch a running guest move to another QEMU with its disk"
	@echo "make lab     two hosts and guests to try things with, as root: docs/tutorial.md"
	@echo "make test    lint, quick tests, oldest dependencies, integration tests with real guests"
	@echo "make bench   how fast whole copies are, ours and others', in one run: docs/explanation/benchmarks.md"
	@echo "make matrix  the tests again on Debian 13 (QEMU 10), and from here to there: CONTRIBUTING.md"
	@echo "make docs    the manual as HTML and man pages, in build/docs"
	@echo "make deb     a Debian package, in dist/"
	@echo "make setup   only what these need: Debian packages, .venv"

setup:
	@scripts/setup

demo: setup
	.venv/bin/qemu-blkmig demo $(DEMO_ARGS)

lab: setup
	@.venv/bin/python -m integration.laboratory

# Two at a time: installing and mypy keep one processor busy.
test: setup
	.venv/bin/tox run-parallel --parallel 2 --parallel-live $(TOX_ARGS)

bench: setup
	.venv/bin/python -m integration.bench $(BENCH_ARGS)

matrix: setup
	scripts/matrix $(MATRIX_ARGS)

docs: setup
	scripts/docs

deb: setup
	scripts/deb

clean:
	rm -rf .venv .tox .matrix build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
