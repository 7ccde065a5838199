PYTHON ?= python3
BIN = .venv/bin

evaluate: install  ## open-set metrics of the shipped network
	$(BIN)/python compute_openmax.py --unknown tiny-imagenet-crop tiny-imagenet-resize cifar100

report: install  ## the same as a page with pictures, report/report.html
	$(BIN)/python compute_openmax.py --unknown tiny-imagenet-crop tiny-imagenet-resize cifar100 --report report

train: install  ## train the shipped network again
	$(BIN)/python train_dhr_nn.py --arch deep --loss one-vs-rest --cutout 12 --epochs 44 --batch-size 1000 --lr 0.2

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

bench: install
	$(BIN)/python benchmarks/bench.py

install: .venv/installed

# libMR goes last and may fail: without a C++ compiler, SciPy fits the same Weibulls.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q cython setuptools wheel
	grep -v '^libmr' requirements.txt | $(BIN)/pip install -q -r /dev/stdin
	$(BIN)/pip install -q --group dev
	$(BIN)/pip install -q --no-build-isolation -r requirements.txt \
		|| echo "libMR could not be compiled here; going on without it (SciPy fits the Weibulls)"
	touch $@

.PHONY: evaluate report train test bench install
