# Words: make demo, test, check, bench, chaos, gpu. Each makes .venv first; a second call finds it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench chaos cluster clean

# The main job at toy size: makes a corpus (few chats: they are for CLIP-FlanT5), trains on two local nodes, evaluates before and after, writes a report.
demo: export HPC_MM_STORE = demo/data
demo: export HPC_MM_RUNS = demo/runs
demo: .venv/train.stamp
	$(BIN)/python data_prep/shapes.py seed=0 chats=60
	$(BIN)/python -m hpc_mm.launch recipe=toy nodes=2 cluster=local
	for step in 0 latest; do for name in toy toy_vqa; do \
	  $(BIN)/python eval/$$name.py checkpoint=demo/runs/toy step=$$step cluster=local || exit; done; done
	$(BIN)/python -m hpc_mm.report run=demo/runs/toy

# All tests, by two processes of one thread each: small models lose more by threads than they gain. Those that need Slurm, Ceph or Java are skipped, with the reason, where these are absent.
test: .venv/all.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

check: .venv/all.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Side by side with peers; each prints ratios.
bench: .venv/all.stamp .venv-peers/peers.stamp
	$(BIN)/python benchmarks/cold_start.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/download.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/padding.py
	$(BIN)/python benchmarks/lengths.py
	$(BIN)/python benchmarks/vqascore.py

# What a shared cluster, a killed process and a failing store do, done on purpose: most of an hour on the cluster of make cluster.
chaos: .venv/all.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" HPC_MM_REQUIRE_CLUSTER=1 $(BIN)/python -m pytest -s -m chaos tests

# Debian, root: installs and starts a Slurm of 4 nodes and a Ceph on this machine (tests/cluster/*.sh down ends them).
cluster:
	tests/cluster/slurm.sh up
	tests/cluster/ceph.sh up

clean:
	rm -rf .venv .venv-peers demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train.stamp: .venv/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train]'
	touch $@

.venv/all.stamp: .venv/train.stamp
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]'
	$(BIN)/pip install --quiet --no-deps open_flamingo==2.0.1 lmms-eval==0.7.3
	touch $@

# mosaicml-streaming, which plan.py measures, needs transformers and NumPy older than ours; img2dataset has needs of its own.
.venv-peers/peers.stamp: Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet mosaicml-streaming==0.13.0 torch==2.15.0 torchvision==0.29.2
	$(PYTHON) -m venv .venv-peers/img2dataset
	.venv-peers/img2dataset/bin/pip install --quiet img2dataset==1.47.0
	touch $@

# On a machine with a GPU: parity in bf16, speed and memory beside open_flamingo, the loader's rate, and VQAScore's.
.PHONY: gpu
gpu: .venv/all.stamp
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/vqascore.py size=xl device=cuda
