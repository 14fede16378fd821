# Every target makes what it needs. Start with `make` or `make help`.

VENV       := .venv
PROTO_VENV := .venv-proto
PROTOS     := $(shell find protos -name '*.proto')
GENERATED  := $(foreach p,$(PROTOS:.proto=),$(p)_pb2.py $(p)_pb2.pyi $(p)_pb2_grpc.py)
BENCHES    := $(filter-out __init__ _% flower,$(basename $(notdir $(wildcard benchmarks/*.py))))

PIP_INSTALL := -m pip install -qq --disable-pip-version-check
PROTOC      := $(PROTO_VENV)/bin/python -m grpc_tools.protoc -I .

# Idle OpenMP threads sleep instead of spinning: several processes share few cores here.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint lint-style lint-types lint-imports lint-proto bench proto proto-check clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "Arguments pass through ARGS, for example: make test ARGS='-k packing'"

demo: $(VENV)/.ready  ## one coordinator and four agents on this machine, under 4 minutes
	@$(VENV)/bin/sketchfleet-trial demo $(ARGS)

test: $(VENV)/.ready  ## unit, property and end-to-end tests
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: lint-style lint-types lint-imports lint-proto  ## format, lint, types, import rules, wire contract

lint-style: $(VENV)/.ready
	@$(VENV)/bin/ruff format --check --quiet . || { echo "Run: $(VENV)/bin/ruff format ." >&2; exit 1; }
	@$(VENV)/bin/ruff check --quiet .

lint-types: $(VENV)/.ready
	@$(VENV)/bin/mypy
	@$(VENV)/bin/mypy --python-version 3.10 --no-warn-return-any --cache-dir .mypy_cache/3.10 \
	  edge_agent profiles protos coordinator

lint-imports: $(VENV)/.ready
	@$(VENV)/bin/lint-imports --no-logo

lint-proto: $(VENV)/.ready proto-check
	@$(VENV)/bin/python tools/proto_style.py $(PROTOS)

bench: $(VENV)/.ready  ## every program in benchmarks/ but flower (root, index), quick settings
	@$(if $(BENCHES),,echo "benchmarks/ holds no programs yet")
	@set -e; for name in $(BENCHES); do \
	  echo "== $$name"; $(VENV)/bin/python -m benchmarks.$$name --quick $(ARGS); done

proto: $(PROTO_VENV)/.ready  ## regenerate the wire code from the .proto files
	@$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

# Current, and able to run at the oldest protobuf and grpcio that pyproject.toml admits.
proto-check: $(PROTO_VENV)/.ready
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PROTOC) --python_out=$$fresh --pyi_out=$$fresh --grpc_python_out=$$fresh $(PROTOS) && \
	for file in $(GENERATED); do \
	  diff -u $$file $$fresh/$$file || { echo "$$file is stale; run: make proto" >&2; exit 1; }; done
	@PYTHONPATH=. $(PROTO_VENV)/bin/python tools/proto_floor.py

clean:  ## remove environments, caches and outputs
	@rm -rf $(VENV) $(PROTO_VENV) .venv-flower build dist demo-output compare-output
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call make_venv,folder): a new environment with the first Python on the path that is new enough.
# Each candidate is run, not looked up: a version manager's shim may exist and yet not work.
define make_venv
	@for python in python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    rm -rf $(1) && $$python -m venv $(1) && exit 0; \
	    echo "$$python cannot make a virtual environment; install its venv module" \
	      "(on Debian: apt install python3-venv)." >&2; exit 1; \
	  fi; done; \
	echo "Sketchfleet needs Python 3.11 or newer on the PATH; found:" \
	  "$$(python3 --version 2>&1 || true)." >&2; exit 1
endef

# torch goes first and alone, so that whichever build pip is configured for (CPU or CUDA) is
# settled before another package can ask for it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Making $(VENV) (minutes at the first time; PyTorch is the large part) ..." >&2
	$(call make_venv,$(VENV))
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt torch
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[trial,dev]'
	@touch $@

$(PROTO_VENV)/.ready: tools/proto-requirements.txt
	@echo "Making $(PROTO_VENV) (protoc and the oldest supported protobuf and grpcio) ..." >&2
	$(call make_venv,$(PROTO_VENV))
	@$(PROTO_VENV)/bin/python $(PIP_INSTALL) -r tools/proto-requirements.txt
	@touch $@
