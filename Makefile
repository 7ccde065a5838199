PYTHON ?= python3
BIN = .venv/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

UNKNOWN = tiny-imagenet-crop tiny-imagenet-resize cifar100

evaluate: install  # open-set metrics of the shipped network
	$(BIN)/python compute_openmax.py --unknown $(UNKNOWN)

report: install  # the same as a page with pictures, report/report.html
	$(BIN)/python compute_openmax.py --unknown $(UNKNOWN) --report report

train: install  # train the shipped network again, into trained.pt
	$(BIN)/python train_dhr_nn.py --arch deep

test: install  # the fast tests
	$(PYTEST) -m "not slow"

test-all: test  # and the slow ones
	$(PYTEST) -m slow

bench: install
	$(BIN)/python benchmarks/bench.py

install: .venv/installed

# libMR is compiled from source. Without a C++ compiler, SciPy fits the same Weibulls.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
		sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 install")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip cython numpy setuptools wheel
	$(BIN)/pip install -q --no-build-isolation -r requirements.txt \
		|| { echo "that failed; trying again without libMR, which needs a C++ compiler"; \
		     grep -v '^libmr' requirements.txt | $(BIN)/pip install -q -r /dev/stdin; }
	$(BIN)/pip install -q --group dev
	touch $@

.PHONY: evaluate report train test test-all bench install
