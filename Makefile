# make demo    watch a small swarm of real workers train on this machine
# make test    the whole default test suite
# make check   lint, format, types, bandit, advisories on dependencies, import directions
# make setup   what the three do first: a virtual environment in .venv with everything in it
#
# PYTHON=python3.12 chooses the interpreter, DEMO_ARGS='--rounds 40' is handed to the demo, and so is
# TEST_ARGS='-k codec' to pytest. TEST_JOBS=0 runs the tests in one process.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_JOBS ?= 2
PACKAGES := trainer compression dht experiments

.PHONY: canary checkpoint-torture fuzz-atheris lab pictures browser-test dashboard-load setup demo test check chaos chaos-20 fuzz soak join-test nat-test proto evidence clean

setup: $(STAMP)

# The stamp is written last: whatever stops the set-up half-way, the next call goes on with it.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "==> Making the virtual environment $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "dtrain needs Python 3.10 or newer; if you have one, name it: make setup PYTHON=/path/to/python3" >&2; \
	exit 2
	@echo "==> Installing dtrain and its pinned dependencies. PyTorch is by far the largest; on a Linux machine"
	@echo "    without an NVIDIA GPU its CPU build is much smaller: README.md, \"Less to download\"."
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@echo "==> Compiling the codec for this machine."
	@$(BIN)/python -m dtrain.compression.warm_up
	@touch $@
	@echo "==> Ready. Try: $(BIN)/dtrain --help"

demo: setup
	$(BIN)/dtrain demo $(DEMO_ARGS)

test: setup
	$(BIN)/pytest --numprocesses $(TEST_JOBS) --dist loadgroup $(TEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/types.py
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml $(PACKAGES) scripts
	$(BIN)/python scripts/advisories.py
	$(BIN)/pytest --quiet tests/test_floors.py

# Every planned fault at every named point of a round, and a minute asleep, about 15 minutes.
chaos: setup
	$(BIN)/pytest tests/test_chaos.py tests/test_audit_swarm.py -m "slow or not slow" $(TEST_ARGS)

# The suite's short version of chaos and soak, 20 times in a row, about an hour; stops at the first failure.
chaos-20: setup
	for number in $$(seq 20); do \
	  echo "==> $$number of 20"; $(BIN)/pytest --quiet tests/test_chaos.py tests/test_soak.py $(TEST_ARGS) || exit 1; \
	done

# 40,000 spoiled payloads and aggregates into every reader of the codec, a few minutes.
fuzz: setup
	$(BIN)/pytest tests/test_fuzz.py -m slow $(TEST_ARGS)

# Each parser of what others send, guided by coverage (atheris): FUZZ_MINUTES each, an hour in all. What is found is kept
# in .fuzz/ and gone on from. Linux: atheris has no build for every Python and machine.
FUZZ_MINUTES ?= 10
FUZZ_PARSERS ?= payload manifest invite record state control
fuzz-atheris: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary atheris -c constraints.txt -e '.[dev,fuzz]' || \
	  { echo "make fuzz-atheris: atheris has no build for this Python and machine; make fuzz and the default suite do without it" >&2; exit 2; }
	for parser in $(FUZZ_PARSERS); do \
	  echo "==> $$parser, $(FUZZ_MINUTES) minutes"; \
	  $(BIN)/python scripts/fuzz_atheris.py $$parser --minutes $(FUZZ_MINUTES) || exit 1; \
	done

# Planted secrets are found nowhere, with the real wandb, about a minute.
canary: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,wandb]'
	$(BIN)/pytest tests/test_admission.py $(TEST_ARGS)

# Checkpointing killed at 200 random instants, and on a full disk (as root), about a minute.
checkpoint-torture: setup
	$(BIN)/pytest tests/test_checkpoint_torture.py -m "slow or not slow" $(TEST_ARGS)

# 300 fault-free rounds of four workers, about 10 minutes.
soak: setup
	$(BIN)/pytest tests/test_soak.py -m slow $(TEST_ARGS)

# Newcomers: 25M parameters over a link that breaks, and six at once, about 10 minutes.
join-test: setup
	$(BIN)/pytest tests/test_state_swarm.py -m slow $(TEST_ARGS)

# Adapters trained by three processes and loaded by peft, lm-evaluation-harness, benches of a worker, torch.compile:
# about 6 minutes.
hf-test: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tasks]'
	$(BIN)/pytest tests/test_models_hf.py tests/test_harness.py tests/test_bench_worker.py tests/test_compute.py -m "slow or not slow" $(TEST_ARGS)

# Some of the lab's scenarios, under 15 minutes on a machine with two free cores: Linux, as root or with user namespaces.
LAB := freeze partition roam
lab: setup
	$(BIN)/pytest tests/test_lab_run.py -m netns
	@for name in $(LAB); do $(BIN)/dtrain lab experiments/configs/lab/$$name.toml || exit 1; done

# Workers behind routers that nobody can dial, machines that move, what doctor finds, in network namespaces: Linux, as root.
nat-test: setup
	$(BIN)/pytest tests/test_nat.py tests/test_lan.py tests/test_limits_wire.py tests/test_doctor_network.py -m netns $(TEST_ARGS)

# After a change of trainer/control.proto.
proto: setup
	$(BIN)/python -m grpc_tools.protoc -Itrainer --python_out=trainer --pyi_out=trainer control.proto

# Dockerfile by hadolint, compose.yaml by the Compose specification's schema.
.PHONY: lab docker-check
docker-check: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docker-check]'
	$(BIN)/pytest tests/test_docker.py -m "docker or not docker" $(TEST_ARGS)

# The dashboard's page in a real browser: Chromium and its driver from Debian's packages, axe-core from npm's registry.
AXE := $(VENV)/axe-core/package/axe.min.js

$(AXE):
	@mkdir -p $(VENV)/axe-core
	cd $(VENV)/axe-core && npm pack --silent axe-core@4 && tar -xzf axe-core-*.tgz

browser-test: setup $(AXE)
	@command -v chromium && command -v chromedriver || { apt-get update && apt-get install -y chromium chromium-driver; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser-test]'
	DTRAIN_AXE=$(CURDIR)/$(AXE) $(BIN)/pytest tests/test_browser.py -m browser $(TEST_ARGS)

# The README's pictures of the dashboard, of a live run: about 4 minutes.
pictures: setup
	@command -v chromium && command -v chromedriver || { apt-get update && apt-get install -y chromium chromium-driver; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser-test]'
	$(BIN)/python scripts/pictures.py

# 1,000 viewers for a minute, 100 that never read, a million stored points, round times with them: about 7 minutes.
dashboard-load: setup
	$(BIN)/dtrain bench dashboard

# The figures of experiments/RESULTS.md: hours. It can be stopped, and the same command goes on.
evidence: setup
	for name in attacks_shipped strategies diloco tuning long_tuning long long_muon_tuning long_muon long_one_machine workers ablations unequal links \
	  frontier frontier_long frontier_rare frontier_tuning frontier_seeds tiny tiny_tuning tiny_one_machine outer_rate; do \
	  $(BIN)/dtrain simulate experiments/configs/$$name.toml --out dtrain-simulations/$$name || exit 1; \
	done

clean:
	rm -rf $(VENV) .fuzz .hypothesis .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
