# Words: make demo, make test, make check, make bench. Each makes .venv first; a second call finds it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench cluster clean

# The main job at toy size: makes a corpus, trains on two local nodes, captions held-out images, writes a report.
demo: export HPC_MM_STORE = demo/data
demo: export HPC_MM_RUNS = demo/runs
demo: .venv/train.stamp
	$(BIN)/python data_prep/shapes.py seed=0
	$(BIN)/python -m hpc_mm.launch recipe=toy nodes=2 cluster=local
	$(BIN)/python eval/toy.py run=demo/runs/toy
	$(BIN)/python -m hpc_mm.report run=demo/runs/toy

# All tests. Those that need Slurm, Ceph or Java are skipped, with the reason, where these are absent.
test: .venv/all.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

check: .venv/all.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Side by side with peers; each prints ratios.
bench: .venv/all.stamp
	$(BIN)/python benchmarks/cold_start.py

# Debian, root: installs and starts a Slurm of 4 nodes and a Ceph on this machine (tests/cluster/*.sh down ends them).
cluster:
	tests/cluster/slurm.sh up
	tests/cluster/ceph.sh up

clean:
	rm -rf .venv demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train.stamp: .venv/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train]'
	touch $@

.venv/all.stamp: .venv/train.stamp
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]'
	$(BIN)/pip install --quiet --no-deps open_flamingo==2.0.1
	touch $@
